from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.methods import get
from tests.methods import reference
from tests.methods.merging import Tensor, family, lengths, merge, randn, seeds

densities = st.floats(0.02, 1.0)
#: many equal magnitudes, zeros of both signs, the smallest numbers there are
awkward = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, 1e-45, -1e-45, 3e-39, 1e30]), min_size=1, max_size=200).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


@given(st.integers(1, 3), lengths, seeds, densities, st.booleans(), st.floats(-2, 2))
def test_is_the_published_pipeline(n: int, length: int, seed: int, density: float, normalize: bool, scale: float) -> None:
    base, models = family(length, seed, n)
    weight = [0.5, 1.5, 1.0][:n]
    found = merge("ties", models, base, {"weight": weight, "density": [density] * n}, normalize=normalize, lambda_=scale)
    deltas = [(model - base).numpy().astype(np.float64) for model in models]
    trimmed = [reference.trim(delta, density) for delta in deltas]
    expected = reference.elect(base.numpy().astype(np.float64), trimmed, weight, normalize, scale)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@given(awkward, densities)
def test_exactly_k_entries_stay_and_the_first_of_equal_ones(delta: Tensor, density: float) -> None:
    found = merge("ties", [delta], torch.zeros_like(delta), {"weight": [1.0], "density": [density]})
    expected = reference.trim(delta.numpy().astype(np.float64), density)
    assert found.tolist() == expected.tolist()


@given(st.lists(awkward, min_size=2, max_size=5), densities)
def test_one_threshold_for_the_whole_model(deltas: list[Tensor], density: float) -> None:
    tensors = {f"t{number}": delta for number, delta in enumerate(deltas)}
    parameters, faults = get("ties").resolve({"trim_scope": "model", "density": density, "weight": 1.0}, [{}], ["a"])
    assert faults == []
    merged = MergedCheckpoint(
        get("ties"),
        [TensorsCheckpoint(tensors)],
        TensorsCheckpoint({name: torch.zeros_like(delta) for name, delta in tensors.items()}),
        parameters,
    )
    found = [value for name in sorted(tensors) for value in merged.tensor(name).tolist()]
    laid_out = torch.cat([tensors[name] for name in sorted(tensors)]).numpy().astype(np.float64)
    assert found == reference.trim(laid_out, density).tolist()


@given(awkward, densities)
def test_all_that_tie_at_the_threshold_stay_on_request(delta: Tensor, density: float) -> None:
    each = {"weight": [1.0], "density": [density]}
    found = merge("ties", [delta], torch.zeros_like(delta), each, trim_ties="all")
    magnitude = delta.abs()
    keep = max(1, int(np.floor(density * len(delta))))
    least = magnitude.sort(descending=True).values[keep - 1]
    assert found.tolist() == torch.where(magnitude >= least, delta, 0.0).tolist()


@given(lengths, seeds, densities, st.booleans())
def test_the_largest_that_agrees_on_request(length: int, seed: int, density: float, normalize: bool) -> None:
    base, models = family(length, seed)
    weight = [0.5, 1.5, 1.0]
    each = {"weight": weight, "density": [density] * 3}
    found = merge("ties", models, base, each, agreeing="largest", normalize=normalize)
    trimmed = np.array([reference.trim((model - base).numpy().astype(np.float64), density) for model in models])
    values = np.array(weight)[:, None] * trimmed
    sign = np.where(values.sum(axis=0) >= 0, 1.0, -1.0)
    best = np.where(np.sign(values) == sign, np.abs(values), 0).argmax(axis=0)
    taken = np.where(np.sign(values) == sign, trimmed if normalize else values, 0)[best, np.arange(length)]
    np.testing.assert_allclose(found.numpy(), base.numpy() + taken, rtol=1e-4, atol=1e-5)


def test_at_least_one_entry_stays() -> None:
    delta = torch.tensor([0.1, -0.3, 0.2])
    found = merge("ties", [delta], torch.zeros(3), {"weight": [1.0], "density": [0.05]})
    torch.testing.assert_close(found, torch.tensor([0.0, -0.3, 0.0]))


def test_a_tied_vote_is_plus_or_the_majority() -> None:
    base = torch.zeros(4)
    one, two = torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0, 1.0])
    each = {"weight": [1.0, 1.0]}
    assert merge("ties", [one, two], base, each).tolist() == [1.0, -1.0, -1.0, 1.0]
    assert merge("ties", [one, two], base, each, zero_sign="majority").tolist() == [-1.0, -1.0, -1.0, -1.0]


