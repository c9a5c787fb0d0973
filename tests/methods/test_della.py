from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods import reference
from tests.methods.merging import Tensor, merge, randn, seeds
from tests.methods.test_dare_ties import Given

#: shapes, and how the tensor is cut into rows for `rows: flat` and `rows: axis1`
SHAPES = [(), (1,), (17,), (6, 1), (5, 23), (4, 3, 7), (3, 2, 5, 2)]


def rows_of(values: np.ndarray, rows: str) -> np.ndarray:
    """A view-like rearrangement [rows, c] of any tensor."""
    if values.ndim < 2:
        return values.reshape(1, -1)
    if rows == "flat":
        return values.reshape(len(values), -1)
    return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])


def back(values: np.ndarray, shape: tuple[int, ...], rows: str) -> np.ndarray:
    if len(shape) < 2 or rows == "flat":
        return values.reshape(shape)
    turned = [size for axis, size in enumerate(shape) if axis != 1] + [shape[1]]
    return np.moveaxis(values.reshape(turned), -1, 1)


@pytest.mark.parametrize("rows", ["flat", "axis1"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
@given(st.sampled_from(SHAPES), seeds, st.floats(0.2, 0.8), st.floats(0, 0.19), st.booleans(), st.sampled_from(["length", "inverse", "no"]))
def test_is_the_published_pipeline_for_given_numbers(
    method: str, rows: str, shape: tuple[int, ...], seed: int, density: float, epsilon: float, normalize: bool, by: str
) -> None:
    base, *models = (randn(*shape, seed=seed + number) for number in range(3))
    uniform = [torch.rand(base.numel(), generator=torch.Generator().manual_seed(seed + i)) for i in range(2)]
    weight = [0.5, 1.5]
    found = merge(
        method, models, base, {"weight": weight, "density": [density] * 2, "epsilon": [epsilon] * 2},
        options={"uniform_source": Given(*uniform)}, normalize=normalize, rows=rows, lambda_=0.7, rescale=by != "no",
        rescale_by="length" if by == "no" else by,
    )  # fmt: skip
    pruned = []
    for model, numbers in zip(models, uniform, strict=True):
        delta = (model - base).numpy().astype(np.float64)
        p = back(np.array([reference.chances(row, density, epsilon) for row in rows_of(delta, rows)]), shape, rows)
        kept = np.where(numbers.numpy().reshape(shape) < p.astype(np.float32), delta, 0.0)
        pruned.append(kept / p if by == "inverse" else reference.restored(delta, kept) if by == "length" else kept)
    combine = reference.elect if method == "della" else reference.total
    expected = combine(base.numpy().astype(np.float64), pruned, weight, normalize, 0.7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=5e-5)


def test_equal_magnitudes_rank_by_index() -> None:
    delta = torch.tensor([[2.0, -1.0, 1.0, 2.0, 0.5]])
    # ranks 3 1 2 4 0, so the probabilities are .65 .45 .55 .75 .35 in the order of the entries
    for numbers, expected in [([0.6] * 5, [2, 0, 0, 2, 0]), ([0.5] * 5, [2, 0, 1, 2, 0]), ([0.4] * 5, [2, -1, 1, 2, 0])]:
        found = merge(
            "della", [delta], torch.zeros(1, 5), {"weight": [1.0], "density": [0.55], "epsilon": [0.2]},
            options={"uniform_source": Given(torch.tensor(numbers))}, rescale=False,
        )  # fmt: skip
        assert found.tolist() == [expected]


def over_seeds(delta: Tensor, density: float, epsilon: float, count: int, **shared: str | bool) -> Tensor:
    each = {"weight": [1.0], "density": [density], "epsilon": [epsilon]}
    zeros = torch.zeros_like(delta)
    return torch.stack([merge("della_linear", [delta], zeros, each, options={"seed": seed}, **shared) for seed in range(count)])


def test_large_entries_stay_more_often_and_the_density_is_the_mean() -> None:
    count, c, density, epsilon = 300, 40, 0.5, 0.3
    delta = randn(5, c, seed=3)
    stayed = (over_seeds(delta, density, epsilon, count, rescale=False) != 0).double().mean(0)
    order = delta.abs().argsort(dim=1)
    by_rank = stayed.gather(1, order).mean(0)  # [c], five rows together
    p = density - epsilon + 2 * epsilon * torch.arange(c).double() / (c - 1)
    deciles, expected = by_rank.view(10, -1).mean(1), p.view(10, -1).mean(1)
    assert bool(((deciles - expected).abs() < 4 * math.sqrt(0.25 / (count * 5 * c / 10))).all())
    assert float(stayed.mean()) == pytest.approx(density, abs=4 * math.sqrt(0.25 / (count * 5 * c)))


def test_divided_by_its_probability_the_mean_over_seeds_is_the_task_vector() -> None:
    delta = randn(2, 30, seed=5)
    results = over_seeds(delta, 0.5, 0.2, 400, rescale_by="inverse").double()
    p = torch.from_numpy(np.array([reference.chances(row, 0.5, 0.2) for row in delta.numpy().astype(np.float64)]))
    error = 4 * delta.abs().double() * ((1 - p) / p / 400).sqrt()
    assert bool(((results.mean(0) - delta).abs() <= error + 1e-6).double().mean() > 0.98)
    survivors = results[0] != 0
    torch.testing.assert_close(results[0][survivors], (delta.double() / p)[survivors], rtol=1e-5, atol=0)


def test_no_window_is_dare() -> None:
    base, models = randn(6, 9, seed=1), [randn(6, 9, seed=number) for number in (2, 3)]
    each = {"weight": [1.0, 0.5], "density": [0.6, 0.4]}
    found = merge("della_linear", models, base, {**each, "epsilon": [0.0, 0.0]})
    torch.testing.assert_close(found, merge("dare_linear", models, base, each))


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_probabilities_outside_their_range_name_model_and_numbers(method: str) -> None:
    each = [{"density": 0.9}, {"density": 0.5, "epsilon": 0.45}, {"density": 0.1, "epsilon": 0.1}, {"density": 1.0, "epsilon": 0.3}]
    _, faults = get(method).resolve({"weight": 1.0}, each, ["a", "b", "c", "d"])
    assert len(faults) == 2
    assert "model a: density 0.9 and epsilon 0.15 make probabilities from 0.75 to 1.05, allowed is (0, 1)" in faults[0]
    assert "model c: density 0.1 and epsilon 0.1 make probabilities from 0 to 0.2" in faults[1]


def test_recipes_of_mergekit_rank_along_the_second_axis() -> None:
    assert get("della").mergekit == {"rows": "axis1"}


def test_long_rows_and_many_rows_rank_exactly() -> None:
    """More than are sorted at once, rows longer and shorter than that."""
    for shape in [(3, 70_000), (9000, 20)]:
        delta = (randn(*shape, seed=4) * 4).round() / 4  # many ties
        numbers = torch.rand(delta.numel(), generator=torch.Generator().manual_seed(1))
        found = merge(
            "della", [delta], torch.zeros(shape), {"weight": [1.0], "density": [0.5], "epsilon": [0.3]},
            options={"uniform_source": Given(numbers)}, rescale=False,
        )  # fmt: skip
        p = np.array([reference.chances(row, 0.5, 0.3) for row in delta.numpy().astype(np.float64)])
        expected = np.where(numbers.numpy().reshape(shape) < p.astype(np.float32), delta.numpy(), 0)
        assert np.array_equal(found.numpy(), expected)
