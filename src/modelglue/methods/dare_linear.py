"""Random pruning of task vectors with rescaling, then their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from modelglue.methods._pruning import RescaleBy
from modelglue.methods._random import DENSITY, drop_rounds, merge_dropped
from modelglue.methods._weights import summed
from modelglue.methods.registry import PerModel, Range, Round, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    return drop_rounds(DENSITY, parameters)


@method(survey=_rounds, symmetric=False, odd=summed, source="DARE, arXiv 2311.03099")
def dare_linear(
    models: Sequence[Tensor],
    base: Tensor,
    uniform: Sequence[Tensor],
    survey: Sequence[Any],
    start: int,
    *,
    weight: PerModel[float],
    density: PerModel[Annotated[float, Range(low=0, high=1)]] = per_model(1.0),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: RescaleBy = "length",
) -> Tensor:
    """Drop random entries of each task vector, rescale the rest, and add them up.

    Every entry of X_i - B is kept with probability `density`; the rest is rescaled to the L1 norm that the vector had (or by
    1/density as in the paper, which is unbiased); B + lambda * sum_i w_i P_i. Always seeded: the random numbers depend on seed, tensor
    name, model and position only. Time O(n P), inputs read twice when rescaling by length; memory: one chunk of every input and its
    random numbers, and one bit for every entry of a tensor and model (up to 16 MiB).

    Parameters:
        weight: scale of this model's task vector; may be negative.
        density: probability with which an entry of this model's task vector is kept.
        lambda_: scale of the merged task vector.
        normalize: divide the sum by the sum of the weights.
        rescale: make up for what was dropped.
        rescale_by: restore the L1 norm of each vector, or divide by the density as published.
    """
    return merge_dropped(
        models, base, uniform, survey, start, DENSITY, election="none", lambda_=lambda_, weight=weight, density=density,
        normalize=normalize, rescale=rescale, rescale_by=rescale_by,
    )  # fmt: skip
