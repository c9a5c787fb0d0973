from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.merging import family, lengths, merge, randn, seeds, weights


@given(lengths, seeds, st.lists(weights, min_size=1, max_size=4), st.floats(-2, 2))
def test_adds_weighted_task_vectors(length: int, seed: int, weight: list[float], scale: float) -> None:
    base, models = family(length, seed, len(weight))
    expected = base.double()
    for w, model in zip(weight, models, strict=True):
        expected = expected + scale * w * (model.double() - base.double())
    found = merge("task_arithmetic", models, base, {"weight": weight}, lambda_=scale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@given(lengths, seeds)
def test_lambda_zero_is_the_base_bit_by_bit(length: int, seed: int) -> None:
    base, models = family(length, seed)
    base[0] = -0.0
    found = merge("task_arithmetic", models, base, {"weight": [1.0, 2.0, 3.0]}, lambda_=0.0)
    assert torch.equal(found.view(torch.int32), base.view(torch.int32))


@given(lengths, seeds, weights, weights)
def test_is_linear_in_every_weight(length: int, seed: int, v: float, w: float) -> None:
    base, models = family(length, seed, 2)
    one, two, both = (merge("task_arithmetic", models, base, {"weight": [x, 0.7]}) - base for x in (v, w, v + w))
    rest = merge("task_arithmetic", models, base, {"weight": [0.0, 0.7]}) - base
    torch.testing.assert_close(one + two - rest, both, rtol=1e-3, atol=1e-5)


def test_normalize_divides_by_the_sum_of_the_weights() -> None:
    base, models = family(50, 3, 2)
    found = merge("task_arithmetic", models, base, {"weight": [2.0, 6.0]}, normalize=True)
    torch.testing.assert_close(found, merge("task_arithmetic", models, base, {"weight": [0.25, 0.75]}))


def test_weights_that_cancel_are_not_divided_by() -> None:
    base, models = family(50, 4, 2)
    found = merge("task_arithmetic", models, base, {"weight": [1.0, -1.0]}, normalize=True)
    torch.testing.assert_close(found, base + models[0] - models[1])


def test_a_negative_weight_takes_the_task_away_again() -> None:
    base, model = randn(50), randn(50, seed=1)
    torch.testing.assert_close(merge("task_arithmetic", [model], base, {"weight": [-1.0]}), 2 * base - model)
