"""Similarity: the definition, its properties, merges from inner products, special values, the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint, open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.methods import get
from modelglue.zoo import Similarity, gram, similarity
from tests.zoo.models import CONFIG, model, reference, siblings, tensors

if TYPE_CHECKING:
    from pathlib import Path

MODES = ("column", "tensor", "global")
SCOPES = ("all", "attn", "mlp")
seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


@few
@given(seed=seeds, count=st.integers(2, 5), mode=st.sampled_from(MODES), scope=st.sampled_from(SCOPES))
def test_equals_the_definition(seed: int, count: int, mode: str, scope: str) -> None:
    zoo = siblings(seed, count)
    found = similarity([model(weights) for weights in zoo], mode=mode, scope=scope)  # type: ignore[arg-type]
    assert found.matrix.shape == (count, count)
    assert found.matrix.dtype == np.float64
    for a in range(count):
        for b in range(count):
            assert found.matrix[a, b] == pytest.approx(reference(zoo[a], zoo[b], mode, scope), abs=1e-6)
    assert np.array_equal(found.matrix, found.matrix.T)
    assert np.array_equal(np.diag(found.matrix), np.ones(count))
    assert (np.abs(found.matrix) <= 1).all()


@few
@given(seed=seeds, factor=st.floats(0.01, 100), mode=st.sampled_from(MODES))
def test_scale_and_common_row_order_do_not_matter(seed: int, factor: float, mode: str) -> None:
    a, b = siblings(seed, 2)
    plain = similarity([model(a), model(b)], mode=mode).matrix[0, 1]  # type: ignore[arg-type]
    scaled = {name: value * factor for name, value in a.items()}
    assert similarity([model(scaled), model(b)], mode=mode).matrix[0, 1] == pytest.approx(plain, abs=1e-6)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    order = {name: torch.randperm(value.shape[0], generator=generator) for name, value in a.items()}
    shuffled = [model({name: value[order[name]] for name, value in side.items()}) for side in (a, b)]
    assert similarity(shuffled, mode=mode).matrix[0, 1] == pytest.approx(plain, abs=1e-6)  # type: ignore[arg-type]


@few
@given(
    seed=seeds,
    weights=st.lists(st.floats(0.05, 1), min_size=1, max_size=3),
    mode=st.sampled_from(MODES),
    scope=st.sampled_from(SCOPES),
    delta=st.booleans(),
)
def test_similarity_to_a_merge_equals_the_direct_one(seed: int, weights: list[float], mode: str, scope: str, delta: bool) -> None:
    zoo = siblings(seed, 4)
    base = model(tensors(seed)) if delta else None
    found = similarity([model(one) for one in zoo], mode=mode, scope=scope, base=base, keep_gram=True)  # type: ignore[arg-type]
    alpha = [weight / sum(weights) for weight in weights]
    merge = {name: torch.stack([weight * one[name] for weight, one in zip(alpha, zoo, strict=False)]).sum(0) for name in zoo[0]}
    for other in range(4):
        direct = similarity([model(merge), model(zoo[other])], mode=mode, scope=scope, base=base).matrix[0, 1]  # type: ignore[arg-type]
        assert found.to_merge(dict(enumerate(weights)), other) == pytest.approx(direct, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_unit_weights_give_the_matrix(mode: str) -> None:
    zoo = [model(weights) for weights in siblings(3, 4)]
    found = similarity(zoo, mode=mode, keep_gram=True)  # type: ignore[arg-type]
    for a in range(4):
        for b in range(4):
            assert found.to_merge({a: 0.4}, b) == pytest.approx(found.matrix[a, b], abs=1e-7)


def test_similarity_to_a_saved_merge_of_the_engine(tiny_zoo: Path) -> None:
    """The closed form against the merge that the engine builds, in bfloat16 as it would be saved."""
    names = ("generalist", "reverse", "sort", "drifted")
    zoo = [open_checkpoint(tiny_zoo / "models" / name) for name in names]
    found = similarity(zoo, labels=names, keep_gram=True)
    method = get("linear")
    parameters, faults = method.resolve({}, [{"weight": 0.7}, {"weight": 0.3}], ["generalist", "drifted"])
    assert faults == []
    merge = MergedCheckpoint(method, [zoo[0], zoo[3]], None, parameters, store="bfloat16")
    direct = similarity([merge, *zoo]).matrix[0, 1:]
    closed = [found.to_merge({0: 0.7, 3: 0.3}, other) for other in range(4)]
    assert closed == pytest.approx(direct.tolist(), abs=1e-4)


def test_delta_subtracts_the_base_first() -> None:
    zoo = siblings(5, 3, spread=1e-3)
    base = tensors(5)
    found = similarity([model(one) for one in zoo], base=model(base))
    vectors = [{name: one[name] - base[name] for name in one} for one in zoo]
    assert found.delta
    assert found.matrix[0, 1] == pytest.approx(reference(vectors[0], vectors[1]), abs=1e-6)
    assert abs(found.matrix[0, 1]) < 0.6
    assert similarity([model(one) for one in zoo]).matrix[0, 1] > 0.99


def test_many_small_blocks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in several passes and rows in many blocks: the same numbers, up to the last digits of float64."""
    zoo = [model(weights) for weights in siblings(7, 3)]
    whole = similarity(zoo, keep_gram=True)
    monkeypatch.setattr(gram, "PRODUCT_BYTES", 8 * 6 * 4)  # four columns of six pairs
    narrow = similarity(zoo, keep_gram=True)
    monkeypatch.setattr(gram, "BLOCK_ELEMENTS", 13)
    rows = similarity(zoo, keep_gram=True)
    for found in (narrow, rows):
        assert found.matrix == pytest.approx(whole.matrix, abs=1e-13)
        assert found.to_merge({0: 1, 1: 2}, 2) == pytest.approx(whole.to_merge({0: 1, 1: 2}, 2), abs=1e-7)


