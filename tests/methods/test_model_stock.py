from __future__ import annotations

import logging
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods.merging import Tensor, family, merge, randn, seeds


def expected_ratio(deltas: list[Tensor], clip: bool, angle: bool) -> float:
    vectors = [delta.double().flatten().numpy() for delta in deltas]
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in combinations(vectors, 2)]
    c = float(np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1))))) if angle else float(np.mean(cosines))
    ratio = len(deltas) * c / (1 + (len(deltas) - 1) * c)
    return min(max(ratio, 0.0), 1.0) if clip else ratio


@given(st.integers(2, 4), st.integers(10, 90), seeds, st.booleans(), st.booleans())
def test_is_the_formula(n: int, length: int, seed: int, clip: bool, angle: bool) -> None:
    base, models = family(length, seed, n)
    models = [model + 0.1 for model in models]  # something in common, so the ratio is far from its pole
    ratio = expected_ratio([model - base for model in models], clip, angle)
    expected = base.double() + ratio * (torch.stack(models).double().mean(0) - base.double())
    found = merge("model_stock", models, base, clip_ratio=clip, angle_average="angle" if angle else "cosine")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_equal_task_vectors_give_that_model() -> None:
    base, models = family(80, 1, 1)
    torch.testing.assert_close(merge("model_stock", models * 3, base), models[0])


def test_even_when_they_are_tiny() -> None:
    """An absolute floor under the norms would lose small updates of small tensors."""
    base = torch.zeros(40)
    delta = 1e-6 * randn(40)
    torch.testing.assert_close(merge("model_stock", [delta, delta], base), delta)


def test_orthogonal_task_vectors_give_the_base() -> None:
    base = torch.tensor([5.0, 5.0, 5.0])
    models = [base + torch.tensor(delta) for delta in ([1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0])]
    assert torch.equal(merge("model_stock", models, base), base)


def test_no_ratio_is_told_by_tensor(caplog: pytest.LogCaptureFixture) -> None:
    base, away = randn(9), randn(9, seed=1)
    with caplog.at_level(logging.WARNING):
        merge("model_stock", [base + away, base - away], base)
        merge("model_stock", [base + away, base + away.roll(1)], base)
    assert [record.getMessage() for record in caplog.records] == [
        "model_stock: tensor 't': task vectors are so opposed that no ratio exists; the base is kept"
    ]


def test_opposite_task_vectors() -> None:
    base = torch.tensor([1.0, 2.0, 3.0])
    away = torch.tensor([0.5, -0.25, 0.125])
    # 1 + (n-1) c = 0: no ratio exists, clipped or not
    for clip in (True, False):
        assert torch.equal(merge("model_stock", [base + away, base - away], base, clip_ratio=clip), base)
    against = [base + away, base + torch.tensor([-0.5, 0.1, 0.0])]
    assert torch.equal(merge("model_stock", against, base), base), "a negative ratio is clipped"
    assert not torch.equal(merge("model_stock", against, base, clip_ratio=False), base)


def test_a_model_that_did_not_move_counts_as_orthogonal() -> None:
    base, models = family(60, 2, 1)
    assert torch.equal(merge("model_stock", [models[0], base], base), base)


@pytest.mark.parametrize("angle", ["cosine", "angle"])
def test_filter_wise_is_the_same_row_by_row(angle: str) -> None:
    base = randn(7, 19, seed=3)
    models = [base + 0.1 * randn(7, 19, seed=4 + number) + 0.1 for number in range(3)]
    found = merge("model_stock", models, base, filter_wise=True, angle_average=angle)
    for row in range(7):
        alone = merge("model_stock", [model[row] for model in models], base[row], angle_average=angle)
        torch.testing.assert_close(found[row], alone)
    flat = merge("model_stock", [model.flatten() for model in models], base.flatten(), filter_wise=True, angle_average=angle)
    torch.testing.assert_close(flat, merge("model_stock", [m.flatten() for m in models], base.flatten(), angle_average=angle))


def test_one_model_is_refused() -> None:
    _, faults = get("model_stock").resolve({}, [{}], ["a"])
    assert faults == ["model_stock takes at least 2 models besides the base, the recipe has 1"]
