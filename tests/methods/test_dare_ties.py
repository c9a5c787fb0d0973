from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods import reference
from tests.methods.merging import Tensor, family, lengths, merge, randn, seeds


class Given:
    """These uniform numbers, by stream."""

    def __init__(self, *numbers: Tensor) -> None:
        self._numbers = numbers

    def numbers(self, name: str, stream: int, start: int, stop: int) -> Tensor:
        return self._numbers[stream][start:stop]

    def describe(self) -> str:
        return "given"


@given(st.integers(1, 3), lengths, seeds, st.floats(0.05, 1.0), st.booleans(), st.booleans(), st.sampled_from(["length", "inverse"]))
def test_is_the_published_pipeline_for_given_numbers(
    n: int, length: int, seed: int, density: float, normalize: bool, rescale: bool, by: str
) -> None:
    base, models = family(length, seed, n)
    uniform = [torch.rand(length, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
    weight = [0.5, 1.5, 1.0][:n]
    found = merge(
        "dare_ties", models, base, {"weight": weight, "density": [density] * n}, options={"uniform_source": Given(*uniform)},
        normalize=normalize, rescale=rescale, rescale_by=by, lambda_=0.7,
    )  # fmt: skip
    pruned = []
    for model, numbers in zip(models, uniform, strict=True):
        delta = (model - base).numpy().astype(np.float64)
        kept = np.where(numbers.numpy() < np.float32(density), delta, 0.0)
        if rescale and by == "inverse":
            kept /= density
        elif rescale and np.abs(kept).sum() >= 1e-7:
            kept *= np.abs(delta).sum() / np.abs(kept).sum()
        pruned.append(kept)
    expected = reference.elect(base.numpy().astype(np.float64), pruned, weight, normalize, 0.7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=2e-5)


def over_seeds(delta: Tensor, density: float, count: int, **shared: str) -> Tensor:
    """[count, length] results of one model on a base of zeros, one seed each."""
    each = {"weight": [1.0], "density": [density]}
    zeros = torch.zeros_like(delta)
    return torch.stack([merge("dare_ties", [delta], zeros, each, options={"seed": seed}, **shared) for seed in range(count)])


def test_the_share_that_is_kept_is_the_density() -> None:
    kept = (over_seeds(torch.ones(500), 0.3, 200) != 0).double().mean()
    assert abs(float(kept) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (500 * 200))


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    delta = randn(60, seed=5)
    results = over_seeds(delta, 0.4, 400, rescale_by="inverse").double()
    error = 4 * delta.abs().double() * math.sqrt((1 - 0.4) / 0.4 / 400)
    assert bool(((results.mean(0) - delta).abs() <= error + 1e-6).double().mean() > 0.99)


def test_survivors_are_divided_by_the_density_and_nothing_else() -> None:
    delta = randn(400, seed=6)
    result = over_seeds(delta, 0.25, 1, rescale_by="inverse")[0]
    assert torch.equal(result[result != 0], (delta * 4)[result != 0])


@given(st.integers(30, 90), seeds, st.floats(0.2, 0.9))
def test_by_length_the_norm_is_restored(length: int, seed: int, density: float) -> None:
    delta = randn(length, seed=seed)
    found = merge("dare_ties", [delta], torch.zeros(length), {"weight": [1.0], "density": [density]}, options={"seed": seed})
    assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)


def test_everything_dropped_by_chance_is_the_base() -> None:
    base, models = family(5, 9, 1)
    found = merge("dare_ties", models, base, {"weight": [1.0], "density": [0.5]}, options={"uniform_source": Given(torch.full((5,), 0.9))})
    assert torch.equal(found, base)


@given(lengths, seeds)
def test_density_one_needs_no_luck(length: int, seed: int) -> None:
    base, models = family(length, seed)
    each = {"weight": [1.0, 0.5, 2.0]}
    found = merge("dare_ties", models, base, each)
    assert torch.equal(found, merge("ties", models, base, each, normalize=False))


def test_random_numbers_follow_the_stream_not_the_place() -> None:
    base, models = family(300, 2)
    each = {"weight": [1.0, 1.0, 0.0], "density": [0.5] * 3}
    three = merge("dare_ties", models, base, each)
    two = merge("dare_ties", models[:2], base, {"weight": [1.0, 1.0], "density": [0.5] * 2})
    torch.testing.assert_close(three, two)
    moved = merge("dare_ties", models[1:2], base, {"weight": [1.0], "density": [0.5]}, options={"streams": [1]})
    alone = merge("dare_ties", models[:2], base, {"weight": [0.0, 1.0], "density": [0.5] * 2})
    torch.testing.assert_close(moved, alone)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("options", [{}, {"rescale": False}, {"rescale_by": "inverse"}])
def test_density_zero_leaves_a_model_out(method: str, options: dict[str, Any]) -> None:
    """A gradient may begin there."""
    base = randn(6, 9, seed=1)
    a, b = base + randn(6, 9, seed=2), base + randn(6, 9, seed=3)
    found = merge(method, [a, b], base, {"weight": [0.7, 0.4], "density": [0.0, 1.0]}, normalize=False, **options)
    assert torch.equal(found, merge(method, [b], base, {"weight": [0.4]}, normalize=False, **options))
    assert torch.equal(merge(method, [a], base, {"weight": [0.7], "density": [0.0]}, **options), base)
