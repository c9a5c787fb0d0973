"""From a second model, only the entries whose change is an outlier of an importance score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.methods._order_statistics import Selection
from modelglue.methods.registry import Round, method

if TYPE_CHECKING:
    from torch import Tensor

_QUANTILES = (0.25, 0.5, 0.75)


def _gather_divergence(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> tuple[int, Tensor]:
    """The length of a row, and per row [rows] the Kullback-Leibler divergence of the model's softmax from the base's."""
    import torch

    # in the inputs' own precision, as others do: a last bit of a divergence near 0 can decide about an entry
    p, q = (torch.softmax(rows, -1) + 1e-8 for rows in (models[0], base))
    return base.shape[-1], (p * (p / q).log()).sum(-1).clamp(min=0.0)  # what is below 0 is rounding: both sum to the same


def _divergence(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> tuple[int, Tensor] | None:
    import torch

    return (partials[0][0], torch.cat([rows for _, rows in partials])) if partials else None


def _importance(model: Tensor, base: Tensor, survey: Sequence[Any], start: int) -> Tensor:
    """|X - B| times the divergence of the row, as float32, for a chunk that begins at flat position `start`."""
    length, divergence = survey[0]
    first, last = start // length, -(-(start + len(base)) // length)
    spread = divergence[first:last].repeat_interleave(length)[start - first * length :][: len(base)]
    score: Tensor = ((model - base).abs() * spread.to(base.device)).float()
    return score


def _scores(models: Any, base: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Tensor]:
    return [_importance(models[0], base, known, start)] * len(_QUANTILES)


def _ranks(known: Any, numel: int, parameters: Mapping[str, Any]) -> list[int]:
    return [numel - math.floor(share * (numel - 1)) for share in _QUANTILES]


@method(
    survey=[Round(_gather_divergence, _divergence, unit="row"), *Selection(_scores, _ranks).rounds()],
    models=(1, 1),
    symmetric=False,
    selective=True,
    source="release note of Arcee Fusion; no paper",
)
def arcee_fusion(models: Sequence[Tensor], base: Tensor, survey: Sequence[Any], start: int) -> Tensor:
    """Take from the model the entries whose change matters most: upper outliers of |X - B| * KL(softmax X, softmax B), row by row.

    p = softmax(X) + 1e-8 and q = softmax(B) + 1e-8 along the last axis; every |X - B| is multiplied by sum p ln(p/q) of its row; what
    reaches Q(1/2) + 1.5 (Q(3/4) - Q(1/4)) is taken from X, the rest is B. The quantiles are exact order statistics of the whole tensor,
    whatever its size. Time O(P), inputs read about three times; memory: one chunk (or row) of both, one number per row, and about one in
    fifty scores while the quantiles are found.
    """
    import torch

    low, middle, high = (threshold.value for threshold in survey[3].found)
    score = _importance(models[0], base, survey, start)
    return torch.where(score >= middle + 1.5 * (high - low), models[0], base)
