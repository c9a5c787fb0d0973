"""Select by variance, weight by energy, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelglue.methods._order_statistics import Selection
from modelglue.methods._selection import Cuts, cut_rounds
from modelglue.methods._sums import block_squares, total
from modelglue.methods.registry import Range, Round, method

if TYPE_CHECKING:
    from torch import Tensor


def _variance(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """The population variance of the task vectors as float32, position by position; exactly 0 where they are equal."""
    import torch

    first = models[0] - base
    apart = [(model - base).sub_(first) for model in models[1:]]  # the first one's is 0
    mean = first.zero_()
    for values in apart:
        mean += values
    mean /= len(models)
    variance = mean.square()
    for values in apart:
        variance += values.sub_(mean).square_()
    return variance.div_(len(models)).to(torch.float32)


def _above(variance: Tensor, threshold: float) -> Tensor:
    """1 where the variance is above the threshold, else 0; changes `variance`."""
    return variance.sub_(threshold).relu_().sign_()  # a difference of floats is positive exactly when it should be


def _fused(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], smallest: float, threshold: float | None) -> Tensor:
    """B + sum of agreeing w_i D_i / sum of agreeing w_i, where the variance is above the threshold; B elsewhere."""
    import torch

    deltas = [model - base for model in models]
    vote = deltas[0].clone()
    for delta in deltas[1:]:
        vote += delta
    sign = vote.sign_().mul_(2.0).add_(1.0).sign_()  # +1 or -1
    merged, shares = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).relu_()  # what agrees, as a magnitude
        merged += agreeing * weight
        shares += agreeing.sign_().mul_(weight)
    merged.div_(shares.clamp_(min=smallest)).mul_(sign)
    if threshold is not None:
        merged *= _above(_variance(base, models), threshold)
    return merged.add_(base)


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
    deltas = [model - base for model in models]
    if known:
        cuts: Cuts = known[4]
        variance = _variance(base, models)
        for a, b in cuts.stretches(start, len(base)):
            kept = _above(variance[a:b], cuts.thresholds(start + a)[0])
            for delta in deltas:
                delta[a:b] *= kept
    return block_squares(deltas)


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
