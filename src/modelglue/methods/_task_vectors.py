"""The arithmetic that the methods share: weighted sums of models and of task vectors, with or without sign election.

All of it is written in operations that run fast on plain torch as well: comparisons that make masks cost several times what sign, relu and
hardshrink cost, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.checkpoint.engine import native
from modelglue.checkpoint.engine.compiled import chunk_function

if TYPE_CHECKING:
    from torch import Tensor

#: how pruned task vectors are put together: all of them, or those that agree with the elected sign: their sum or the largest of them
Election = Literal["none", "sum", "largest"]
#: a trim threshold below every magnitude: nothing is dropped
KEEP_ALL = -1.0


def divisor(weight: Sequence[float], normalize: bool) -> float:
    """What a normalised sum is divided by: the sum of the weights, and 1 where that is below 1e-8."""
    total = sum(weight) if normalize else 1.0
    return total if abs(total) >= 1e-8 else 1.0


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, if it is stored in less."""
    import torch

    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def weighted_sum(models: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """sum_i s_i X_i, in the order of the models, at least in float32; the last step of a method. Tensors [length], of any floating dtype.

    Where the engine says where the result goes, it is written there in one pass, rounded as it is stored.
    """
    landed = native.summed(models, scales)
    if landed is not None:
        return landed
    result = wide(models[0]) * scales[0]
    for model, scale in zip(models[1:], scales[1:], strict=True):
        result += wide(model) * scale
    return result


def add_scaled(base: Tensor, models: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """B + sum_i s_i (X_i - B), at least in float32; the last step of a method, like `weighted_sum`. Tensors [length]."""
    landed = native.added(base, models, scales)
    if landed is not None:
        return landed
    base = wide(base)
    result = (wide(models[0]) - base) * scales[0]
    for model, scale in zip(models[1:], scales[1:], strict=True):
        result += (wide(model) - base) * scale
    return result + base


@chunk_function
def add_cut(
    base: Tensor,
    models: Sequence[Tensor],
    above: Sequence[float],
    upto: Sequence[float] | None,
    scales: Sequence[float],
    weight: Sequence[float],
    election: Election,
    normalize: bool,
    lambda_: float,
    majority: float,
) -> Tensor:
    """`_add` of the entries of each task vector whose magnitude is above one threshold and not above the other. Tensors [length]."""
    pruned = [_above(model - base, threshold) for model, threshold in zip(models, above, strict=True)]
    if upto is not None:
        largest = [_above(model - base, threshold) for model, threshold in zip(models, upto, strict=True)]
        pruned = [delta.sub_(cut) for delta, cut in zip(pruned, largest, strict=True)]
    return _add(base, pruned, scales, weight, election, normalize, lambda_, majority)


@chunk_function
def add_kept(
    base: Tensor,
    models: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    scales: Sequence[float],
    weight: Sequence[float],
    election: Election,
    normalize: bool,
    lambda_: float,
    majority: float,
) -> Tensor:
    """`_add` of the task vectors times `kept`: 0 or 1 (uint8), a factor, or None where everything stays. Tensors [length]."""
    deltas = [model - base for model in models]
    pruned = [delta if keep is None else delta.mul_(keep) for delta, keep in zip(deltas, kept, strict=True)]
    return _add(base, pruned, scales, weight, election, normalize, lambda_, majority)


def _above(delta: Tensor, threshold: Any) -> Tensor:
    """`delta` where its magnitude as float32 is above `threshold`, else 0."""
    import torch

    if delta.dtype == torch.float32 and isinstance(threshold, float):
        return torch.nn.functional.hardshrink(delta, threshold)
    return torch.where(delta.to(torch.float32).abs() > threshold, delta, 0.0)


def _add(
    base: Tensor,
    deltas: Sequence[Tensor],
    scales: Sequence[float],
    weight: Sequence[float],
    election: Election,
    normalize: bool,
    lambda_: float,
    majority: float,
) -> Tensor:
    """B + lambda * M of pruned task vectors D_i, with V_i = s_i D_i.

    Election "none": M = sum_i V_i (the scales hold all factors, lambda too). Otherwise the sign of sum_i V_i is elected, position by
    position; a zero sum counts as `majority` (+1 or -1), and a zero entry never agrees. M is the sum of the V_i that agree, or the
    largest of them; with `normalize` it is divided by the weights of those that it is made of (1 where they sum to 0). TIES, arXiv
    2306.01708, steps 2 and 3.
    """
    scaled = [delta.mul_(scale) for delta, scale in zip(deltas, scales, strict=True)]
    vote = _total(scaled)
    if election == "none":
        return vote.add_(base)
    sign = vote.sign_().add_(majority / 2).sign_()  # +1 or -1
    agreeing = [values.mul_(sign).relu_() for values in scaled]  # as magnitudes, 0 where they do not agree
    merged, shares = _summed(agreeing, weight, normalize) if election == "sum" else _largest(agreeing, weight)
    if normalize:
        nobody = shares.abs().sign_().neg_().add_(1.0)  # 1 where the shares sum to 0
        merged /= shares.add_(nobody)
    return merged.mul_(sign).mul_(lambda_).add_(base)


def _total(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in order, as a new tensor."""
    result = tensors[0] + tensors[1] if len(tensors) > 1 else tensors[0].clone()
    for values in tensors[2:]:
        result += values
    return result


def _summed(agreeing: Sequence[Tensor], weight: Sequence[float], normalize: bool) -> tuple[Tensor, Tensor]:
    """The sum of what agrees, and of its weights (if they are asked for)."""
    merged = _total(agreeing)
    return merged, _total([values.sign_().mul_(share) for values, share in zip(agreeing, weight, strict=True)]) if normalize else merged


def _largest(agreeing: Sequence[Tensor], weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The largest of what agrees (the first of equal ones), and its weight."""
    import torch

    merged, shares = agreeing[0], agreeing[0].sign().mul_(weight[0])
    for values, share in zip(agreeing[1:], weight[1:], strict=True):
        larger = values > merged
        merged = torch.where(larger, values, merged)
        shares = torch.where(larger, values.sign().mul_(share), shares)
    return merged, shares
