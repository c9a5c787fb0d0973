"""Model kinship: the metrics against their definitions, parts of models, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.methods import get
from modelglue.zoo.kinship import METRICS, kinship

SHAPES = {"model.layers.0.mlp.up_proj.weight": (8, 6), "model.layers.0.self_attn.q_proj.weight": (5, 6), "model.norm.weight": (6,)}


def weights(seed: int, spread: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * spread for name, shape in shapes.items()}


def changed(base: Mapping[str, torch.Tensor], change: Mapping[str, torch.Tensor], factor: float = 1.0) -> TensorsCheckpoint:
    return TensorsCheckpoint({name: base[name] + factor * change[name] for name in base})


def flat(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


BASE = weights(0)
CHANGES = [{name: value + 0.5 * weights(9)[name] for name, value in weights(seed, 0.3).items()} for seed in (1, 2, 3)]
MODELS = [changed(BASE, change) for change in CHANGES]
#: what the float32 models really changed
DELTAS = [flat({name: model.tensor(name).double() - BASE[name].double() for name in BASE}) for model in MODELS]


def test_metrics_are_what_their_names_say() -> None:
    found = kinship(TensorsCheckpoint(BASE), MODELS)
    a, b = DELTAS[0], DELTAS[2]
    assert found.matrix("pcc")[0, 2] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert found.matrix("cs")[0, 2] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert found.matrix("ed")[0, 2] == pytest.approx(np.linalg.norm(a - b), abs=1e-12)
    assert found.warnings == ()


def test_mean_over_pairs() -> None:
    found = kinship(TensorsCheckpoint(BASE), MODELS)
    pairs = [np.corrcoef(DELTAS[i], DELTAS[j])[0, 1] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.mean() == pytest.approx(np.mean(pairs), abs=1e-12)
    with pytest.raises(UserError, match="two models or more"):
        kinship(TensorsCheckpoint(BASE), MODELS[:1]).mean()


def test_per_tensor_means_count_elements_and_leave_out_tensors_without_a_value() -> None:
    found = kinship(TensorsCheckpoint(BASE), MODELS)
    expected, count = 0.0, 0
    for name in BASE:
        a, b = (flat({name: MODELS[i].tensor(name).double() - BASE[name].double()}) for i in (0, 1))
        expected += np.corrcoef(a, b)[0, 1] * a.size
        count += a.size
        assert found.of_tensors("pcc")[name][0, 1] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert found.by_tensor("pcc")[0, 1] == pytest.approx(expected / count, abs=1e-12)
    frozen = dict(CHANGES[0], **{"model.norm.weight": torch.zeros(6)})
    less = kinship(TensorsCheckpoint(BASE), [changed(BASE, frozen), MODELS[1]])
    alone = kinship(TensorsCheckpoint(BASE), MODELS[:2])
    assert np.isnan(less.of_tensors()["model.norm.weight"][0, 1])
    assert less.by_tensor()[0, 1] == pytest.approx(alone.by_tensor(part="layers")[0, 1], abs=1e-12)


def test_parts_of_models() -> None:
    found = kinship(TensorsCheckpoint(BASE), MODELS)
    only = {"model.layers.0.self_attn.q_proj.weight"}
    part = kinship(
        TensorsCheckpoint({name: BASE[name] for name in only}),
        [TensorsCheckpoint({name: model.tensor(name) for name in only}) for model in MODELS],
    )
    for metric in METRICS:
        np.testing.assert_array_equal(found.matrix(metric, part="self_attn"), part.matrix(metric))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no tensor has 'attention' in its name"):
        found.matrix(part="attention")


def test_opposite_changes_are_not_related_unless_asked() -> None:
    found = kinship(TensorsCheckpoint(BASE), [changed(BASE, CHANGES[0]), changed(BASE, CHANGES[0], -1.0)])
    assert found.matrix("cs")[0, 1] == pytest.approx(-1, abs=1e-6)
    assert found.matrix("cs", absolute=True)[0, 1] == pytest.approx(1, abs=1e-6)
    assert found.by_tensor("pcc", absolute=True)[0, 1] == pytest.approx(1, abs=1e-6)
    assert found.mean("pcc") == pytest.approx(-1, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.25, 4), st.sampled_from(["pcc", "cs"]))
def test_kinship_is_symmetric_one_with_itself_and_blind_to_scale(seed: int, factor: float, metric: str) -> None:
    base = {name: value.double() for name, value in weights(seed).items()}
    one, other = ({name: value.double() for name, value in weights(seed + step, 0.1).items()} for step in (1, 2))
    models = [changed(base, one), changed(base, other), changed(base, one), changed(base, other, factor)]
    found = kinship(TensorsCheckpoint(base), models)
    values = found.matrix(metric)  # type: ignore[arg-type]
    np.testing.assert_array_equal(values, values.T)
    np.testing.assert_allclose(np.diag(values), 1, atol=1e-12)
    assert values[0, 2] == pytest.approx(1, abs=1e-12)
    assert values[0, 3] == pytest.approx(values[0, 1], abs=1e-9)
    assert found.matrix("ed")[0, 2] == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_a_linear_merge_is_closer_kin_to_each_parent_than_they_are(seed: int, share: float) -> None:
    base = {name: value.double() for name, value in weights(seed).items()}
    parents = [changed(base, {name: value.double() for name, value in weights(seed + step, 0.1).items()}) for step in (1, 2)]
    merge = MergedCheckpoint(get("linear"), parents, None, {"weight": [share, 1 - share], "normalize": True})
    values = kinship(TensorsCheckpoint(base), [*parents, merge]).matrix("cs")
    assert min(values[0, 2], values[1, 2]) >= values[0, 1] - 1e-6


def test_low_precision_rounds_to_steps_of_the_largest_change() -> None:
    found = kinship(TensorsCheckpoint(BASE), MODELS[:2], low_precision=True)
    a, b = (np.round(delta / (np.abs(delta).max() / 127)) for delta in DELTAS[:2])
    assert found.matrix("ed")[0, 1] == pytest.approx(np.linalg.norm(a - b), abs=1e-9)
    assert found.matrix("pcc")[0, 1] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


def test_a_model_that_did_not_change_is_named() -> None:
    found = kinship(TensorsCheckpoint(BASE), [TensorsCheckpoint(BASE), MODELS[0]], labels=["lazy", "busy"])
    assert np.isnan(found.matrix("pcc")[0, 1])
    assert np.isnan(found.matrix("cs")[0, 0])
    assert np.isnan(found.by_tensor()[0, 1])
    assert found.matrix("ed")[0, 1] == pytest.approx(np.linalg.norm(DELTAS[0]))
    assert found.warnings == ("lazy: is identical to the base, so it has no kinship to anyone.",)
    assert np.isnan(kinship(TensorsCheckpoint(BASE), [TensorsCheckpoint(BASE), MODELS[0]], low_precision=True).mean("cs"))
    with pytest.raises(UserError, match="lazy: is identical"):
        found.farthest(1)


def test_a_change_by_a_constant_has_a_cosine_and_no_correlation() -> None:
    base = {name: value.double() for name, value in BASE.items()}
    shifted = TensorsCheckpoint({name: torch.full_like(value, 0.25) + value * 0 for name, value in base.items()})
    zeros = TensorsCheckpoint({name: value * 0 for name, value in base.items()})
    found = kinship(zeros, [shifted, changed(base, base, 0.0)])
    assert np.isnan(found.matrix("pcc")[0, 1])
    assert np.isfinite(found.matrix("cs")[0, 1])


def test_the_farthest_relative() -> None:
    opposite = changed(BASE, CHANGES[0], -1.0)
    found = kinship(TensorsCheckpoint(BASE), [MODELS[0], MODELS[1], opposite])
    assert (found.farthest(0), found.farthest(2), found.farthest(0, "ed")) == (2, 0, 2)


def test_extended_vocabularies_are_cut_to_the_shortest() -> None:
    long = {"embed.weight": torch.cat([BASE["model.layers.0.mlp.up_proj.weight"], torch.full((3, 6), 100.0)])}
    short = {"embed.weight": CHANGES[0]["model.layers.0.mlp.up_proj.weight"]}
    same = {"embed.weight": BASE["model.layers.0.mlp.up_proj.weight"]}
    cut = kinship(TensorsCheckpoint(same), [TensorsCheckpoint(long), TensorsCheckpoint(short)])
    assert cut.warnings[0] == "rows beyond the shortest are cut in embed.weight."
    assert cut.matrix("ed")[0, 1] == pytest.approx(float(torch.linalg.norm((same["embed.weight"] - short["embed.weight"]).double())))


def test_what_is_left_out_is_said() -> None:
    extra = TensorsCheckpoint({**BASE, "rotary.inv_freq": torch.zeros(2), "steps": torch.tensor([3])})
    also = TensorsCheckpoint({**BASE, "steps": torch.tensor([4])})
    found = kinship(TensorsCheckpoint({**BASE, "steps": torch.tensor([3])}), [extra, also])
    assert found.tensors == tuple(sorted(BASE))
    assert found.warnings[:2] == (
        "1 tensors are not in all models and left out: rotary.inv_freq.",
        "1 tensors are not stored as floating-point numbers and left out: steps.",
    )


def test_large_tensors_are_summed_in_blocks() -> None:
    shapes = {"w": (300, 300)}
    base, one, other = (weights(seed, 0.1, shapes) for seed in (1, 2, 3))
    half = {name: value.bfloat16() for name, value in other.items()}
    seen: list[tuple[int, int]] = []
    found = kinship(TensorsCheckpoint(base), [TensorsCheckpoint(one), TensorsCheckpoint(half)], progress=lambda *done: seen.append(done))
    a, b = (flat({"w": value["w"].double() - base["w"].double()}) for value in (one, half))
    assert found.matrix("pcc")[0, 1] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert seen == [(65536, 90000), (90000, 90000)]


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(value: float, low_precision: bool) -> None:
    bad = {name: tensor.clone() for name, tensor in BASE.items()}
    bad["model.norm.weight"][2] = value
    with pytest.raises(CheckpointError, match=r"^sick: tensor 'model\.norm\.weight' holds NaN or infinity"):
        kinship(TensorsCheckpoint(BASE), [MODELS[0], TensorsCheckpoint(bad)], labels=["well", "sick"], low_precision=low_precision)


def test_models_of_other_sizes_are_refused() -> None:
    wide = TensorsCheckpoint(weights(1, shapes={"model.norm.weight": (6,), "model.layers.0.mlp.up_proj.weight": (8, 7)}))
    with pytest.raises(CheckpointError, match=r"the base \[8, 6\], model 0 \[8, 7\]"):
        kinship(TensorsCheckpoint(BASE), [wide])
    with pytest.raises(CheckpointError, match="no weights in common"):
        kinship(TensorsCheckpoint(BASE), [TensorsCheckpoint({"x": torch.ones(2)})])
    with pytest.raises(UserError, match="a label for each"):
        kinship(TensorsCheckpoint(BASE), MODELS, labels=["one"])
    with pytest.raises(UserError, match="Allowed: pcc, cs, ed"):
        kinship(TensorsCheckpoint(BASE), MODELS).matrix("cosine")  # type: ignore[arg-type]
