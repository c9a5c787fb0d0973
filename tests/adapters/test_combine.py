"""Adapters combined as PEFT combines them, against the formulas written out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.adapters import MODES, combine
from modelglue.adapters.arithmetic import elected_mean, prune_at_random, prune_small
from modelglue.checkpoint import SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.adapted import open_adapted
from modelglue.checkpoint.adapter import Adapter, open_adapter
from modelglue.errors import MergeError, UserError
from tests.adapters.on_disk import PREFIX, linear, update, write_adapter
from tests.checkpoint.files import contents, randn

BASE = TensorsCheckpoint({"m.weight": randn(8, 6).double(), "n.weight": randn(5, 6).double(), "m.bias": randn(8)})
FIRST, SECOND = linear("m", 8, 6), {**linear("m", 8, 6, seed=7), **linear("n", 5, 6, seed=8)}


def opened(home: Path, *adapters: Any, **config: Any) -> list[Adapter]:
    return [open_adapter(write_adapter(home / f"a{number}", tensors, **config)) for number, tensors in enumerate(adapters)]


def change(
    home: Path, adapters: Sequence[Adapter], weights: Sequence[float] | None, mode: Any, name: str = "m", **options: Any
) -> torch.Tensor:
    """What the written combination adds to a weight."""
    out = home / "out"
    combine(adapters, weights, mode, **options).write(out, overwrite=out.exists())
    return open_adapted(BASE, [out], "base+out").tensor(f"{name}.weight") - BASE.tensor(f"{name}.weight")


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=4), st.data())
@settings(max_examples=15, deadline=None)
def test_cat_is_the_weighted_sum_and_svd_of_full_rank_too(weights: list[float], data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        found, expected = [], torch.zeros(8, 6, dtype=torch.float64)
        for number, weight in enumerate(weights):
            rank, alpha = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
            tensors = linear("m", 8, 6, rank, seed=number)
            found.append(open_adapter(write_adapter(Path(home) / f"a{number}", tensors, r=rank, lora_alpha=alpha)))
            expected += weight * alpha / rank * update(tensors, "m")
        near(change(Path(home), found, weights, "cat"), expected)
        near(change(Path(home), found, weights, "svd", svd_rank=6), expected)


def test_cat_keeps_the_ranks_and_pads_with_zeros(tmp_path: Path) -> None:
    adapters = opened(tmp_path, FIRST, SECOND, lora_alpha=8)
    made = combine(adapters, [1.0, -0.5])
    assert (made.rank, made.modules) == (8, ["m", "n"])
    A, B = made.tensors[f"{PREFIX}m.lora_A.weight"], made.tensors[f"{PREFIX}m.lora_B.weight"]
    assert torch.equal(A, torch.cat([2 * FIRST["m.lora_A.weight"], -SECOND["m.lora_A.weight"]]))
    assert torch.equal(B, torch.cat([FIRST["m.lora_B.weight"], SECOND["m.lora_B.weight"]], 1))
    assert torch.equal(made.tensors[f"{PREFIX}n.lora_A.weight"][4:], torch.zeros(4, 6))
    near(change(tmp_path, adapters, [1.0, -0.5], "cat", "n"), -1 * update(SECOND, "n"))


def test_the_config_has_scale_one(tmp_path: Path) -> None:
    """Also from rank-stabilised adapters, whose flag would make the result sqrt(rank) times too large."""
    adapters = opened(
        tmp_path, FIRST, SECOND, use_rslora=True, lora_alpha=6, alpha_pattern={"n": 3}, task_type="CAUSAL_LM", base_model_name_or_path="o/b"
    )
    expected = 3 * update(FIRST, "m") + 3 * update(SECOND, "m")
    near(change(tmp_path, adapters, None, "cat"), expected)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")} == {
        "r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    }  # fmt: skip
    assert (config["target_modules"], config["task_type"], config["base_model_name_or_path"]) == (["m", "n"], "CAUSAL_LM", "o/b")


def test_linear_works_on_the_factors(tmp_path: Path) -> None:
    adapters = opened(tmp_path, FIRST, linear("m", 8, 6, seed=7), lora_alpha=8)
    A = [tensors["m.lora_A.weight"] for tensors in (FIRST, SECOND)]
    B = [tensors["m.lora_B.weight"] for tensors in (FIRST, SECOND)]
    root = [(2 * 0.5) ** 0.5, (2 * 0.25) ** 0.5]
    expected = (root[0] * B[0] + root[1] * B[1]) @ (root[0] * A[0] - root[1] * A[1])
    near(change(tmp_path, adapters, [0.5, -0.25], "linear"), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [1.0, 0.5, -0.5])
def test_one_adapter_alone_is_scaled(tmp_path: Path, mode: Any, weight: float) -> None:
    density = {} if mode in ("cat", "linear", "svd") else {"density": 1.0}
    near(change(tmp_path, opened(tmp_path, FIRST, lora_alpha=8), [weight], mode, **density), 2 * weight * update(FIRST, "m"))


@pytest.mark.parametrize("mode", ["magnitude_prune_svd", "dare_linear_svd"])
def test_svd_modes_work_on_whole_updates(tmp_path: Path, mode: Any) -> None:
    adapters = opened(tmp_path, FIRST, SECOND, lora_alpha=8)
    deltas = [2 * update(tensors, "m").float() for tensors in (FIRST, SECOND)]
    near(change(tmp_path, adapters, [1.0, 0.5], mode, density=1.0, svd_rank=6), deltas[0] + 0.5 * deltas[1])
    found = change(tmp_path, adapters, [1.0, 0.5], mode, density=0.5, svd_rank=2, seed=3)
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 2
    if mode == "magnitude_prune_svd":
        pruned = [prune_small(delta, 0.5) for delta in deltas]
        U, s, Vh = torch.linalg.svd((pruned[0] + 0.5 * pruned[1]).double())
        near(found, U[:, :2] * s[:2] @ Vh[:2])


def test_the_clamp_is_a_quantile_of_both_factors(tmp_path: Path) -> None:
    adapters = opened(tmp_path, FIRST, SECOND)
    free, clamped = (combine(adapters, None, "svd", svd_rank=3, svd_clamp=clamp) for clamp in (1.0, 0.8))
    for side in ("m.lora_A.weight", "m.lora_B.weight"):
        entries = torch.cat([free.tensors[f"{PREFIX}m.lora_{one}.weight"].flatten() for one in "AB"])
        high = float(torch.quantile(entries, 0.8))
        torch.testing.assert_close(clamped.tensors[PREFIX + side], free.tensors[PREFIX + side].clamp(-high, high))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_pruning_keeps_an_exact_number_even_of_equal_values(values: list[int], density: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float32) + 0.5
    kept = prune_small(tensor, density)
    count = len(values) if density >= 1 else int(density * len(values))
    assert int((kept != 0).sum()) == count
    assert torch.equal(kept[kept != 0], tensor[kept != 0])
    assert not count or tensor[kept != 0].abs().min() >= tensor[kept == 0].abs().max().nan_to_num(0) if (kept == 0).any() else True


def test_the_majority_elects_by_sum_or_by_number() -> None:
    tensors = [torch.tensor([1.0, 3.0, -1.0]), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([-3.0, -1.0, 0.0])]
    weights = [1.0, 2.0, 4.0]
    assert elected_mean(tensors, weights, "total").tolist() == [-12.0, 3.0, 2.0]  # a tie elects +
    assert elected_mean(tensors, weights, "frequency").tolist() == [1.5, -3.0, 2.0]
    assert prune_at_random(tensors[0], 0.5, torch.tensor([0.4, 0.5, 0.1])).tolist() == [2.0, 0.0, -2.0]


def test_random_modes_are_a_function_of_the_seed(tmp_path: Path) -> None:
    adapters = opened(tmp_path, FIRST, SECOND)
    found = [combine(adapters, None, "dare_ties", density=0.5, seed=seed).tensors[f"{PREFIX}m.lora_A.weight"] for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    # an adapter's numbers depend on its place and on the module, not on what else there is
    alone = combine([adapters[0], adapters[1]], [1.0, 0.0], "dare_linear", density=0.5, seed=1)
    more = combine(opened(tmp_path / "x", FIRST, {**SECOND, **linear("a", 3, 3)}), [1.0, 0.0], "dare_linear", density=0.5, seed=1)
    assert torch.equal(alone.tensors[f"{PREFIX}m.lora_A.weight"], more.tensors[f"{PREFIX}m.lora_A.weight"])


def test_biases_and_what_one_adapter_replaces_come_along(tmp_path: Path) -> None:
    bias, head, rows = randn(8, seed=3), randn(2, 3, seed=4), randn(1, 6, seed=5)
    first = {**FIRST, "m.lora_B.bias": bias, "score.weight": head, "e.token_adapter.trainable_tokens_delta": rows}
    config = {"modules_to_save": ["score"], "lora_bias": True, "trainable_token_indices": {"e": [2]}, "lora_alpha": 8}
    adapters = [open_adapter(write_adapter(tmp_path / "a", first, **config)), open_adapter(write_adapter(tmp_path / "b", SECOND))]
    made = combine(adapters, [0.5, 1.0])
    assert torch.equal(made.tensors[f"{PREFIX}score.weight"], head)
    assert torch.equal(made.tensors[f"{PREFIX}e.token_adapter.trainable_tokens_delta"], rows)
    assert torch.equal(made.tensors[f"{PREFIX}m.lora_B.bias"], bias)
    assert (made.config["modules_to_save"], made.config["lora_bias"], made.config["trainable_token_indices"]) == (
        ["score"],
        True,
        {"e": [2]},
    )
    assert made.warnings == ["'score.weight' is taken over whole; weights apply to low-rank updates only."]
    other = open_adapter(write_adapter(tmp_path / "c", {**FIRST, "score.weight": head + 1}, modules_to_save=["score"]))
    with pytest.raises(MergeError, match=r"c: replaces 'score\.weight', and so does another adapter, by other values"):
        combine([adapters[0], other])
    same = open_adapter(write_adapter(tmp_path / "d", {**FIRST, "score.weight": head}, modules_to_save=["score"]))
    assert torch.equal(combine([adapters[0], same]).tensors[f"{PREFIX}score.weight"], head)


def test_embeddings_and_their_saved_base(tmp_path: Path) -> None:
    table = randn(9, 5, seed=1)
    tensors = [
        {"e.base_layer.weight": table, "e.lora_embedding_A": randn(4, 9, seed=seed), "e.lora_embedding_B": randn(5, 4, seed=seed + 1)}
        for seed in (2, 4)
    ]
    combine(opened(tmp_path, *tensors), [1.0, 0.5]).write(tmp_path / "out")
    found = open_adapted(TensorsCheckpoint({"e.weight": table.double()}), [tmp_path / "out"], "base+out").tensor("e.weight")
    added = [one["e.lora_embedding_B"] @ one["e.lora_embedding_A"] for one in tensors]
    near(found, table + added[0].T + 0.5 * added[1].T)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "linar"}, r"mode is 'linar'; allowed are cat, .* Did you mean 'linear'"),
        ({"weights": [1.0]}, "there are 1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "a weight is nan; allowed are finite numbers"),
        ({"mode": "ties"}, "mode ties needs a density"),
        ({"density": 0.5}, "mode cat prunes nothing"),
        ({"mode": "ties", "density": 0.0}, r"density is 0\.0; allowed is a number above 0, up to 1"),
        ({"svd_rank": 3}, "mode cat decomposes nothing"),
        ({"mode": "svd", "svd_rank": 0}, "the rank is 0; allowed is a whole number from 1"),
        ({"mode": "svd", "svd_clamp": 1.5}, r"the clamp is 1\.5; allowed is a quantile"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        combine(opened(tmp_path, FIRST, SECOND), **options)


def test_what_cannot_be_combined(tmp_path: Path) -> None:
    (plain,) = opened(tmp_path, FIRST)
    dora = open_adapter(write_adapter(tmp_path / "dora", {**FIRST, "m.lora_magnitude_vector": torch.ones(8)}, use_dora=True))
    experts = open_adapter(write_adapter(tmp_path / "experts", FIRST, target_parameters=["m.up"]))
    turned = open_adapter(write_adapter(tmp_path / "turned", FIRST, fan_in_fan_out=True))
    with pytest.raises(MergeError) as caught:
        combine([plain, dora, experts, turned])
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == ["dora", "experts", "turned"]
    small = open_adapter(write_adapter(tmp_path / "small", linear("m", 8, 6, 2), r=2))
    with pytest.raises(MergeError, match=r"linear: the adapters have different ranks \(.*a0 has 4, .*small has 2\)\. Use cat or svd\."):
        combine([plain, small], None, "linear")
    other = open_adapter(write_adapter(tmp_path / "other", linear("m", 8, 5)))
    with pytest.raises(MergeError, match="the updates of 'm' have different shapes"):
        combine([plain, other])
    with pytest.raises(UserError, match="there is no adapter to combine"):
        combine([])
    wrong = open_adapter(write_adapter(tmp_path / "wrong", linear("m", 8, 6, 3)))
    with pytest.raises(MergeError, match=r"wrong: 'm' has rank 3, the config gives it 4\."):
        combine([plain, wrong], None, "cat")
    whole = open_adapter(write_adapter(tmp_path / "whole", {"m.weight": randn(8, 6)}, modules_to_save=["m"]))
    for adapters in ([plain, whole], [whole, plain]):
        with pytest.raises(MergeError, match=r"whole: replaces 'm\.weight', which .*a0 updates; these cannot be combined"):
            combine(adapters)


@pytest.mark.parametrize("mode", ["cat", "svd", "magnitude_prune_svd"])
def test_sums_that_do_not_fit_are_told(tmp_path: Path, mode: Any) -> None:
    adapters = opened(tmp_path, {name: 1e30 * values for name, values in FIRST.items()}, SECOND)
    with pytest.raises(MergeError, match=r"the combined update of 'm' does not fit float(16|32)\."):
        combine(adapters, None, mode, density=0.5 if mode == "magnitude_prune_svd" else None, dtype="F16")


def test_equal_adapters_give_equal_bytes_and_inputs_are_safe(tmp_path: Path) -> None:
    adapters = opened(tmp_path, FIRST, SECOND)
    for name in ("x", "y"):
        assert combine(adapters, [1.0, 0.5], "svd", svd_rank=3).write(tmp_path / name) > 0
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert sorted(contents(tmp_path / "x")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert SafetensorsCheckpoint(tmp_path / "x" / "adapter_model.safetensors").info(f"{PREFIX}m.lora_A.weight").shape == (3, 6)
    before = contents(tmp_path)
    for place, reason in (("a0", "is the model"), ("a0/in", "lies in the model"), ("x", "exists already")):
        with pytest.raises(UserError, match=reason):
            combine(adapters).write(tmp_path / place)
    assert contents(tmp_path) == before
    combine(adapters).write(tmp_path / "x", overwrite=True)
    assert open_adapter(tmp_path / "x").config.r == 8
