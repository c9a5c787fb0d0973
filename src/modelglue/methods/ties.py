"""Trim, elect sign, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelglue.methods._selection import kept
from modelglue.methods._trimming import Band, merge_trimmed, trim_rounds, trim_scales, trimmed
from modelglue.methods._weights import elected
from modelglue.methods.registry import PerModel, Range, Round, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


def _bands(parameters: Mapping[str, Any], numel: int) -> list[Band]:
    return [(None if density >= 1 else kept(density, numel), None) for density in parameters["density"]]


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    rounds = trim_rounds(_bands, parameters, parameters["trim_scope"], parameters["trim_ties"])
    return [*rounds, Round(_gather_signs, _majority, parameters["trim_scope"])] if parameters["zero_sign"] == "majority" else rounds


def _gather_signs(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> int:
    """Positive minus negative positions of the summed, trimmed and weighted deltas."""
    factors = trim_scales(parameters["weight"], known, parameters["rescale"], "sum", False, 1.0)
    vote = sum(delta * factor for delta, factor in zip(trimmed(models, base, known, start), factors, strict=True))
    return int(vote.sign().sum(dtype=vote.double().dtype))


def _majority(partials: Sequence[int], known: Any, numel: int, parameters: Mapping[str, Any]) -> float:
    return -1.0 if sum(partials) < 0 else 1.0


@method(survey=_rounds, odd=elected, source="TIES-Merging, arXiv 2306.01708")
def ties(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[Any],
    start: int,
    *,
    weight: PerModel[float],
    density: PerModel[Annotated[float, Range(above=0, high=1)]] = per_model(1.0),
    lambda_: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    agreeing: Literal["sum", "largest"] = "sum",
    trim_scope: Literal["tensor", "model"] = "tensor",
    trim_ties: Literal["first", "all"] = "first",
    zero_sign: Literal["plus", "majority"] = "plus",
) -> Tensor:
    """Keep each task vector's largest entries, elect a sign per position, and average the entries that agree.

    P_i = the floor(density * N) entries of X_i - B of largest magnitude (ties: lower index first; at least one); the sign of sum_i w_i P_i
    is elected; B + lambda * (sum of agreeing w_i P_i) / (sum of agreeing w_i). The threshold is exact and found without sorting.
    Time O(n P), inputs read about twice (once more each with `rescale` and `zero_sign: majority`); memory: one chunk of every input, and
    about one in fifty of a tensor's entries while its threshold is found.

    Parameters:
        weight: weight of this model's vote and share.
        density: fraction of this model's task vector that is kept.
        lambda_: scale of the merged task vector.
        normalize: divide by the weights of the models that are taken, position by position.
        rescale: restore each trimmed vector's L1 norm.
        agreeing: take the sum of the weighted entries that agree, or only the largest of them.
        trim_scope: threshold per tensor, or one for the whole model as published.
        trim_ties: of equal magnitudes at the threshold keep the first ones, or all as published.
        zero_sign: what a tied vote means: plus, or the majority's sign as published.
    """
    return merge_trimmed(
        models, base, survey, start, election=agreeing, weight=weight, lambda_=lambda_, normalize=normalize, rescale=rescale,
        majority=survey[-1] if zero_sign == "majority" else 1.0,
    )  # fmt: skip
