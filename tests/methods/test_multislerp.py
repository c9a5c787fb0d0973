from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import MergeError
from modelglue.methods import get
from tests.methods.merging import Tensor, family, merge, randn, seeds


def with_tangent_step(vectors: list[Tensor], weight: list[float]) -> Tensor:
    """The definition as published: one tangent-space step at the normalised mean."""
    flat = [vector.double().flatten() for vector in vectors]
    units = [vector / vector.norm() for vector in flat]
    mean = sum(w * u for w, u in zip(weight, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weight, units, strict=True))
    length = float(tangent.norm()) + 1e-8
    found = (math.cos(length) * mean + math.sin(length) / length * tangent) * sum(
        w * float(f.norm()) for w, f in zip(weight, flat, strict=True)
    )
    return found.view(vectors[0].shape).float()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(8, 90), seeds, st.booleans(), st.booleans())
def test_is_the_formula_with_its_tangent_step(n: int, length: int, seed: int, normalize: bool, with_base: bool) -> None:
    base, _ = family(length, seed)
    vectors = [randn(length, seed=seed + 9 + i) + 0.5 for i in range(n)]
    weight = [0.3 + 0.4 * i for i in range(n)]
    shares = [w / sum(weight) for w in weight] if normalize else weight
    if with_base:
        found = merge("multislerp", [base + v for v in vectors], base, {"weight": weight}, normalize_weights=normalize)
        torch.testing.assert_close(found, base + with_tangent_step(vectors, shares), rtol=1e-4, atol=1e-4)
    else:
        found = merge("multislerp", vectors, None, {"weight": weight}, normalize_weights=normalize)
        torch.testing.assert_close(found, with_tangent_step(vectors, shares), rtol=1e-4, atol=1e-5)


def test_equal_models_come_back() -> None:
    base, (model, *_) = family(60, 3)
    for given_base in (None, base):
        torch.testing.assert_close(merge("multislerp", [model] * 3, given_base, {"weight": [1.0, 0.2, 3.0]}), model)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 60), seeds)
def test_two_models_of_equal_length_meet_in_the_middle_of_the_arc(length: int, seed: int) -> None:
    one, two = (v / v.norm() for v in (randn(length, seed=seed), randn(length, seed=seed + 1)))
    if abs(float(one @ two)) < 0.99:
        found = merge("multislerp", [one, two], None, {"weight": [0.5, 0.5]})
        torch.testing.assert_close(found, merge("slerp", [two], one, t=0.5), rtol=1e-4, atol=1e-6)


def test_one_model_is_returned_bit_by_bit() -> None:
    base, (model, *_) = family(60, 3)
    assert torch.equal(merge("multislerp", [model], base, {"weight": [0.3]}, normalize_weights=False), model)


def test_tiny_task_vectors_are_not_shrunk() -> None:
    """Adding eps to a length of its own size would halve them."""
    delta = randn(40)
    delta *= 2e-8 / delta.norm()
    found = merge("multislerp", [delta, delta], torch.zeros(40), {"weight": [1.0, 1.0]})
    torch.testing.assert_close(found, delta, rtol=1e-5, atol=0)


def test_a_tensor_that_no_model_changed_stays() -> None:
    base = randn(5, 8)
    assert torch.equal(merge("multislerp", [base] * 3, base, {"weight": [1.0, 2.0, 3.0]}), base)


def test_a_model_that_did_not_move_lowers_the_mean_length_only() -> None:
    delta = randn(30)
    found = merge("multislerp", [delta, torch.zeros(30)], torch.zeros(30), {"weight": [1.0, 3.0]})
    torch.testing.assert_close(found, 0.25 * delta)


def test_opposite_directions() -> None:
    one = randn(30)
    torch.testing.assert_close(merge("multislerp", [one, -one], None, {"weight": [0.5, 0.5]}), torch.zeros(30))
    with pytest.raises(MergeError, match=r"multislerp: tensor 't': the weighted directions of the models cancel .* Change the weights\."):
        merge("multislerp", [one, -one, 3 * one, -2 * one], None, {"weight": [1.0, 1.0, 1.0, 1.0]})


def test_weights_that_sum_to_zero_are_refused_by_name() -> None:
    each = [{"weight": 1.0}, {"weight": -1.0}]
    _, faults = get("multislerp").resolve({}, each, ["a", "b"])
    assert faults == ["the weights sum to 0, so they cannot be normalised; change them or set normalize_weights: false"]
    assert get("multislerp").resolve({"normalize_weights": False}, each, ["a", "b"])[1] == []