def test_a_pair_does_not_depend_on_the_rest_of_the_zoo() -> None:
    zoo = [model(weights) for weights in siblings(8, 4)]
    all_of_them = similarity(zoo).matrix
    assert similarity([zoo[1], zoo[3]]).matrix[0, 1] == pytest.approx(all_of_them[1, 3], abs=1e-13)


def test_memory_is_bounded_by_blocks() -> None:
    """Never a whole tensor: reads are of 65,536 elements of whole rows at most."""
    asked: list[int] = []

    class Watched(TensorsCheckpoint):
        def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
            asked.append((stop if stop is not None else self.info(name).numel) - start)
            return super().read(name, start, stop, out)

    name = "model.layers.0.self_attn.q_proj.weight"
    pair = [Watched({name: torch.randn(2000, 100), "model.layers.0.mlp.up_proj.weight": torch.randn(300_000, 1)}) for _ in "ab"]
    similarity(pair)
    assert max(asked) <= 65_536
    assert sum(asked) == 2 * (200_000 + 300_000)


def test_stacked_experts_count_column_by_column() -> None:
    a, b = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    name = "model.layers.0.mlp.experts.down_proj"
    found = similarity([TensorsCheckpoint({name: a}), TensorsCheckpoint({name: b})], keep_gram=True)
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1).mean()
    assert found.matrix[0, 1] == pytest.approx(float(expected), abs=1e-6)
    assert found.to_merge({0: 1}, 1) == pytest.approx(float(expected), abs=1e-6)


