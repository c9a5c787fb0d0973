"""Task vectors cut by magnitude over a tensor or the model: the survey that finds the cuts, and the merge of what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._order_statistics import Selection
from modelglue.methods._pruning import by_length, length_round, scales
from modelglue.methods._selection import Cuts, Ties, cut_rounds, keep_largest
from modelglue.methods._task_vectors import Election, add_cut
from modelglue.methods.registry import Round

if TYPE_CHECKING:
    from torch import Tensor

#: how many entries of largest magnitude the cuts leave, and how many of those are dropped as the very largest; None: no cut
Band = tuple[int | None, int | None]


def trim_rounds(
    bands: Callable[[Mapping[str, Any], int], Sequence[Band]],
    parameters: Mapping[str, Any],
    scope: Literal["tensor", "model"] = "tensor",
    ties: Ties = "first",
) -> list[Round]:
    """The rounds before `merge_trimmed`. `bands(parameters, numel)` says per model what stays."""
    rounds = list(
        cut_rounds(Selection(_magnitudes, lambda known, numel, given: [k for band in bands(given, numel) for k in band]), scope, ties)
    )
    return [*rounds, length_round(_left, scope)] if by_length(parameters) else rounds


def _magnitudes(models: Any, base: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Tensor | None]:
    """Two lanes per model, one for each end of its band."""
    lanes: list[Tensor | None] = []
    for model, density in zip(models, parameters["density"], strict=True):
        lanes += [None if density >= 1 else (model - base).abs_()] * 2
    return lanes


def _left(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Tensor | None]:
    lanes = known[3].of
    cut = [above is not None or upto is not None for above, upto in zip(lanes[0::2], lanes[1::2], strict=True)]
    return [left if is_cut else None for left, is_cut in zip(trimmed(models, base, known, start), cut, strict=True)]


def trimmed(models: Sequence[Tensor], base: Tensor, known: Sequence[Any], start: int) -> list[Tensor]:
    """The pruned task vectors of one chunk, for surveys that look at them."""
    found = []
    lanes = known[3].of
    for model, above, upto in zip(models, lanes[0::2], lanes[1::2], strict=True):
        delta = model - base
        left = keep_largest(delta, above, start)
        found.append(left if upto is None else left - keep_largest(delta, upto, start))
    return found


def trim_scales(weight: Sequence[float], survey: Sequence[Any], rescale: bool, election: Election, normalize: bool, lambda_: float) -> Any:
    """What each trimmed vector is multiplied by."""
    return scales(weight, survey[4] if rescale else None, election, normalize, lambda_)


def merge_trimmed(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[Any],
    start: int,
    *,
    election: Election,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
    majority: float = 1.0,
) -> Tensor:
    """B + lambda * (the task vectors, cut, weighted and put together). Chunks [length], beginning at position `start`."""
    import torch

    if lambda_ == 0.0:
        return base
    cuts: Cuts = survey[3]
    factors = trim_scales(weight, survey, rescale, election, normalize, lambda_)
    banded = any(cut is not None for cut in cuts.of[1::2])
    parts = []
    for a, b in cuts.stretches(start, base.numel()):
        thresholds = cuts.thresholds(start + a)
        upto = [math.inf if cut is None else threshold for cut, threshold in zip(cuts.of, thresholds, strict=True)][1::2]
        chunks = [model[a:b] for model in models]
        parts.append(
            add_cut(base[a:b], chunks, thresholds[0::2], upto if banded else None, factors, weight, election, normalize, lambda_, majority)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
