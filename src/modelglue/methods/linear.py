"""Weighted sum of the models' tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.methods._task_vectors import weighted_sum
from modelglue.methods._weights import summed
from modelglue.methods.registry import PerModel, method

if TYPE_CHECKING:
    from torch import Tensor


def _weights_do_not_cancel(parameters: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    if parameters["normalize"] and abs(sum(parameters["weight"])) < 1e-8:
        return ["the weights sum to 0, so they cannot be normalised; change them or set normalize: false"]
    return []


@method(source="Model soups, arXiv 2203.05482", check=_weights_do_not_cancel, odd=summed, raw=True)
def linear(models: Sequence[Tensor], *, weight: PerModel[float], normalize: bool = True) -> Tensor:
    """Weighted average of the models: sum_i w_i X_i, divided by sum_i w_i.

    The plain average of fine-tunes of one base ("model soup"), and the merge that all selection strategies search over.
    Time O(n P), every input read once; memory: one chunk of every input.

    Parameters:
        weight: share of this model; may be negative.
        normalize: divide by the sum of the weights.
    """
    total = sum(weight) if normalize else 1.0
    return weighted_sum(models, [share / total for share in weight])