def test_the_majority_counts_the_trimmed_and_rescaled_vote() -> None:
    base = torch.zeros(3)
    one, two = torch.tensor([4.0, 1.0, -1.0]), torch.tensor([-4.0, -1.0, -1.0])
    found = merge(
        "ties", [one, two], base, {"weight": [1.0, 1.0], "density": [0.4, 1.0]}, zero_sign="majority", rescale=True,
        normalize=False,
    )  # fmt: skip
    # the first keeps 4 and is stretched to 6, so it wins the first position; the second wins the others
    assert found.tolist() == pytest.approx([6.0, -1.0, -1.0])


@given(lengths, seeds, densities, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_the_task_vectors_scales_the_result(length: int, seed: int, density: float, factor: float) -> None:
    _, models = family(length, seed)
    base = torch.zeros(length)
    each = {"weight": [1.0, 0.5, 2.0], "density": [density] * 3}
    scaled = merge("ties", [model * factor for model in models], base, each)
    assert torch.equal(scaled, merge("ties", models, base, each) * factor)


@given(lengths, seeds, densities)
def test_the_result_is_affine_in_lambda_and_the_base_at_zero(length: int, seed: int, density: float) -> None:
    base, models = family(length, seed)
    each = {"weight": [1.0, 0.5, 2.0], "density": [density] * 3}
    at = {scale: merge("ties", models, base, each, lambda_=scale) for scale in (0.0, 0.5, 1.0)}
    assert torch.equal(at[0.0], base)
    torch.testing.assert_close(at[0.5] - base, (at[1.0] - base) / 2, rtol=1e-4, atol=1e-5)


@given(lengths, seeds, densities)
def test_entries_lie_between_zero_and_the_largest_that_agrees(length: int, seed: int, density: float) -> None:
    _, models = family(length, seed)
    each = {"weight": [1.0, 0.5, 2.0], "density": [density] * 3}
    found = merge("ties", models, torch.zeros(length), each).numpy()
    trimmed = np.array([reference.trim(model.numpy().astype(np.float64), density) for model in models])
    assert (found <= trimmed.max(axis=0).clip(0) + 1e-6).all()
    assert (found >= trimmed.min(axis=0).clip(max=0) - 1e-6).all()


@given(st.integers(8, 90), seeds, st.floats(0.2, 0.9))
def test_rescale_restores_the_length_of_each_vector(length: int, seed: int, density: float) -> None:
    delta = randn(length, seed=seed)
    found = merge("ties", [delta], torch.zeros(length), {"weight": [1.0], "density": [density]}, rescale=True)
    assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.003, 0.2, 0.9])
def test_long_tensors_keep_exactly_k(dtype: torch.dtype, density: float) -> None:
    """Longer than a chunk, so that the threshold is bracketed by a sample first; bfloat16 deltas repeat themselves."""
    length = 700_001
    base = (randn(length, seed=1) * 0.02).to(dtype)
    model = (base.float() + 0.001 * randn(length, seed=2)).to(dtype)
    found = merge(
        "ties", [model], base, {"weight": [1.0], "density": [density]}, options={"store": "float32"}
    )  # fmt: skip
    delta = model.double().numpy() - base.double().numpy()
    expected = base.double().numpy() + reference.trim(delta, density)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("inside", ["nothing", "everything"])
def test_a_sample_that_misleads_costs_a_pass_and_nothing_else(inside: str) -> None:
    """All large entries stand where the sample does not look (or only there)."""
    length = 600_000
    delta = torch.linspace(0.001, 0.002, length)
    looked_at = torch.zeros(length, dtype=torch.bool)
    step = length // 32
    for start in range(0, length - 2048, step):
        looked_at[start : start + 2048] = True
    delta[looked_at if inside == "everything" else ~looked_at] += 1.0
    found = merge("ties", [delta], torch.zeros(length), {"weight": [1.0], "density": [0.25]})
    expected = reference.trim(delta.numpy().astype(np.float64), 0.25)
    assert np.array_equal(found.numpy(), expected)


@given(st.integers(1, 60), seeds)
def test_density_one_with_one_sign_is_task_arithmetic(length: int, seed: int) -> None:
    base = randn(length, seed=seed)
    models = [base + 0.1 + randn(length, seed=seed + number).abs() for number in (1, 2)]
    each = {"weight": [0.3, 0.6]}
    assume(all(bool((model > base).all()) for model in models))
    found = merge("ties", models, base, each, normalize=False)
    torch.testing.assert_close(found, merge("task_arithmetic", models, base, each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("density", 0.0), ("density", 1.5), ("density", -1), ("trim_scope", "layer")])
def test_illegal_values_are_named_with_what_is_allowed(name: str, value: Any) -> None:
    _, faults = get("ties").resolve({name: value, "weight": 1.0}, [{}], ["a"])
    assert len(faults) == 1
    assert name in faults[0]
    assert "allowed is" in faults[0]
