from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.merging import Tensor, lengths, merge, randn, seeds


def slerp(base: Tensor, model: Tensor, t: float) -> Tensor:
    return merge("slerp", [model], base, t=t)


@given(st.integers(2, 90), seeds, st.floats(0, 1))
def test_is_the_same_from_the_other_end(length: int, seed: int, t: float) -> None:
    one, two = randn(length, seed=seed), randn(length, seed=seed + 1)
    torch.testing.assert_close(slerp(one, two, t), slerp(two, one, 1 - t), rtol=1e-4, atol=1e-5)


@given(st.integers(20, 90), seeds, st.floats(0, 1))
def test_equal_lengths_keep_their_length_on_the_arc(length: int, seed: int, t: float) -> None:
    one, two = (vector / vector.norm() for vector in (randn(length, seed=seed), randn(length, seed=seed + 1)))
    if abs(float(one @ two)) < 0.999:
        assert math.isclose(float(slerp(one, two, t).norm()), 1.0, rel_tol=1e-4)


@given(lengths, seeds)
def test_the_ends_are_the_models_bit_by_bit(length: int, seed: int) -> None:
    one, two = randn(length, seed=seed), randn(length, seed=seed + 1)
    assert torch.equal(slerp(one, two, 0.0), one)
    assert torch.equal(slerp(one, two, 1.0), two)


def test_the_formula_on_a_right_angle() -> None:
    # unequal lengths: the vectors themselves are combined, not their directions
    found = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    torch.testing.assert_close(found, torch.tensor([2 * math.sin(math.pi / 3), math.sin(math.pi / 6)]))


@given(seeds, st.floats(0.1, 0.9))
def test_arc_and_line_agree_where_one_takes_over_from_the_other(seed: int, t: float) -> None:
    one = randn(64, seed=seed)
    one /= one.norm()
    side = randn(64, seed=seed + 1)
    side -= one * (one @ side)
    side /= side.norm()
    below, above = (slerp(one, c * one + math.sqrt(1 - c * c) * side, t) for c in (0.99949, 0.99951))
    assert float((below - above).norm()) < 1e-3


def test_one_angle_for_the_whole_tensor_whatever_its_shape() -> None:
    one, two = randn(6, 8, seed=1), randn(6, 8, seed=2)
    assert torch.equal(slerp(one, two, 0.3).flatten(), slerp(one.flatten(), two.flatten(), 0.3))


def test_a_vector_without_length_or_an_opposite_one_takes_the_line() -> None:
    one = randn(16)
    torch.testing.assert_close(slerp(torch.zeros(16), one, 0.25), 0.25 * one)
    torch.testing.assert_close(slerp(one, torch.zeros(16), 0.25), 0.75 * one)
    torch.testing.assert_close(slerp(one, -one, 0.25), 0.5 * one)


def test_values_outside_the_ends_extrapolate() -> None:
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    angle = -0.5 * math.pi / 2
    torch.testing.assert_close(slerp(one, two, -0.5), torch.tensor([math.cos(angle), math.sin(angle)]))
