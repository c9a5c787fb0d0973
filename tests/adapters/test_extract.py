"""A model becomes base and adapter: ranks, errors that are measured, whole modules, resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.adapters import EXTRACTION_FILE, Extraction, extract_lora, truncated_svd
from modelglue.adapters.low_rank import residual, truncated_product
from modelglue.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.adapted import open_adapted
from modelglue.checkpoint.adapter import open_adapter
from modelglue.errors import CheckpointError, MergeError, UserError
from tests.adapters.on_disk import PREFIX, linear, update, write_adapter
from tests.checkpoint.files import contents, names_in, randn, write_single

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "tie_word_embeddings": False}


def model(seed: int, config: Mapping[str, Any] = CONFIG, **more: torch.Tensor) -> TensorsCheckpoint:
    shapes = {
        "model.embed_tokens.weight": (9, 6), "lm_head.weight": (9, 6), "model.norm.weight": (6,),
        **{f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in
           {"q.weight": (8, 6), "q.bias": (8,), "o.weight": (6, 8), "norm.weight": (6,)}.items()},
    }  # fmt: skip
    tensors = {name: randn(*shape, seed=1000 * seed + number) for number, (name, shape) in enumerate(shapes.items())}
    return TensorsCheckpoint({**tensors, **more}, config, label=f"model{seed}")


def like(base: Checkpoint, **changes: torch.Tensor) -> TensorsCheckpoint:
    """The base with other tensors at these names ("__" for ".")."""
    tensors = {name: base.tensor(name) for name in base.names()}
    return TensorsCheckpoint(
        {**tensors, **{name.replace("__", "."): values for name, values in changes.items()}}, base.config, label="changed"
    )


def kinds(found: Extraction) -> dict[str, str]:
    return {one.name: one.kind for one in found.tensors}


def rebuilt(base: Checkpoint, out: Path) -> Checkpoint:
    return open_adapted(base, [out], "base+out")


# -- the decomposition ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_the_error_is_the_tail_of_the_singular_values(rows: int, columns: int, rank: int) -> None:
    matrix = randn(rows, columns, seed=rank)
    best = truncated_svd(matrix, max_rank=rank)
    s = torch.linalg.svdvals(matrix.double())
    assert best.rank == min(rank, rows, columns)
    torch.testing.assert_close(best.s.double(), s[: best.rank], rtol=1e-5, atol=1e-6)
    A, B = best.factors()
    assert residual(matrix, A, B) == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-5 * best.norm)
    assert best.norm == pytest.approx(float(matrix.norm()), rel=1e-6)
    assert best.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-5)
    # distributed: both factors have norms sqrt(s); else B is orthonormal
    torch.testing.assert_close(A.norm(dim=1), best.s.sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B.norm(dim=0), best.s.sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(best.factors(distribute=False)[1].norm(dim=0), torch.ones(best.rank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("limits", "rank"),
    [
        ({}, 4), ({"max_rank": 3}, 3), ({"max_rank": 9}, 4), ({"sv_epsilon": 1.5}, 2), ({"sv_epsilon": 9.0}, 0), ({"energy": 0.5}, 1),
        ({"energy": 16 / 21.25}, 1), ({"energy": 0.9}, 2), ({"energy": 0.95}, 3), ({"energy": 1.0}, 4),
        ({"energy": 0.95, "max_rank": 2}, 2), ({"energy": 0.95, "sv_epsilon": 3.0}, 1),
    ],
)  # fmt: skip
def test_the_strictest_limit_decides_the_rank(limits: dict[str, Any], rank: int) -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, 4.0, 2.0, 0.0]))  # squares: 16, 4, 1, 0.25
    assert truncated_svd(matrix, **limits).rank == rank


def test_a_sketch_finds_what_the_whole_decomposition_finds() -> None:
    low = randn(300, 5, seed=1) @ randn(5, 260, seed=2)
    matrix = low + 0.01 * randn(300, 260, seed=3)
    exact, sketched = (truncated_svd(matrix, max_rank=5, exact=exact, seed="w") for exact in (True, False))
    torch.testing.assert_close(sketched.s, exact.s, rtol=1e-5, atol=1e-5)
    A, B = sketched.factors()
    torch.testing.assert_close(B @ A, exact.factors()[1] @ exact.factors()[0], rtol=1e-3, atol=1e-3)
    assert residual(matrix, A, B) <= residual(matrix, *exact.factors()) * 1.0001
    assert torch.equal(truncated_svd(matrix, max_rank=5, seed="w").U, sketched.U)
    assert not torch.equal(truncated_svd(matrix, max_rank=5, seed="other").U, sketched.U)


def test_products_are_decomposed_without_being_formed() -> None:
    lefts, rights = [randn(20, 3, seed=1), randn(20, 4, seed=2)], [randn(3, 9, seed=3), randn(4, 9, seed=4)]
    best = truncated_product(lefts, rights, 3)
    whole = truncated_svd(lefts[0] @ rights[0] + lefts[1] @ rights[1], max_rank=3, exact=True)
    torch.testing.assert_close(best.U * best.s @ best.V.T, whole.U * whole.s @ whole.V.T, rtol=1e-4, atol=1e-4)
    assert truncated_product([torch.zeros(5, 2)], [torch.ones(2, 4)], 2).rank == 0


# -- whole models -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed_lora", [False, True])
def test_at_full_rank_nothing_is_lost(tmp_path: Path, embed_lora: bool) -> None:
    ours, base = model(1), model(0)
    found = extract_lora(ours, base, tmp_path / "out", max_rank=64, embed_lora=embed_lora)
    again = rebuilt(base, tmp_path / "out")
    assert again.names() == ours.names()
    for name in ours.names():
        torch.testing.assert_close(again.tensor(name), ours.tensor(name), rtol=1e-5, atol=1e-5)
    expected = {name: "lora" if name.endswith(("q.weight", "o.weight", "lm_head.weight")) else "saved" for name in ours.names()}
    expected |= {f"model.layers.{layer}.q.bias": "bias" for layer in range(2)}
    expected["model.embed_tokens.weight"] = "embedding" if embed_lora else "saved"
    assert kinds(found) == expected
    assert found.error < 1e-6
    assert found.rank == 6
    record = json.loads((tmp_path / "out" / EXTRACTION_FILE).read_text())
    assert [one["name"] for one in record["tensors"]] == list(ours.names())
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size == found.bytes == record["bytes"]


@given(st.integers(1, 8))
@settings(max_examples=8, deadline=None)
def test_the_reported_error_is_that_of_the_adapted_base(rank: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        ours, base = model(1), model(0)
        found = extract_lora(ours, base, Path(home) / "out", max_rank=rank, dtype="bfloat16")
        again = rebuilt(base, Path(home) / "out")
        decomposed = [one for one in found.tensors if one.kind == "lora"]
        assert len(decomposed) == 5
        for one in decomposed:
            delta = (ours.tensor(one.name) - base.tensor(one.name)).double()
            lost = (again.tensor(one.name) - ours.tensor(one.name)).double().norm() / delta.norm()
            assert float(lost) == pytest.approx(one.error, rel=1e-3, abs=1e-6)
            tail = torch.linalg.svdvals(delta)[rank:].square().sum().sqrt() / delta.norm()
            assert one.error == pytest.approx(float(tail), rel=0.05, abs=0.01)  # bfloat16 factors lose a little more
            assert one.rank == min(rank, *delta.shape)


@given(st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_an_applied_adapter_is_found_again(rank: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        base = model(0)
        tensors = {**linear("model.layers.0.q", 8, 6, rank), **linear("lm_head", 9, 6, rank, seed=4)}
        ours = open_adapted(base, [write_adapter(Path(home) / "a", tensors, r=rank)], "base+a")
        found = extract_lora(ours, base, Path(home) / "out", max_rank=rank)
        assert found.error < 1e-5
        again = open_adapter(Path(home) / "out")
        assert list(again.updates) == ["lm_head", "model.layers.0.q"]
        for module in again.updates:
            factors = again.factors(module)
            assert factors.scale == 1
            torch.testing.assert_close((factors.B @ factors.A).double(), update(tensors, module), rtol=1e-4, atol=1e-4)


def test_ranks_that_differ_go_into_both_patterns(tmp_path: Path) -> None:
    base = model(0)
    q = base.tensor("model.layers.0.q.weight") + update(linear("m", 8, 6, 1), "m").float()
    o = base.tensor("model.layers.1.o.weight") + update(linear("m", 6, 8, 3), "m").float()
    found = extract_lora(like(base, model__layers__0__q__weight=q, model__layers__1__o__weight=o), base, tmp_path / "out", energy=0.99999)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.q": 1}
    assert config["target_modules"] == ["model.layers.0.q", "model.layers.1.o"]
    assert {one.name: one.rank for one in found.tensors if one.rank} == {"model.layers.0.q.weight": 1, "model.layers.1.o.weight": 3}
    torch.testing.assert_close(rebuilt(base, tmp_path / "out").tensor("model.layers.0.q.weight"), q, rtol=1e-4, atol=1e-4)


def test_layers_stored_in_out(tmp_path: Path) -> None:
    config = {"model_type": "gpt2"}
    base = TensorsCheckpoint({"h.0.c.weight": randn(5, 7), "h.0.s.weight": randn(5, 5)}, config)
    ours = TensorsCheckpoint({"h.0.c.weight": randn(5, 7, seed=1), "h.0.s.weight": randn(5, 5, seed=2)}, config)
    extract_lora(ours, base, tmp_path / "out")
    assert open_adapter(tmp_path / "out").config.fan_in_fan_out
    assert open_adapter(tmp_path / "out").factors("h.0.c").A.shape == (5, 5)
    again = rebuilt(base, tmp_path / "out")
    for name in ours.names():
        torch.testing.assert_close(again.tensor(name), ours.tensor(name), rtol=1e-4, atol=1e-4)


def test_globs_choose_modules(tmp_path: Path) -> None:
    ours, base = model(1), model(0)
    found = kinds(extract_lora(ours, base, tmp_path / "a", include=["q", "model.layers.0.*"], exclude=["*.0.norm", "lm_head"]))
    assert {name for name, kind in found.items() if kind != "excluded"} == {
        "model.layers.0.q.weight", "model.layers.0.q.bias", "model.layers.0.o.weight", "model.layers.1.q.weight", "model.layers.1.q.bias",
    }  # fmt: skip
    again = rebuilt(base, tmp_path / "a")
    assert torch.equal(again.tensor("lm_head.weight"), base.tensor("lm_head.weight"))
    with pytest.raises(UserError, match=r"the pattern 'q_proj' fits no module; allowed are globs"):
        extract_lora(ours, base, tmp_path / "b", include=["q_proj"])
    assert names_in(tmp_path) == ["a"]


def test_what_is_equal_is_left_out_and_so_is_what_is_skipped(tmp_path: Path) -> None:
    base = model(0)
    ours = like(base, model__layers__0__o__weight=randn(6, 8, seed=505), model__norm__weight=randn(6, seed=506), extra__weight=randn(2, 2))
    found = kinds(extract_lora(ours, base, tmp_path / "out", save_others=False))
    assert {name: kind for name, kind in found.items() if kind != "equal"} == {
        "model.layers.0.o.weight": "lora", "model.norm.weight": "left out", "extra.weight": "left out",
    }  # fmt: skip
    assert list(open_adapter(tmp_path / "out").updates) == ["model.layers.0.o"]
    assert open_adapter(tmp_path / "out").replaced == {}
    with pytest.raises(CheckpointError, match="model and base do not differ where the adapter may"):
        extract_lora(base, base, tmp_path / "none")
    with pytest.raises(CheckpointError, match="have no tensor of the same name"):
        extract_lora(TensorsCheckpoint({"x.weight": randn(2, 2)}), base, tmp_path / "none")
    assert names_in(tmp_path) == ["out"]


def test_modules_are_saved_whole_and_by_the_end_of_their_names(tmp_path: Path) -> None:
    """PEFT saves a module with all its tensors, and finds 'norm' in 'layers.0.norm' too."""
    base = TensorsCheckpoint(
        {"norm.weight": randn(4), "norm.bias": randn(4), "layers.0.norm.weight": randn(4), "layers.0.q.weight": randn(4, 4)}
    )
    extract_lora(like(base, norm__weight=randn(4, seed=9)), base, tmp_path / "out")
    adapter = open_adapter(tmp_path / "out")
    assert adapter.config.modules_to_save == ("layers.0.norm", "norm")
    assert set(adapter.replaced) == {"norm.weight", "norm.bias", "layers.0.norm.weight"}


def test_resized_tables_are_saved_whole(tmp_path: Path) -> None:
    base = model(0)
    ours = like(base, model__embed_tokens__weight=randn(11, 6, seed=1), lm_head__weight=randn(11, 6, seed=2))
    found = kinds(extract_lora(ours, base, tmp_path / "out", embed_lora=True))
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == ("saved", "saved")
    again = rebuilt(base, tmp_path / "out")
    assert torch.equal(again.tensor("lm_head.weight"), ours.tensor("lm_head.weight"))
    assert again.config["vocab_size"] == 11


def test_biases_move_beside_the_factors_where_every_layer_has_one(tmp_path: Path) -> None:
    ours, base = model(1), model(0)
    found = kinds(extract_lora(ours, base, tmp_path / "all", include=["q"]))
    adapter = open_adapter(tmp_path / "all")
    assert (adapter.config.lora_bias, found["model.layers.0.q.bias"]) == (True, "bias")
    assert adapter.updates["model.layers.0.q"].bias == f"{PREFIX}model.layers.0.q.lora_B.bias"
    extract_lora(ours, base, tmp_path / "some", include=["q", "o"])
    adapter = open_adapter(tmp_path / "some")
    assert (adapter.config.lora_bias, adapter.config.bias) == (False, "lora_only")
    for out in ("all", "some"):
        again = rebuilt(base, tmp_path / out)
        torch.testing.assert_close(again.tensor("model.layers.0.q.bias"), ours.tensor("model.layers.0.q.bias"), rtol=1e-5, atol=1e-5)
    # a bias alone: there is no update that it could go with
    only = like(base, model__layers__0__q__bias=randn(8, seed=77), model__layers__1__q__weight=randn(8, 6, seed=78))
    extract_lora(only, base, tmp_path / "only", include=["q"])
    assert set(open_adapter(tmp_path / "only").replaced) == {"model.layers.0.q.weight", "model.layers.0.q.bias"}
    assert torch.equal(rebuilt(base, tmp_path / "only").tensor("model.layers.0.q.bias"), only.tensor("model.layers.0.q.bias"))


def test_a_tied_head_is_held_once_and_stays_tied(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    for twice in (False, True):
        pair = []
        for seed in (0, 1):
            whole = model(seed, tied)
            tensors = {name: whole.tensor(name) for name in whole.names() if name != "lm_head.weight"}
            pair.append(TensorsCheckpoint({**tensors, **({"lm_head.weight": tensors["model.embed_tokens.weight"]} if twice else {})}, tied))
        base, ours = pair
        out = tmp_path / str(twice)
        found = extract_lora(ours, base, out, embed_lora=True)
        assert kinds(found)["model.embed_tokens.weight"] == "saved"
        assert kinds(found).get("lm_head.weight") == ("tied" if twice else None)
        assert found.warnings == (
            "'model.embed_tokens.weight' is saved whole: it is tied to 'lm_head.weight', and PEFT cannot hold factors for both.",
        )
        assert json.loads((out / "adapter_config.json").read_text())["ensure_weight_tying"] is True
        again = rebuilt(base, out)
        assert (again.names(), again.config["tie_word_embeddings"]) == (ours.names(), True)
        for name in ours.names():
            torch.testing.assert_close(again.tensor(name), ours.tensor(name), rtol=1e-5, atol=1e-5)


def test_the_head_of_gpt_neox_is_called_as_live_models_call_it(tmp_path: Path) -> None:
    """PEFT passes over what it does not find, so under the file's name the head's update would be lost without a word."""
    base, ours = (TensorsCheckpoint({"embed_out.weight": randn(9, 6, seed=seed), "x.q.weight": randn(6, 6, seed=seed)}) for seed in (1, 2))
    extract_lora(ours, base, tmp_path / "lora", energy=1.0)
    adapter = open_adapter(tmp_path / "lora")
    assert list(adapter.updates) == adapter.config.raw["target_modules"] == ["lm_head", "x.q"]
    torch.testing.assert_close(rebuilt(base, tmp_path / "lora").tensor("embed_out.weight"), ours.tensor("embed_out.weight"))


@pytest.mark.parametrize("equal", [False, True])
def test_classifiers_are_saved_whole_as_peft_expects_it(tmp_path: Path, equal: bool) -> None:
    config = {"architectures": ["BertForSequenceClassification"]}
    base = TensorsCheckpoint({"score.weight": randn(3, 6), "x.q.weight": randn(6, 6)}, config)
    ours = like(base, x__q__weight=randn(6, 6, seed=1), **({} if equal else {"score__weight": randn(3, 6, seed=2)}))
    found = extract_lora(ours, base, tmp_path / "out", energy=1.0)
    assert kinds(found) == {"score.weight": "saved", "x.q.weight": "lora"}
    adapter = open_adapter(tmp_path / "out")
    assert (adapter.config.modules_to_save, adapter.config.raw["task_type"]) == (("score",), "SEQ_CLS")
    assert torch.equal(rebuilt(base, tmp_path / "out").tensor("score.weight"), ours.tensor("score.weight"))


# -- runs -------------------------------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ours, base = model(1), model(0)
    expected = extract_lora(ours, base, tmp_path / "whole", max_rank=3)
    steps: list[tuple[int, int]] = []

    def die(done: int, total: int) -> None:
        steps.append((done, total))
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_lora(ours, base, tmp_path / "out", max_rank=3, progress=die)
    assert [name for name in names_in(tmp_path) if name.startswith(".out")]
    assert not (tmp_path / "out").exists()
    later: list[tuple[int, int]] = []
    found = extract_lora(ours, base, tmp_path / "out", max_rank=3, workers=2, progress=lambda done, total: later.append((done, total)))
    assert (found.resumed, expected.resumed) == (3, 0)
    assert later[0] == steps[3]
    assert later[-1][0] == later[-1][1] == 4 * 48 + 54
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert names_in(tmp_path) == ["out", "whole"]
    assert found.tensors == expected.tensors


def test_other_limits_start_afresh(tmp_path: Path) -> None:
    ours, base = model(1), model(0)

    def die(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_lora(ours, base, tmp_path / "out", max_rank=3, progress=die)
    assert extract_lora(ours, base, tmp_path / "out", max_rank=2).resumed == 0


def test_faults_leave_nothing(tmp_path: Path) -> None:
    base = model(0)
    broken = randn(8, 6)
    broken[3, 3] = float("nan")
    with pytest.raises(MergeError, match=r"the difference of 'model\.layers\.0\.q\.weight' holds NaN or infinity"):
        extract_lora(like(base, model__layers__0__q__weight=broken), base, tmp_path / "out")
    with pytest.raises(MergeError, match=r"the factors of 'model\.layers\.0\.q\.weight' do not fit torch\.float16\. Store float32\."):
        extract_lora(like(base, model__layers__0__q__weight=1e12 * randn(8, 6)), base, tmp_path / "out", dtype="float16")
    for options, reason in (
        ({"max_rank": 0}, "the rank is 0"), ({"energy": 0.0}, "the energy is"), ({"energy": 1.1}, "the energy is"),
        ({"sv_epsilon": -1.0}, "the threshold for singular values is"), ({"dtype": "int8"}, "dtype is 'int8'; allowed are float32"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            extract_lora(model(1), base, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert names_in(tmp_path) == []


def test_neither_model_nor_base_is_written_to(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "ours")):
        whole = model(seed)
        write_single(tmp_path / name, {one: whole.tensor(one) for one in whole.names()}, config=CONFIG)
    ours, base = SafetensorsCheckpoint(tmp_path / "ours"), SafetensorsCheckpoint(tmp_path / "base", "org/base")
    before = contents(tmp_path)
    for place in ("ours", "base", "base/in"):
        with pytest.raises(UserError, match="which is read here"):
            extract_lora(ours, base, tmp_path / place, overwrite=True)
    assert contents(tmp_path) == before
    extract_lora(ours, base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
