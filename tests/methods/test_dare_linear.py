from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods import reference
from tests.methods.merging import family, lengths, merge, randn, seeds
from tests.methods.test_dare_ties import Given


@given(st.integers(1, 3), lengths, seeds, st.floats(0.05, 1.0), st.booleans(), st.booleans(), st.sampled_from(["length", "inverse"]))
def test_is_the_published_pipeline_for_given_numbers(
    n: int, length: int, seed: int, density: float, normalize: bool, rescale: bool, by: str
) -> None:
    base, models = family(length, seed, n)
    uniform = [torch.rand(length, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
    weight = [0.5, 1.5, -0.25][:n]
    found = merge(
        "dare_linear", models, base, {"weight": weight, "density": [density] * n}, options={"uniform_source": Given(*uniform)},
        normalize=normalize, rescale=rescale, rescale_by=by, lambda_=0.7,
    )  # fmt: skip
    pruned = []
    for model, numbers in zip(models, uniform, strict=True):
        delta = (model - base).numpy().astype(np.float64)
        kept = np.where(numbers.numpy() < np.float32(density), delta, 0.0)
        pruned.append(kept if not rescale else kept / density if by == "inverse" else reference.restored(delta, kept))
    expected = reference.total(base.numpy().astype(np.float64), pruned, weight, normalize, 0.7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=2e-5)


def test_the_mean_over_seeds_is_task_arithmetic() -> None:
    base, models = family(60, 5, 2)
    each = {"weight": [1.0, 0.5], "density": [0.4, 0.7]}
    results = torch.stack(
        [merge("dare_linear", models, base, each, options={"seed": seed}, rescale_by="inverse") for seed in range(400)]
    ).double()
    expected = merge("task_arithmetic", models, base, {"weight": each["weight"]}).double()
    first, second = ((model - base).abs().double() for model in models)
    error = 4 * (first**2 * 0.6 / 0.4 + (0.5 * second) ** 2 * 0.3 / 0.7).sqrt() / math.sqrt(400)
    assert bool(((results.mean(0) - expected).abs() <= error + 1e-6).double().mean() > 0.99)


def test_opposite_entries_cancel_where_an_election_would_choose() -> None:
    delta = randn(50, seed=1)
    models = [delta, -delta]
    base = torch.zeros(50)
    assert torch.equal(merge("dare_linear", models, base, {"weight": [1.0, 1.0]}), base)
    assert torch.equal(merge("dare_ties", models, base, {"weight": [1.0, 1.0]}), delta.abs())


def test_a_density_below_one_drops_what_it_says() -> None:
    delta = torch.ones(4000)
    found = merge("dare_linear", [delta], torch.zeros(4000), {"weight": [1.0], "density": [0.25]}, rescale=False)
    assert set(found.tolist()) == {0.0, 1.0}
    assert float(found.mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
