from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods.merging import Tensor, merge, randn, seeds

MODES = {
    "whole": {},
    "last axis": {"nuslerp_flatten": False},
    "first axis": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


def nuslerp(models: Sequence[Tensor], weight: Sequence[float], base: Tensor | None = None, mode: str = "whole") -> Tensor:
    return merge("nuslerp", models, base, {"weight": weight}, **MODES[mode])


def expected(one: Tensor, two: Tensor, t: float, mode: str) -> Tensor:
    """The definition, vector by vector."""
    a, b = (x.double().numpy() for x in (one, two))
    if mode == "whole":
        return torch.from_numpy(arc(a.ravel(), b.ravel(), t).reshape(a.shape)).float()
    axis = -1 if mode == "last axis" else 0
    a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    result = np.stack([arc(x, y, t) for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1]), strict=True)])
    return torch.from_numpy(np.moveaxis(result.reshape(a.shape), -1, axis).copy()).float()


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 1 - 1e-6:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(7,), (5, 6), (3, 4, 5), (2, 1, 3, 2), (4, 1)]),
    seeds,
    st.floats(0.05, 3),
    st.sampled_from(sorted(MODES)),
    st.booleans(),
)
def test_is_the_formula(shape: tuple[int, ...], seed: int, weight: float, mode: str, with_base: bool) -> None:
    one, two = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    t = weight / (1 + weight)
    if with_base:
        base = randn(*shape, seed=seed + 2)
        found = nuslerp([base + one, base + two], [1.0, weight], base, mode)
        torch.testing.assert_close(found, base + expected(one, two, t, mode), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(nuslerp([one, two], [1.0, weight], mode=mode), expected(one, two, t, mode), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 90), seeds, st.floats(0, 1))
def test_without_base_it_is_slerp_on_the_arc(length: int, seed: int, t: float) -> None:
    one, two = randn(length, seed=seed), randn(length, seed=seed + 1)
    cosine = float(one @ two / one.norm() / two.norm())
    if abs(cosine) < 0.999:
        torch.testing.assert_close(nuslerp([one, two], [1 - t, t]), merge("slerp", [two], one, t=t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_antiparallel_vectors_take_the_line(mode: str) -> None:
    one = randn(6, 5)
    torch.testing.assert_close(nuslerp([one, -1.5 * one], [1.0, 1.0], mode=mode), -0.25 * one)
    torch.testing.assert_close(nuslerp([one, 2 * one], [1.0, 1.0], mode=mode), 1.5 * one)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_did_not_move_leaves_a_share_of_the_other(mode: str) -> None:
    base = randn(6, 5)
    delta = 0.1 * randn(6, 5, seed=1)
    torch.testing.assert_close(nuslerp([base, base + delta], [3.0, 1.0], base, mode), base + 0.25 * delta)
    torch.testing.assert_close(nuslerp([base + delta, base], [3.0, 1.0], base, mode), base + 0.75 * delta)
    assert torch.equal(nuslerp([base, base], [3.0, 1.0], base, mode), base)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_of_nothing_gives_the_other_model_bit_by_bit(mode: str) -> None:
    one, two, base = randn(6, 5), randn(6, 5, seed=1), randn(6, 5, seed=2)
    assert torch.equal(nuslerp([one, two], [0.7, 0.0], base, mode), one)
    assert torch.equal(nuslerp([one, two], [0.0, 0.7], base, mode), two)


def test_weights_that_cancel_meet_half_way() -> None:
    one, two = randn(40), randn(40, seed=1)
    assert torch.equal(nuslerp([one, two], [0.5, -0.5]), nuslerp([one, two], [1.0, 1.0]))


def test_a_vector_is_one_vector_in_every_mode() -> None:
    one, two = randn(40), randn(40, seed=1)
    for mode in MODES:
        torch.testing.assert_close(nuslerp([one, two], [1.0, 2.0], mode=mode), nuslerp([one, two], [1.0, 2.0]))


def test_the_names_are_the_wrong_way_round() -> None:
    """row_wise means one angle for every column of a matrix."""
    one, two = randn(6, 5), randn(6, 5, seed=1)
    by_column = nuslerp([one, two], [1.0, 2.0], mode="first axis")
    torch.testing.assert_close(by_column, nuslerp([one.T, two.T], [1.0, 2.0], mode="last axis").T)
    torch.testing.assert_close(by_column[:, 3], nuslerp([one[:, 3], two[:, 3]], [1.0, 2.0]))


def test_columns_are_summed_over_many_chunks_and_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", 64)
    one, two = randn(101, 7), randn(101, 7, seed=1)
    found = nuslerp([one, two], [1.0, 2.0], mode="first axis")
    torch.testing.assert_close(found, expected(one, two, 2 / 3, "first axis"), rtol=1e-5, atol=1e-6)
    (columns,) = get("nuslerp").rounds({"nuslerp_flatten": False, "nuslerp_row_wise": True, "weight": [1.0, 2.0]})
    assert columns.fold is not None
    entries, sums = columns.fold((2, torch.ones(3, 7)), (5, torch.ones(3, 7)))
    assert entries == 7
    assert torch.equal(sums, torch.full((3, 7), 2.0))


@pytest.mark.parametrize("count", [1, 3])
def test_takes_exactly_two_models(count: int) -> None:
    _, faults = get("nuslerp").resolve({"weight": 1.0}, [{}] * count, ["a", "b", "c"][:count])
    assert faults == [f"nuslerp takes exactly 2 models besides the base, the recipe has {count}"]
