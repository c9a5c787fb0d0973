"""Select by variance, weight by energy, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelglue.methods._order_statistics import Selection
from modelglue.methods._selection import Cuts, cut_rounds
from modelglue.methods._sums import block_dots, total
from modelglue.methods.registry import Range, Round, method

if TYPE_CHECKING:
    from torch import Tensor


def _variance(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """The population variance of the task vectors as float32, position by position; exactly 0 where they are equal."""
    import torch

    first = models[0] - base
    apart = [model - base - first for model in models]
    mean = sum(apart[1:], apart[0]) / len(models)
    squares = [(values - mean).square() for values in apart]
    variance: Tensor = sum(squares[1:], squares[0]) / len(models)
    return variance.to(torch.float32)


def _fused(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], smallest: float, threshold: float | None) -> Tensor:
    """B + sum of agreeing w_i D_i / sum of agreeing w_i, where the variance is above the threshold; B elsewhere."""
    import torch

    deltas = [model - base for model in models]
    vote = sum(deltas[1:], deltas[0])
    sign = torch.where(vote < 0, -1.0, 1.0).to(base.dtype)
    agreeing = [(delta * sign).relu() for delta in deltas]
    parts = [values * weight for values, weight in zip(agreeing, weights, strict=True)]
    shares = [values.sign() * weight for values, weight in zip(agreeing, weights, strict=True)]
    merged = sum(parts[1:], parts[0]) / sum(shares[1:], shares[0]).clamp(min=smallest) * sign
    if threshold is not None:
        merged = torch.where(_variance(base, models) > threshold, merged, 0.0)
    return base + merged


def _count(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> int:
    return int(_variance(base, models).count_nonzero())


def _sum(partials: Sequence[int], known: Any, numel: int, parameters: Mapping[str, Any]) -> int:
    return sum(partials)


def _wanted(varying: int, parameters: Mapping[str, Any]) -> int:
    return math.floor(float(parameters["select_topk"]) * varying * (1 + 1e-9))  # 0.29 of 100 is 29


def _scores(models: Any, base: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Tensor]:
    return [_variance(base, models)]


def _ranks(known: Any, numel: int, parameters: Mapping[str, Any]) -> list[int | None]:
    return [max(1, _wanted(known[0], parameters)) if known[0] else None]


def _energies(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[list[float]]:
    """Per model the sum of its squared, selected task vector, one number per block."""
    import torch

    deltas = [model - base for model in models]
    if known:
        cuts: Cuts = known[4]
        variance = _variance(base, models)
        kept = torch.cat([variance[a:b] > cuts.thresholds(start + a)[0] for a, b in cuts.stretches(start, len(base))])
        deltas = [torch.where(kept, delta, 0.0) for delta in deltas]
    return block_dots(deltas, [(i, i) for i in range(len(deltas))])


def _weights(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    n = len(partials[0]) if partials else 0
    energies = [total([partial[model] for partial in partials]) / numel for model in range(n)]
    whole = sum(energies)
    nothing = bool(known) and parameters["select_scope"] == "coefficients" and _wanted(known[0], parameters) == 0
    return [1.0 / n] * n if nothing or whole == 0.0 or whole < parameters["energy_floor"] else [energy / whole for energy in energies]


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    select = [Round(_count, _sum), *cut_rounds(Selection(_scores, _ranks))] if parameters["select_topk"] < 1 else []
    return [*select, Round(_energies, _weights)]


@method(survey=_rounds, mergekit={"energy_floor": 1e-6}, source="FuseChat (SCE), arXiv 2408.07990")
def sce(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[Any],
    start: int,
    *,
    select_topk: Annotated[float, Range(above=0, high=1)] = 1.0,
    select_scope: Literal["delta", "coefficients"] = "delta",
    energy_floor: Annotated[float, Range(low=0)] = 0.0,
) -> Tensor:
    """Select the positions that vary most between models, weight each model by its energy there, and erase minority signs.

    D_i = X_i - B, 0 outside the floor(select_topk * positions that vary at all) positions of largest variance (at least one; ties: lower
    index first; where nothing varies, nothing is left out). w_i = sum of D_i^2, as a share of all models'. The sign of sum_i D_i is
    elected (0 is +): B + (sum of agreeing w_i D_i) / (sum of agreeing w_i). Time O(n P); inputs read twice, four times when selecting;
    memory: one chunk of every input, and about one in fifty variances while the threshold is found.

    Parameters:
        select_topk: fraction of the varying positions that is kept.
        select_scope: leave the other positions at the base, or let the selection decide the weights only, as the authors' code does.
        energy_floor: sum of mean squares (and divisor) below which the models count alike; mergekit's 1e-6 hides most fine-tunes.
    """
    import torch

    weights, smallest = survey[-1], max(energy_floor, 1e-37)
    if select_topk == 1 or select_scope == "coefficients":
        return _fused(base, models, weights, smallest, None)
    cuts: Cuts = survey[4]
    parts = [
        _fused(base[a:b], [model[a:b] for model in models], weights, smallest, cuts.thresholds(start + a)[0])
        for a, b in cuts.stretches(start, len(base))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
