"""The arithmetic that the methods share: weighted sums of models and of task vectors, with or without sign election.

All of it is written in operations that run fast on plain torch as well: comparisons that make masks cost several times what sign, relu and
hardshrink cost, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.checkpoint.compiled import chunk_function

if TYPE_CHECKING:
    from torch import Tensor

ZeroSign = Literal["plus", "majority"]
#: a trim threshold below every magnitude: nothing is dropped
KEEP_ALL = -1.0


def divisor(weight: Sequence[float], normalize: bool) -> float:
    """What a normalised sum is divided by: the sum of the weights, and 1 where that is below 1e-8."""
    total = sum(weight) if normalize else 1.0
    return total if abs(total) >= 1e-8 else 1.0


@chunk_function
def weighted_sum(models: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """sum_i s_i X_i, in the order of the models. Tensors float32 or float64 [length]."""
    result = models[0] * scales[0]
    for model, scale in zip(models[1:], scales[1:], strict=True):
        result += model * scale
    return result


@chunk_function
def add_scaled(base: Tensor, models: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """B + sum_i s_i (X_i - B). Tensors float32 or float64 [length]."""
    result = (models[0] - base) * scales[0]
    for model, scale in zip(models[1:], scales[1:], strict=True):
        result += (model - base) * scale
    return result + base


@chunk_function
def add_trimmed_elected(
    base: Tensor,
    models: Sequence[Tensor],
    thresholds: Sequence[float],
    scales: Sequence[float],
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    majority: float,
) -> Tensor:
    """`_add_elected` of the task vectors without their entries of magnitude up to the threshold."""
    kept = [_above(model - base, threshold) for model, threshold in zip(models, thresholds, strict=True)]
    return _add_elected(base, kept, scales, weight, normalize, lambda_, majority)


@chunk_function
def add_dropped_elected(
    base: Tensor,
    models: Sequence[Tensor],
    uniform: Sequence[Tensor],
    density: Sequence[float],
    scales: Sequence[float],
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """`_add_elected` of the task vectors without the entries whose uniform number is not below the density."""
    kept = [dropped(model - base, u, d) for model, u, d in zip(models, uniform, density, strict=True)]
    return _add_elected(base, kept, scales, weight, normalize, lambda_, 1.0)


def dropped(delta: Tensor, uniform: Tensor, density: Any) -> Tensor:
    """`delta` where uniform < density, else 0; it is changed in place. A density of 1 keeps everything."""
    keep = (density - uniform).relu_().sign_()  # a difference of floats is positive exactly when it should be
    return delta.mul_(keep)


def _above(delta: Tensor, threshold: Any) -> Tensor:
    """`delta` where its magnitude as float32 is above `threshold`, else 0."""
    import torch

    if delta.dtype == torch.float32 and isinstance(threshold, float):
        return torch.nn.functional.hardshrink(delta, threshold)
    return torch.where(delta.to(torch.float32).abs() > threshold, delta, 0.0)


def _add_elected(
    base: Tensor,
    deltas: Sequence[Tensor],
    scales: Sequence[float],
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    majority: float,
) -> Tensor:
    """B + lambda * M, where M sums the scaled deltas whose sign agrees with the elected one, position by position.

    V_i = s_i D_i; the sign of sum_i V_i is elected, a zero sum counts as `majority` (+1 or -1); a zero entry never agrees. With
    `normalize` M is divided by the weights of those that agree (1 where they sum to 0). TIES, arXiv 2306.01708, steps 2 and 3.
    """
    scaled = [delta * scale for delta, scale in zip(deltas, scales, strict=True)]
    vote = scaled[0].clone()
    for values in scaled[1:]:
        vote += values
    sign = vote.sign_().mul_(2.0).add_(majority).sign_()  # +1 or -1
    merged = shares = None
    for values, share in zip(scaled, weight, strict=True):
        agreeing = values.mul_(sign).relu_()  # what agrees, as a magnitude
        merged = agreeing.clone() if merged is None else merged.add_(agreeing)
        if normalize:
            part = agreeing.sign_().mul_(share)
            shares = part if shares is None else shares.add_(part)
    assert merged is not None
    if shares is not None:
        nobody = shares.abs().sign_().neg_().add_(1.0)  # 1 where the shares sum to 0
        merged /= shares + nobody
    return merged.mul_(sign).mul_(lambda_).add_(base)
