from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.merging import Tensor, merge, randn, seeds


def expected(base: Tensor, model: Tensor) -> Tensor:
    """The definition, with a full sort."""
    p, q = torch.softmax(model, -1) + 1e-8, torch.softmax(base, -1) + 1e-8
    divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    score = ((model - base).abs() * divergence).numpy()
    ordered = np.sort(score.ravel())
    low, middle, high = (float(ordered[int(a * (len(ordered) - 1))]) for a in (0.25, 0.5, 0.75))
    return torch.where(torch.from_numpy(score >= np.float32(middle + 1.5 * (high - low))), model, base)


def pair(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    base = randn(*shape, seed=seed)
    return base, base + 0.2 * randn(*shape, seed=seed + 1)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(40,), (9, 11), (5, 3, 7), (1, 30), (30, 1)]), seeds)
def test_is_the_formula(shape: tuple[int, ...], seed: int) -> None:
    base, model = pair(*shape, seed=seed)
    assert torch.equal(merge("arcee_fusion", [model], base), expected(base, model))


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_every_entry_is_the_base_or_the_model_and_few_are_swapped(seed: int) -> None:
    base, model = pair(20, 15, seed=seed)
    found = merge("arcee_fusion", [model], base)
    swapped = found != base
    assert torch.equal(found[swapped], model[swapped])
    assert 0 < int(swapped.sum()) < 75


def test_rows_across_the_chunks_of_the_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = pair(33, 50, seed=4)
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", 64)
    assert torch.equal(merge("arcee_fusion", [model], base), expected(base, model))


def test_quantiles_are_exact_where_others_sample() -> None:
    base, model = pair(1100, 1000, seed=6)
    assert torch.equal(merge("arcee_fusion", [model], base), expected(base, model))


def test_equal_models_and_equal_scores() -> None:
    base = randn(6, 5)
    assert torch.equal(merge("arcee_fusion", [base], base), base)
    # one row and equal changes: all scores are the threshold, and what reaches it is taken
    one = torch.tensor([0.0, 0.0, 1.0, 1.0])
    other = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert torch.equal(merge("arcee_fusion", [other], one), other)


def test_one_row_that_moved_is_taken_and_its_neighbours_are_not() -> None:
    base = randn(12, 8)
    model = base.clone()
    model[3, 2] += 2.0
    model[5] += 0.25  # the softmax does not see this
    assert torch.equal(merge("arcee_fusion", [model], base)[3], model[3])
    swapped = merge("arcee_fusion", [model], base + 1e-3 * randn(12, 8, seed=9))
    assert float(swapped[3, 2]) == float(model[3, 2])
