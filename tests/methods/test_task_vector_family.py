"""What holds for all eight methods that prune task vectors, put them together and add them to the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods.merging import family, lengths, merge, randn, seeds

SUMMED = ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"]
ELECTED = ["ties", "dare_ties", "della", "breadcrumbs_ties"]
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]
FAMILY = SUMMED + ELECTED
PRUNING = [method for method in FAMILY if method != "task_arithmetic"]


def per_model(method: str, density: float) -> dict[str, list[float]]:
    each = {"weight": [1.0, 0.5, 2.0]}
    return each if method == "task_arithmetic" else {**each, "density": [density] * 3}


@pytest.mark.parametrize("method", SUMMED)
@given(lengths, seeds, st.booleans(), st.floats(-2, 2))
def test_with_nothing_dropped_and_no_election_it_is_task_arithmetic(
    method: str, length: int, seed: int, normalize: bool, scale: float
) -> None:
    base, models = family(length, seed)
    each = {"weight": [1.0, 0.5, 2.0]}
    found = merge(method, models, base, each, normalize=normalize, lambda_=scale)
    expected = merge("task_arithmetic", models, base, each, normalize=normalize, lambda_=scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", FAMILY)
@given(lengths, seeds)
def test_equal_models_come_back_when_normalised(method: str, length: int, seed: int) -> None:
    base, models = family(length, seed, 1)
    found = merge(method, models * 3, base, {"weight": [0.7] * 3}, normalize=True)
    torch.testing.assert_close(found, models[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", FAMILY)
@given(lengths, seeds, st.floats(0.3, 0.8))
def test_the_result_is_affine_in_lambda_and_the_base_at_zero(method: str, length: int, seed: int, density: float) -> None:
    base, models = family(length, seed)
    at = {scale: merge(method, models, base, per_model(method, density), lambda_=scale) for scale in (0.0, 0.5, 1.0)}
    assert torch.equal(at[0.0], base)
    torch.testing.assert_close(at[0.5] - base, (at[1.0] - base) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", FAMILY)
@given(lengths, seeds, st.floats(0.3, 0.8), st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_the_task_vectors_scales_the_result(method: str, length: int, seed: int, density: float, factor: float) -> None:
    _, models = family(length, seed)
    base = torch.zeros(length)
    each = per_model(method, density)
    assert torch.equal(merge(method, [model * factor for model in models], base, each), merge(method, models, base, each) * factor)


@pytest.mark.parametrize("method", ELECTED)
@given(lengths, seeds, st.floats(0.3, 0.8))
def test_entries_lie_between_zero_and_the_largest_that_agrees(method: str, length: int, seed: int, density: float) -> None:
    _, models = family(length, seed)
    base = torch.zeros(length)
    options: dict[str, Any] = {"normalize": True, "rescale": False}
    found = merge(method, models, base, per_model(method, density), **options)
    stacked = torch.stack(models)
    assert bool((found <= stacked.amax(0).clamp(min=0) + 1e-6).all())
    assert bool((found >= stacked.amin(0).clamp(max=0) - 1e-6).all())


@pytest.mark.parametrize("method", PRUNING)
@given(st.integers(30, 90), seeds, st.floats(0.3, 0.8))
def test_rescale_restores_the_length_of_each_vector(method: str, length: int, seed: int, density: float) -> None:
    delta = randn(length, seed=seed)
    found = merge(method, [delta], torch.zeros(length), {"weight": [1.0], "density": [density]}, rescale=True)
    assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    assert 0 < int((found == 0).sum()) < length


@pytest.mark.parametrize("method", [method for method in PRUNING if method not in RANDOM])
def test_a_share_that_keeps_nothing_is_refused(method: str) -> None:
    _, faults = get(method).resolve({"density": 0.0, "weight": 1.0}, [{}], ["a"])
    assert len(faults) == 1
    assert "density is 0, allowed is (0, 1]" in faults[0]


@pytest.mark.parametrize("method", RANDOM)
def test_what_a_survey_no_longer_remembers_is_worked_out_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = randn(40, 50, seed=1), [randn(40, 50, seed=number) for number in (2, 3, 4)]
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", 175)  # three rows of 50, chunks no multiple of 8
    remembered = merge(method, models, base, per_model(method, 0.5))
    for entries in (0, 3 * 700):
        monkeypatch.setattr("modelglue.methods._random._REMEMBERED", entries)
        assert torch.equal(merge(method, models, base, per_model(method, 0.5)), remembered)
