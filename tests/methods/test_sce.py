from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods.merging import Tensor, family, merge, randn, seeds


def expected(base: Tensor, models: list[Tensor], topk: float, floor: float, scope: str = "delta") -> Tensor:
    """The definition, with a full sort."""
    deltas = np.stack([(model - base).double().numpy().ravel() for model in models])
    kept = np.ones(deltas.shape[1], bool)
    variance = deltas.var(axis=0).astype(np.float32)
    varying = int((variance > 1e-12).sum())
    if topk < 1 and varying:
        kept[:] = False
        kept[np.argsort(-variance, kind="stable")[: max(1, math.floor(topk * varying))]] = True
    masked = deltas * kept
    energy = (masked**2).mean(axis=1)
    weight = energy / energy.sum() if energy.sum() > floor else np.full(len(models), 1 / len(models))
    used = masked if scope == "delta" else deltas
    sign = np.where(used.sum(axis=0) < 0, -1, 1)
    agree = (np.sign(used) == sign) * weight[:, None]
    result = (agree * used).sum(axis=0) / np.maximum(agree.sum(axis=0), max(floor, 1e-30))
    return base + torch.from_numpy(result).float().view(base.shape)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 90), seeds, st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 1e-6, 1.0]))
def test_is_the_formula(n: int, length: int, seed: int, topk: float, floor: float) -> None:
    base, models = family(length, seed, n)
    models = [base + (1 + i) * (model - base) for i, model in enumerate(models)]
    found = merge("sce", models, base, select_topk=topk, energy_floor=floor)
    torch.testing.assert_close(found, expected(base, models, topk, floor), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(20, 90), seeds)
def test_the_selection_may_decide_the_weights_only(n: int, length: int, seed: int) -> None:
    base, models = family(length, seed, n)
    found = merge("sce", models, base, select_topk=0.3, select_scope="coefficients")
    torch.testing.assert_close(found, expected(base, models, 0.3, 0.0, "coefficients"), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([0.2, 1.0]), st.floats(1e-6, 1e3))
def test_knows_no_order_and_no_scale(seed: int, topk: float, scale: float) -> None:
    _, models = family(80, seed)
    base = torch.zeros(80)
    found = merge("sce", models, base, select_topk=topk)
    torch.testing.assert_close(merge("sce", models[::-1], base, select_topk=topk), found, rtol=1e-4, atol=1e-5)
    scaled = merge("sce", [scale * model for model in models], base, select_topk=topk)
    torch.testing.assert_close(scaled, scale * found, rtol=1e-4, atol=1e-5 * scale)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([0.2, 1.0]))
def test_lies_between_the_base_and_what_agrees(seed: int, topk: float) -> None:
    _, models = family(80, seed)
    found = merge("sce", models, torch.zeros(80), select_topk=topk)
    assert bool((found.abs() <= torch.stack(models).abs().amax(0) * (1 + 1e-6)).all())


@pytest.mark.parametrize("topk", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(32,), (4, 8), ()])
def test_a_tensor_that_no_model_changed_keeps_shape_and_bits(topk: float, shape: tuple[int, ...]) -> None:
    base = randn(*shape)
    assert torch.equal(merge("sce", [base] * 3, base, select_topk=topk), base)


@pytest.mark.parametrize("n", [1, 3])
def test_where_nothing_varies_nothing_is_left_out(n: int) -> None:
    base, (model, *_) = family(80, 2)
    torch.testing.assert_close(merge("sce", [model] * n, base, select_topk=0.1), model)


def test_at_least_one_varying_position_is_kept() -> None:
    base = torch.zeros(6)
    one, two = torch.tensor([0.0, 1.0, 0, 0, 0, 0]), torch.tensor([0.0, 5.0, 3.0, 0, 0, 0])
    found = merge("sce", [one, two], base, select_topk=0.3)
    torch.testing.assert_close(found, torch.tensor([0, (1 * 1 + 25 * 5) / 26, 0, 0, 0, 0]))


def test_equal_variances_go_by_lower_index() -> None:
    found = merge("sce", [torch.ones(10), torch.zeros(10)], torch.zeros(10), select_topk=0.4)
    assert torch.equal(found, torch.tensor([1.0] * 4 + [0.0] * 6))


def test_a_fraction_of_a_count_is_not_lost_to_binary_numbers() -> None:
    """0.29 * 100 is 28.999999999999996."""
    base = torch.zeros(100)
    found = merge("sce", [torch.arange(1.0, 101.0), torch.zeros(100)], base, select_topk=0.29)
    assert torch.equal(found, torch.where(torch.arange(100) >= 71, torch.arange(1.0, 101.0), 0.0))


def test_the_same_selection_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(4001, 8)
    models = [model.bfloat16() for model in models]  # many ties
    whole = merge("sce", models, base.bfloat16(), select_topk=0.3)
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", 129)
    assert torch.equal(merge("sce", models, base.bfloat16(), select_topk=0.3), whole)


def test_small_task_vectors_are_weighted_by_energy_too() -> None:
    """mergekit's absolute floor makes the weights equal for changes of this size."""
    base = torch.zeros(2)
    one, two = torch.tensor([2e-4, 0.0]), torch.tensor([1e-4, 1e-4])
    weights = [4e-8 / 6e-8, 2e-8 / 6e-8]
    found = merge("sce", [one, two], base)
    torch.testing.assert_close(found, torch.tensor([weights[0] * 2e-4 + weights[1] * 1e-4, 1e-4]), rtol=1e-5, atol=0)
    assert get("sce").mergekit == {"energy_floor": 1e-6}
    equal = merge("sce", [one, two], base, energy_floor=1e-6)
    torch.testing.assert_close(equal, torch.tensor([1.5e-4, 1e-4]), rtol=1e-5, atol=0)
