from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods import reference
from tests.methods.merging import Tensor, family, lengths, merge, randn, seeds
from tests.methods.test_ties import awkward

densities = st.floats(0.02, 1.0)
gammas = st.floats(0.0, 0.9)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@given(st.integers(1, 3), lengths, seeds, densities, gammas, st.booleans(), st.booleans(), st.floats(-2, 2))
def test_is_the_published_pipeline(
    method: str, n: int, length: int, seed: int, density: float, gamma: float, normalize: bool, rescale: bool, scale: float
) -> None:
    base, models = family(length, seed, n)
    weight = [0.5, 1.5, 1.0][:n]
    each = {"weight": weight, "density": [density] * n, "gamma": [gamma] * n}
    found = merge(method, models, base, each, normalize=normalize, rescale=rescale, lambda_=scale)
    deltas = [(model - base).numpy().astype(np.float64) for model in models]
    pruned = [reference.band(delta, density, gamma) for delta in deltas]
    if rescale:
        pruned = [reference.restored(delta, left) for delta, left in zip(deltas, pruned, strict=True)]
    combine = reference.elect if method == "breadcrumbs_ties" else reference.total
    expected = combine(base.numpy().astype(np.float64), pruned, weight, normalize, scale)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("scope", ["tensor", "row"])
@given(awkward, densities, gammas)
def test_exactly_the_band_stays_and_of_equal_ones_the_first_is_the_larger(scope: str, delta: Tensor, density: float, gamma: float) -> None:
    each = {"weight": [1.0], "density": [density], "gamma": [gamma]}
    found = merge("breadcrumbs", [delta], torch.zeros_like(delta), each, trim_scope=scope)
    assert found.tolist() == reference.band(delta.numpy().astype(np.float64), density, gamma).tolist()


@pytest.mark.parametrize("rescale", [False, True])
@given(st.sampled_from([(1, 1), (4, 9), (7, 30), (3, 2, 11)]), seeds, densities, gammas)
def test_in_rows_every_row_has_its_own_band(rescale: bool, shape: tuple[int, ...], seed: int, density: float, gamma: float) -> None:
    delta = randn(*shape, seed=seed)
    each = {"weight": [1.0], "density": [density], "gamma": [gamma]}
    found = merge("breadcrumbs", [delta], torch.zeros(shape), each, trim_scope="row", rescale=rescale)
    rows = delta.numpy().astype(np.float64).reshape(-1, shape[-1])
    pruned = np.array([reference.band(row, density, gamma) for row in rows])
    expected = reference.restored(rows, pruned) if rescale else pruned
    np.testing.assert_allclose(found.numpy(), expected.reshape(shape), rtol=1e-5, atol=0)


@given(lengths, seeds, densities)
def test_without_a_cut_at_the_top_it_is_the_trim_of_ties(length: int, seed: int, density: float) -> None:
    delta = randn(length, seed=seed)
    found = merge("breadcrumbs", [delta], torch.zeros(length), {"weight": [1.0], "density": [density], "gamma": [0.0]})
    assert torch.equal(found, merge("ties", [delta], torch.zeros(length), {"weight": [1.0], "density": [density]}))


def test_a_tensor_too_small_for_a_top_entry_loses_none() -> None:
    """Of 50 entries one in a hundred is none: the delta must not vanish."""
    delta = randn(50, seed=1)
    found = merge("breadcrumbs", [delta], torch.zeros(50), {"weight": [1.0], "density": [0.5]})
    assert int((found != 0).sum()) == 25
    assert float(found.abs().max()) == float(delta.abs().max())


def test_no_kept_entry_exceeds_a_removed_top_entry() -> None:
    delta = randn(1000, seed=2)
    found = merge("breadcrumbs", [delta], torch.zeros(1000), {"weight": [1.0], "density": [0.6], "gamma": [0.1]})
    removed = delta[found == 0].abs().sort().values
    assert int((found != 0).sum()) == 600
    assert removed[299] < found[found != 0].abs().min()
    assert found.abs().max() < removed[300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_tensors_keep_exactly_the_band(dtype: torch.dtype) -> None:
    """Longer than a chunk, so that both thresholds are bracketed by a sample first."""
    length = 700_001
    base = (randn(length, seed=1) * 0.02).to(dtype)
    model = (base.float() + 0.001 * randn(length, seed=2)).to(dtype)
    each = {"weight": [1.0], "density": [0.3], "gamma": [0.05]}
    found = merge("breadcrumbs", [model], base, each, options={"store": "float32"})
    delta = model.double().numpy() - base.double().numpy()
    expected = base.double().numpy() + reference.band(delta, 0.3, 0.05)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)
