"""Random pruning of task vectors by the rank of their entries, then their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from modelglue.methods._della import BY_RANK, Rows, window_fits
from modelglue.methods._pruning import RescaleBy
from modelglue.methods._random import drop_rounds, merge_dropped
from modelglue.methods._weights import summed
from modelglue.methods.registry import PerModel, Range, Round, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    return drop_rounds(BY_RANK, parameters, unit="channel")


@method(
    unit="channel",
    survey=_rounds,
    symmetric=False,
    check=window_fits,
    odd=summed,
    mergekit={"rows": "axis1"},
    source="DELLA-Merging, arXiv 2406.11617",
)
def della_linear(
    models: Sequence[Tensor],
    base: Tensor,
    uniform: Sequence[Tensor],
    survey: Sequence[Any],
    start: int,
    *,
    weight: PerModel[float],
    density: PerModel[Annotated[float, Range(low=0, high=1)]] = per_model(1.0),
    epsilon: PerModel[Annotated[float, Range(low=0, below=0.5)]] = per_model(0.15),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "length",
    rows: Rows = "flat",
) -> Tensor:
    """Drop random entries of each task vector, small ones sooner, and add up the rest.

    In every row of X_i - B the entry of rank r among c (0 the smallest; of equal ones the first) is kept with probability density -
    epsilon + 2 epsilon r / (c - 1); the rest is rescaled to the L1 norm that the vector had (or each entry by one over its probability,
    which is unbiased); B + lambda * sum_i w_i P_i. Vectors are one row. Seeded as DARE is. Time O(n P log c), inputs read twice when
    rescaling by length; memory: as DARE, of chunks of whole rows.

    Parameters:
        weight: scale of this model's task vector; may be negative.
        density: probability with which an entry of this model's task vector is kept, on average over a row.
        epsilon: how much likelier than that the largest entry of a row is kept, and how much less likely the smallest one.
        lambda_: scale of the merged task vector.
        normalize: divide the sum by the sum of the weights.
        rescale: make up for what was dropped.
        rescale_by: restore the L1 norm of each vector, or divide every entry by its own probability as published.
        rows: what a row is in tensors of more than two axes: all that belongs to one index of the first axis, or the second axis.
    """
    return merge_dropped(
        models, base, uniform, survey, start, BY_RANK, election="none", lambda_=lambda_, weight=weight, density=density,
        epsilon=epsilon, normalize=normalize, rescale=rescale, rescale_by=rescale_by, rows=rows,
    )  # fmt: skip
