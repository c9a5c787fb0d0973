"""Task vectors without their largest and smallest entries, then sign election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from modelglue.methods._breadcrumbs import TrimScope, merge_crumbs, rounds, unit
from modelglue.methods._weights import elected
from modelglue.methods.registry import PerModel, Range, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


@method(
    unit=unit,
    units=("element", "row"),
    survey=rounds,
    odd=elected,
    source="Model Breadcrumbs, arXiv 2312.06795, with the election of TIES, arXiv 2306.01708",
)
def breadcrumbs_ties(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[Any],
    start: int,
    *,
    weight: PerModel[float],
    density: PerModel[Annotated[float, Range(above=0, high=1)]] = per_model(1.0),
    gamma: PerModel[Annotated[float, Range(low=0, below=1)]] = per_model(0.01),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    trim_scope: TrimScope = "tensor",
) -> Tensor:
    """Drop the largest and the smallest entries of each task vector, elect a sign per position, and add up what agrees.

    P_i = X_i - B without its floor(gamma * N) entries of largest magnitude, and of the rest the floor(density * N) largest (ties: the
    lower index counts as larger; at least one); the sign of sum_i w_i P_i is elected; B + lambda * (sum of agreeing w_i P_i).
    Thresholds are exact and found without sorting. Time O(n P), inputs read about twice (three times with `rescale`); memory: one
    chunk of every input, and about one in twenty-five of a tensor's entries while its thresholds are found.

    Parameters:
        weight: weight of this model's vote and share.
        density: fraction of this model's task vector that is kept.
        gamma: fraction of this model's task vector that is dropped as its largest entries; less where density leaves less.
        lambda_: scale of the merged task vector.
        normalize: divide by the weights of the models that agree, position by position.
        rescale: restore each trimmed vector's L1 norm.
        trim_scope: count entries over the tensor, or in every row (along the last axis) as published.
    """
    return merge_crumbs(
        models, base, survey, start, trim_scope, density=density, gamma=gamma, election="sum", weight=weight,
        lambda_=lambda_, normalize=normalize, rescale=rescale,
    )  # fmt: skip