class TestSpecialValues:
    @staticmethod
    def pair(a: torch.Tensor, b: torch.Tensor, **options: object) -> Similarity:
        name = "model.layers.0.self_attn.q_proj.weight"
        checkpoints = [TensorsCheckpoint({name: one}) for one in (a, b)]
        return similarity(checkpoints, keep_gram=True, **options)  # type: ignore[arg-type]

    def test_columns_that_are_zero_in_both_are_left_out(self) -> None:
        a = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        b = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
        found = self.pair(a, b)
        assert found.matrix[0, 1] == pytest.approx(0.5)  # (1 + 0) / 2, not / 3
        assert found.to_merge({0: 1}, 1) == pytest.approx(0.5)

    def test_a_column_that_is_zero_in_one_counts_as_zero(self) -> None:
        found = self.pair(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        assert found.matrix[0, 1] == pytest.approx(0.5)
        assert found.to_merge({0: 1}, 1) == pytest.approx(0.5)

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_but_zeros_is_not_comparable(self, mode: str) -> None:
        found = self.pair(torch.zeros(2, 2), torch.zeros(2, 2), mode=mode)
        assert np.isnan(found.matrix[0, 1])
        assert found.matrix[0, 0] == 1

    def test_tiny_columns_are_compared_with_the_published_floor(self) -> None:
        found = self.pair(torch.full((1, 1), 1e-5), torch.full((1, 1), 1e-5))
        assert found.matrix[0, 1] == pytest.approx(1e-10 / 1e-8, rel=1e-5)

    def test_identical_models_are_exactly_one(self) -> None:
        weights = tensors(11, dtype=torch.bfloat16)
        copy = {name: value.clone() for name, value in weights.items()}
        assert similarity([model(weights), model(tensors(12)), model(copy)]).matrix[0, 2] == 1.0

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_weights_name_model_and_tensor(self, value: float) -> None:
        zoo = siblings(2, 2)
        zoo[1]["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        with pytest.raises(CheckpointError, match=r"bad: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds 1 value"):
            similarity([model(one) for one in zoo], labels=["good", "bad"])

    def test_non_finite_embeddings_do_not_matter(self) -> None:
        zoo = siblings(2, 2)
        zoo[1]["lm_head.weight"][0, 0] = float("nan")
        assert similarity([model(one) for one in zoo]).matrix[0, 1] > 0.5

    def test_quantised_weights_are_refused(self) -> None:
        zoo = siblings(2, 2)
        zoo[0]["model.layers.0.mlp.up_proj.weight"] = torch.ones(10, 6, dtype=torch.int8)
        with pytest.raises(CheckpointError, match=r"model 0: .*up_proj\.weight' is stored as I8.*Dequantise"):
            similarity([model(one) for one in zoo])

    def test_mixed_dtypes_compare(self) -> None:
        weights = tensors(4)
        half = {name: value.to(torch.bfloat16) for name, value in weights.items()}
        assert similarity([model(weights), model(half)]).matrix[0, 1] == pytest.approx(1, abs=1e-4)

    def test_masks_and_rotary_buffers_are_no_weights(self) -> None:
        zoo = siblings(6, 2)
        plain = similarity([model(one) for one in zoo]).matrix
        zoo[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        zoo[1]["model.layers.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        found = similarity([model(one) for one in zoo])
        assert np.array_equal(found.matrix, plain)
        assert found.warnings == ()


class TestComparable:
    @pytest.mark.parametrize(
        "config",
        [
            {"architectures": ["OtherForCausalLM"]},
            {"num_hidden_layers": 3},
            {"hidden_size": 12},
            {"num_key_value_heads": 1},
        ],
    )
    def test_other_structure_is_not_comparable(self, config: dict[str, object]) -> None:
        zoo = siblings(1, 3)
        found = similarity([model(zoo[0]), model(zoo[1], **config), model(zoo[2])], keep_gram=True)
        assert np.isnan(found.matrix[0, 1])
        assert np.isnan(found.matrix[1, 2])
        assert found.matrix[0, 2] > 0.5
        assert found.matrix[1, 1] == 1
        assert np.isnan(found.to_merge({0: 1, 2: 1}, 1))
        assert found.to_merge({1: 1}, 1) == 1

    def test_other_function_is_compared(self) -> None:
        a, b = siblings(1, 2)
        assert similarity([model(a), model(b, rope_theta=1e6)]).matrix[0, 1] > 0.5

    def test_vocabulary_does_not_matter(self) -> None:
        a, b = siblings(1, 2)
        plain = similarity([model(a), model(b)]).matrix
        b["model.embed_tokens.weight"] = torch.randn(20, 6)
        assert np.array_equal(similarity([model(a), model(b, vocab_size=20)]).matrix, plain)

    def test_a_tensor_of_one_model_only_is_skipped_and_reported(self) -> None:
        a, b = siblings(1, 2)
        big = "model.layers.0.mlp.down_proj.weight"
        a[big], b[big] = torch.randn(600, 10), torch.randn(600, 10)
        del b["model.layers.0.self_attn.q_proj.bias"]
        found = similarity([model(a), model(b)], labels=["a", "b"], keep_gram=True)
        shared = {name: value for name, value in a.items() if name in b}
        assert found.matrix[0, 1] == pytest.approx(reference(shared, b), abs=1e-6)
        assert found.to_merge({0: 1}, 1) == pytest.approx(found.matrix[0, 1], abs=1e-6)
        (warning,) = found.warnings
        assert "1 tensors" in warning
        assert "q_proj.bias' (6) in 'a' only" in warning

    def test_less_than_99_percent_shared_is_not_comparable(self) -> None:
        a, b, c = siblings(1, 3)
        b["model.layers.0.mlp.up_proj.weight"] = torch.randn(11, 6)
        found = similarity([model(a), model(b), model(c)], labels=["a", "b", "c"])
        assert np.isnan(found.matrix[0, 1])
        assert found.matrix[0, 2] > 0.5
        assert any("'a' and 'b' share" in warning and "not comparable" in warning for warning in found.warnings)

    def test_models_that_the_base_does_not_fit_are_not_comparable(self) -> None:
        a, b = siblings(1, 2)
        base = tensors(1)
        del base["model.layers.0.mlp.up_proj.weight"]
        found = similarity([model(a), model(b)], base=model(base))
        assert np.isnan(found.matrix[0, 1])
        assert any("the base lacks 1 tensors" in warning for warning in found.warnings)

    def test_without_known_names_matrices_inside_layers_count(self) -> None:
        def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name.replace("self_attn", "mixer").replace("mlp", "glu"): value for name, value in weights.items()}

        a, b = siblings(1, 2, bias=False)
        found = similarity([model(rename(a)), model(rename(b))])
        assert found.matrix[0, 1] == pytest.approx(reference(a, b), abs=1e-6)
        with pytest.raises(UserError, match=r"no tensor that a similarity of scope 'attn' looks at.*scope: all"):
            similarity([model(rename(a)), model(rename(b))], scope="attn")

    def test_nothing_to_compare_is_an_error(self) -> None:
        with pytest.raises(UserError, match="model 0: has no tensor"):
            similarity([TensorsCheckpoint({"w": torch.ones(2, 2)}), TensorsCheckpoint({"w": torch.ones(2, 2)})])

    def test_real_folders_of_two_architectures(self, tiny_zoo: Path) -> None:
        names = ("reverse", "reverse-twin", "corrupted", "drifted", "stranger")
        found = similarity([open_checkpoint(tiny_zoo / "models" / name) for name in names], labels=names)
        assert np.isnan(found.matrix[:4, 4]).all()
        assert found.matrix[0, 1] > found.matrix[0, 2] > 0.95 > found.matrix[0, 3]
        neox = [open_checkpoint(tiny_zoo / "models" / "stranger")] * 2
        assert similarity(neox).matrix[0, 1] == 1.0


class TestFile:
    @pytest.mark.parametrize("mode", MODES)
    def test_round_trip(self, tmp_path: Path, mode: str) -> None:
        zoo = [model(weights) for weights in siblings(9, 3)]
        found = similarity(zoo, labels=["a", "b", "ü"], mode=mode, scope="mlp", keep_gram=True)  # type: ignore[arg-type]
        path = tmp_path / "similarity.safetensors"
        found.save(path)
        loaded = Similarity.load(path)
        assert np.array_equal(loaded.matrix, found.matrix)
        assert (loaded.labels, loaded.mode, loaded.scope, loaded.delta) == (("a", "b", "ü"), mode, "mlp", False)
        assert loaded.to_merge({0: 1, 1: 2}, 2) == found.to_merge({0: 1, 1: 2}, 2)
        loaded.save(tmp_path / "again.safetensors")
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()

    def test_equal_inputs_give_equal_bytes_whatever_the_threads(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        big = {
            "model.layers.0.self_attn.q_proj.bias": torch.randn(200_000, generator=generator),
            "model.layers.0.mlp.up_proj.weight": torch.randn(700, 300, generator=generator),
        }
        zoo = [TensorsCheckpoint(big), TensorsCheckpoint({name: value.flip(0) for name, value in big.items()})]
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                similarity(zoo, keep_gram=True).save(tmp_path / str(threads))
        finally:
            torch.set_num_threads(before)
        assert len({(tmp_path / str(threads)).read_bytes() for threads in (1, 2, 4)}) == 1

    def test_other_readers_understand_it(self, tmp_path: Path) -> None:
        from safetensors import safe_open

        zoo = [model(weights) for weights in siblings(9, 2)]
        found = similarity(zoo, labels=["a", "b"])
        found.save(tmp_path / "s.safetensors")
        with safe_open(tmp_path / "s.safetensors", "np") as file:
            assert file.keys() == ["similarity"]
            assert np.array_equal(file.get_tensor("similarity"), found.matrix)
            metadata = file.metadata()
        assert json.loads(metadata["models"]) == ["a", "b"]
        assert (metadata["mode"], metadata["scope"]) == ("column", "all")

    def test_without_inner_products_merges_are_unknown(self, tmp_path: Path) -> None:
        found = similarity([model(weights) for weights in siblings(9, 2)])
        found.save(tmp_path / "s.safetensors")
        for one in (found, Similarity.load(tmp_path / "s.safetensors")):
            with pytest.raises(UserError, match="keep_gram"):
                one.to_merge({0: 1}, 1)

    def test_a_foreign_file_is_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"similarity": torch.eye(2)}, tmp_path / "s.safetensors")
        with pytest.raises(CheckpointError, match=r"s\.safetensors: is no modelglue-similarity/1 file"):
            Similarity.load(tmp_path / "s.safetensors")


def test_arguments_are_checked() -> None:
    zoo = [model(weights) for weights in siblings(9, 2)]
    with pytest.raises(UserError, match="no models"):
        similarity([])
    with pytest.raises(UserError, match="1 labels for 2 models"):
        similarity(zoo, labels=["a"])
    with pytest.raises(UserError, match=r"mode is 'columns'.*Did you mean 'column'"):
        similarity(zoo, mode="columns")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scope is 'x'"):
        similarity(zoo, scope="x")  # type: ignore[arg-type]
    found = similarity(zoo, keep_gram=True)
    for weights, other in (({}, 0), ({0: 0.0}, 1), ({0: 1.0}, 2), ({5: 1.0}, 0), ({0: -1.0}, 1)):
        with pytest.raises(UserError, match="allowed are indices 0 to 1"):
            found.to_merge(weights, other)


def test_one_model_alone_needs_no_reading() -> None:
    found = similarity([model(tensors(0))], keep_gram=True)
    assert found.matrix.tolist() == [[1.0]]
    assert found.to_merge({0: 1}, 0) == 1


def test_progress_counts_every_byte() -> None:
    zoo = [model(weights) for weights in siblings(9, 2)]
    calls: list[tuple[int, int]] = []
    similarity(zoo, progress=lambda done, total: calls.append((done, total)))
    counted = [name for name in zoo[0].names() if "self_attn" in name or "mlp" in name]
    expected = 2 * sum(zoo[0].info(name).nbytes for name in counted)
    assert calls[-1] == (expected, expected)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert CONFIG["num_hidden_layers"] == 2
