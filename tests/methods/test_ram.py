"""RAM and its tensor-local amplification."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.methods import get
from tests.methods.merging import Tensor, family, merge, randn, seeds


def sparse_family(length: int, seed: int, n: int) -> tuple[Tensor, list[Tensor]]:
    """Models that changed about half of the base each, with some changes below the threshold."""
    base = randn(length, seed=seed)
    deltas = [0.1 * randn(length, seed=seed + 1 + i) * (randn(length, seed=seed + 50 + i) > 0) for i in range(n)]
    return base, [base + delta * torch.where(randn(length, seed=seed + 99) > 1, 1e-4, 1.0) for delta in deltas]


def expected(base: Tensor, models: list[Tensor], epsilon: float, r: float, alpha: float) -> Tensor:
    deltas = torch.stack([model - base for model in models])
    changed = deltas.abs() > epsilon
    count = changed.sum(0)
    result = torch.zeros_like(base)
    for delta, mask in zip(deltas, changed, strict=True):
        shared, unique = int((mask & (count > 1)).sum()), int((mask & (count == 1)).sum())
        factor = 1 + r * min(shared / max(unique, 1), alpha)
        assert 1 <= factor <= 1 + r * alpha
        result += torch.where(mask & (count == 1), factor * delta, torch.where(mask, delta / count.clamp(min=1), 0.0))
    return base + result


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 90), seeds, st.sampled_from([0.0, 1e-5, 1e-2, 0.1]), st.floats(0, 1), st.floats(0, 2))
def test_is_the_formula(n: int, length: int, seed: int, epsilon: float, r: float, alpha: float) -> None:
    base, models = sparse_family(length, seed, n)
    torch.testing.assert_close(merge("ram", models, base, epsilon=epsilon), expected(base, models, epsilon, 0.0, 0.0))
    found = merge("ramplus_tl", models, base, epsilon=epsilon, r=r, alpha=alpha)
    torch.testing.assert_close(found, expected(base, models, epsilon, r, alpha))


def test_changes_of_one_model_alone_are_added_up() -> None:
    base = randn(60)
    deltas = [torch.zeros(60), torch.zeros(60), torch.zeros(60)]
    for i, delta in enumerate(deltas):
        delta[i::3] = randn(20, seed=i + 1)
    torch.testing.assert_close(merge("ram", [base + delta for delta in deltas], base), base + sum(deltas))


def test_equal_models_come_back() -> None:
    base, (model, *_) = family(80, 5)
    torch.testing.assert_close(merge("ram", [model] * 3, base), model, rtol=1e-5, atol=1.1e-5)


def test_changes_up_to_epsilon_count_as_none() -> None:
    base = torch.zeros(4)
    model = torch.tensor([0.5, 0.25, -0.5, -0.75])
    other = torch.tensor([0.0, 0.0, 1.0, 0.5])
    assert torch.equal(merge("ram", [model, other], base, epsilon=0.5), torch.tensor([0.0, 0.0, 1.0, -0.75]))


def test_without_amplification_it_is_ram_to_the_bit() -> None:
    base, models = sparse_family(90, 3, 3)
    assert torch.equal(merge("ramplus_tl", models, base, r=0.0), merge("ram", models, base))


def test_a_model_that_shares_nothing_is_not_amplified() -> None:
    base = torch.zeros(6)
    one, two = torch.tensor([1.0, 1.0, 0, 0, 0, 0]), torch.tensor([0, 0, 1.0, 0, 0, 0])
    assert torch.equal(merge("ramplus_tl", [one, two], base, r=1.0, alpha=5.0), one + two)
    both = torch.tensor([0.0, 0, 2, 2, 2, 0])
    # two shares all of itself (nothing to amplify); `both` shares one of three: 1 + 0.5 * 1/2
    assert torch.equal(merge("ramplus_tl", [two, both], base, r=0.5, alpha=5.0), torch.tensor([0.0, 0, 1.5, 2.5, 2.5, 0]))


def test_the_ratio_of_the_whole_model() -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(2)}
    one = {"a": torch.tensor([1.0, 1.0, 0.0]), "b": torch.tensor([1.0, 1.0])}
    two = {"a": torch.tensor([0.0, 1.0, 0.0]), "b": torch.tensor([0.0, 0.0])}
    method = get("ramplus_tl")
    values, faults = method.resolve({"r": 1.0, "alpha": 9.0, "scope": "model"}, [{}, {}], ["one", "two"])
    assert faults == []
    merged = MergedCheckpoint(method, [TensorsCheckpoint(one), TensorsCheckpoint(two)], TensorsCheckpoint(base), values)
    # `one` shares one position and has three for itself, over both tensors
    torch.testing.assert_close(merged.tensor("a"), torch.tensor([4 / 3, 1.0, 0.0]))
    torch.testing.assert_close(merged.tensor("b"), torch.tensor([4 / 3, 4 / 3]))
