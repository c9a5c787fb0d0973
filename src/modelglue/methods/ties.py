"""Trim, elect sign, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelglue.methods._pruning import length_ratios
from modelglue.methods._selection import Cuts, keep_largest, magnitude_rounds
from modelglue.methods._sums import block_sums
from modelglue.methods._task_vectors import add_trimmed_elected
from modelglue.methods.registry import PerModel, Range, Round, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    scope = parameters["trim_scope"]
    rounds = list(magnitude_rounds(scope))
    if parameters["rescale"]:
        rounds.append(Round(_gather_lengths, _ratios, scope))
    if parameters["zero_sign"] == "majority":
        rounds.append(Round(_gather_signs, _majority, scope))
    return rounds


def _scales(parameters: Mapping[str, Any], survey: Sequence[Any]) -> list[float]:
    """What each trimmed vector is multiplied by: its weight, and the factor that restores its length."""
    ratios = survey[4] if parameters["rescale"] else [1.0] * len(parameters["weight"])
    return [share * ratio for share, ratio in zip(parameters["weight"], ratios, strict=True)]


def _gather_signs(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> int:
    """Positive minus negative positions of the summed, trimmed and weighted deltas."""
    scales = _scales(parameters, known)
    trimmed = [keep_largest(m - base, cut, start) * s for m, cut, s in zip(models, known[3].of, scales, strict=True)]
    vote = sum(trimmed[1:], trimmed[0])
    return int(vote.sign().sum(dtype=vote.double().dtype))


def _majority(partials: Sequence[int], known: Any, numel: int, parameters: Mapping[str, Any]) -> float:
    return -1.0 if sum(partials) < 0 else 1.0


def _gather_lengths(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    deltas = [model - base for model in models]
    trimmed = [keep_largest(delta, cut, start) for delta, cut in zip(deltas, known[3].of, strict=True)]
    return [(block_sums(d.abs()), block_sums(t.abs())) for d, t in zip(deltas, trimmed, strict=True)]


def _ratios(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    return length_ratios(partials, len(parameters["weight"]))


@method(survey=_rounds, source="TIES-Merging, arXiv 2306.01708")
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
    trim_scope: Literal["tensor", "model"] = "tensor",
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
        normalize: divide by the weights of the models that agree, position by position.
        rescale: restore each trimmed vector's L1 norm.
        trim_scope: threshold per tensor, or one for the whole model as published.
        zero_sign: what a tied vote means: plus, or the majority's sign as published.
    """
    import torch

    if lambda_ == 0.0:
        return base
    cuts: Cuts = survey[3]
    scales = _scales({"rescale": rescale, "weight": weight}, survey)
    majority = survey[-1] if zero_sign == "majority" else 1.0
    parts = [
        add_trimmed_elected(
            base[a:b], [model[a:b] for model in models], cuts.thresholds(start + a), scales, weight, normalize, lambda_, majority
        )
        for a, b in cuts.stretches(start, base.numel())
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
