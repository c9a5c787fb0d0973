"""Weighted sum of task vectors on a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.methods._task_vectors import add_scaled, divisor
from modelglue.methods._weights import summed
from modelglue.methods.registry import PerModel, method

if TYPE_CHECKING:
    from torch import Tensor


@method(raw=True, odd=summed, without_effect=("density", "rescale"), source="Editing models with task arithmetic, arXiv 2212.04089")
def task_arithmetic(
    models: Sequence[Tensor], base: Tensor, *, weight: PerModel[float], lambda_: float = 1.0, normalize: bool = False
) -> Tensor:
    """Add weighted task vectors to the base: B + lambda * sum_i w_i (X_i - B).

    A negative weight removes what a model has learned. Time O(n P), every input read once; memory: one chunk of every input.

    Parameters:
        weight: scale of this model's task vector; may be negative.
        lambda_: scale of the sum.
        normalize: divide the sum by the sum of the weights.
    """
    if lambda_ == 0.0:
        return base
    shared = lambda_ / divisor(weight, normalize)
    return add_scaled(base, models, [share * shared for share in weight])
