"""Random pruning of task vectors with rescaling, then sign election."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelglue.methods._pruning import length_ratios
from modelglue.methods._sums import block_sums
from modelglue.methods._task_vectors import add_dropped_elected, dropped
from modelglue.methods.registry import PerModel, Range, Round, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


def _gather(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    found = []
    for model, numbers, density in zip(models, uniform, parameters["density"], strict=True):
        if density >= 1:
            found.append(([1.0], [1.0]))
            continue
        magnitude = (model - base).abs_()
        before = block_sums(magnitude)
        found.append((before, block_sums(dropped(magnitude, numbers, density))))
    return found


def _combine(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    return length_ratios(partials, len(parameters["density"]))


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    return [Round(_gather, _combine)] if parameters["rescale"] and parameters["rescale_by"] == "length" else []


@method(survey=_rounds, symmetric=False, source="DARE, arXiv 2311.03099, with the election of TIES, arXiv 2306.01708")
def dare_ties(
    models: Sequence[Tensor],
    base: Tensor,
    uniform: Sequence[Tensor],
    survey: Sequence[Any],
    *,
    weight: PerModel[float],
    density: PerModel[Annotated[float, Range(above=0, high=1)]] = per_model(1.0),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: Literal["length", "inverse"] = "length",
) -> Tensor:
    """Drop random entries of each task vector, rescale the rest, elect a sign per position, and add up what agrees.

    Every entry of X_i - B is kept with probability `density`; the rest is rescaled to the L1 norm that the vector had (or by
    1/density as in the paper); the sign of sum_i w_i P_i is elected; B + lambda * (sum of agreeing w_i P_i). Always seeded: the random
    numbers depend on seed, tensor name, model and position only. Time O(n P), inputs read twice when rescaling by length; memory: one
    chunk of every input and its random numbers.

    Parameters:
        weight: weight of this model's vote and share.
        density: probability with which an entry of this model's task vector is kept.
        lambda_: scale of the merged task vector.
        normalize: divide by the weights of the models that agree, position by position.
        rescale: make up for what was dropped.
        rescale_by: restore the L1 norm of each vector, or divide by the density as published.
    """
    if lambda_ == 0.0:
        return base
    if not rescale:
        ratios = [1.0] * len(models)
    elif rescale_by == "inverse":
        ratios = [1.0 / value for value in density]
    else:
        ratios = survey[0]
    scales = [share * ratio for share, ratio in zip(weight, ratios, strict=True)]
    return add_dropped_elected(base, models, uniform, density, scales, weight, normalize, lambda_)
