"""Between the base and the mean of the models, by the angles between their task vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._spheres import dots_round, gram_of, lengths
from modelglue.methods._task_vectors import add_scaled
from modelglue.methods.registry import Round, Unit, method

if TYPE_CHECKING:
    from torch import Tensor

_NO_LENGTH = 1e-12


def _ratio(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> float | None:
    """The share of the mean; None where the task vectors are so opposed that there is none."""
    gram = gram_of(partials)
    n, long = len(gram), lengths(gram)
    cosines = []
    for i, j in itertools.combinations(range(n), 2):
        length = long[i] * long[j]
        cosines.append(max(-1.0, min(1.0, gram[i][j] / length)) if length > _NO_LENGTH**2 else 0.0)
    if parameters["angle_average"] == "angle":
        mean = math.cos(sum(map(math.acos, cosines)) / len(cosines)) if cosines else 0.0
    else:
        mean = sum(cosines) / len(cosines) if cosines else 0.0
    divisor = 1 + (n - 1) * mean
    if abs(divisor) < 1e-6:
        return None
    ratio = n * mean / divisor
    return max(0.0, min(1.0, ratio)) if parameters["clip_ratio"] else ratio


def _opposed(ratio: float | None) -> str | None:
    return "task vectors are so opposed that no ratio exists; the base is kept" if ratio is None else None


def _unit(parameters: Mapping[str, Any]) -> Unit:
    return "row" if parameters["filter_wise"] else "element"


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    return [] if parameters["filter_wise"] else [dots_round(_ratio, quick=True, note=_opposed)]


@method(
    unit=_unit,
    units=("element", "row"),
    survey=_rounds,
    models=(2, None),
    raw=True,
    mergekit={"clip_ratio": False},
    source="Model Stock, arXiv 2403.19522",
)
def model_stock(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[float | None],
    *,
    filter_wise: bool = False,
    clip_ratio: bool = True,
    angle_average: Literal["cosine", "angle"] = "cosine",
) -> Tensor:
    """Interpolate between base and mean: B + r * mean(D), with r = n c / (1 + (n-1) c) from the mean cosine c of the deltas.

    c is the mean over pairs of the cosine between D_i and D_j (a pair with a zero delta counts as 0): one ratio per tensor, or per row with
    `filter_wise`. Equal deltas give r = 1, orthogonal ones r = 0. Time O(n^2 P) for the inner products, inputs read twice (once if
    filter_wise); memory: one chunk of every input.

    Parameters:
        filter_wise: one ratio for every row instead of one for the tensor.
        clip_ratio: keep r within [0, 1]; without it opposing models push the result away from them.
        angle_average: take the mean of the pairs' cosines, or the cosine of their mean angle; with two models it is the same.
    """
    import torch

    n = len(models)
    if not filter_wise:
        return add_scaled(base, models, [survey[0] / n] * n) if survey[0] else base
    deltas = [model - base for model in models]
    mean = deltas[0].clone()
    for delta in deltas[1:]:
        mean += delta
    mean /= n
    long = [delta.double().norm(dim=-1, keepdim=True) for delta in deltas]
    cosine = torch.zeros_like(long[0])
    for i in range(n):
        for j in range(i + 1, n):
            dot = (deltas[i].double() * deltas[j].double()).sum(dim=-1, keepdim=True)
            length = long[i] * long[j]
            pair = torch.where(length > _NO_LENGTH**2, (dot / length.clamp(min=1e-300)).clamp(-1, 1), 0.0)
            cosine += pair.acos() if angle_average == "angle" else pair
    cosine /= n * (n - 1) / 2
    if angle_average == "angle":
        cosine = cosine.cos()
    divisor = 1 + (n - 1) * cosine
    ratio = torch.where(divisor.abs() >= 1e-6, n * cosine / divisor, torch.zeros_like(cosine))
    if clip_ratio:
        ratio = ratio.clamp(0, 1)
    return base + mean * ratio.to(base.dtype)
