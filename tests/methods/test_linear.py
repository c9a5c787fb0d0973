from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods.merging import family, lengths, merge, randn, seeds, weights


@given(lengths, seeds, st.lists(weights, min_size=1, max_size=4).filter(lambda values: abs(sum(values)) > 0.1))
def test_is_the_weighted_mean(length: int, seed: int, weight: list[float]) -> None:
    models = [randn(length, seed=seed + number) for number in range(len(weight))]
    expected = sum(w * model.double() for w, model in zip(weight, models, strict=True)) / sum(weight)
    torch.testing.assert_close(merge("linear", models, each={"weight": weight}).double(), expected, rtol=1e-5, atol=1e-5)


@given(lengths, seeds, st.lists(weights, min_size=2, max_size=3))
def test_without_normalisation_it_is_the_weighted_sum(length: int, seed: int, weight: list[float]) -> None:
    models = [randn(length, seed=seed + number) for number in range(len(weight))]
    expected = sum(w * model.double() for w, model in zip(weight, models, strict=True))
    found = merge("linear", models, each={"weight": weight}, normalize=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@given(lengths, seeds, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_two_weightings_differ_along_the_line_between_the_models(length: int, seed: int, v: float, w: float) -> None:
    one, two = randn(length, seed=seed), randn(length, seed=seed + 1)
    first, second = (merge("linear", [one, two], each={"weight": [x, 1 - x]}) for x in (v, w))
    torch.testing.assert_close(first - second, (v - w) * (one - two), rtol=1e-3, atol=1e-5)


@given(lengths, seeds, st.floats(0.1, 0.9))
def test_equals_task_arithmetic_on_any_base_when_the_weights_sum_to_one(length: int, seed: int, w: float) -> None:
    base, models = family(length, seed, 2)
    weight = {"weight": [w, 1 - w]}
    torch.testing.assert_close(merge("linear", models, each=weight), merge("task_arithmetic", models, base, weight), rtol=1e-5, atol=1e-5)


def test_one_model_comes_back_bit_by_bit() -> None:
    model = randn(1000)
    assert torch.equal(merge("linear", [model], each={"weight": [0.3]}), model)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0]])
def test_weights_that_cancel_are_refused(weight: list[float]) -> None:
    _, faults = get("linear").resolve({}, [{"weight": w} for w in weight], ["a", "b"])
    assert len(faults) == 1
    assert "sum to 0" in faults[0]
    assert "normalize: false" in faults[0]
    assert get("linear").resolve({"normalize": False}, [{"weight": w} for w in weight], ["a", "b"])[1] == []
