"""What the methods on task vectors share: the weighted sum of (pruned) deltas, with or without sign election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ZeroSign = Literal["plus", "majority"]


def add_sum(base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, normalize: bool, lambda_: float) -> Tensor:
    """base + lambda * sum_i w_i D_i, divided by sum_i w_i if `normalize` (a sum below 1e-8 counts as 1)."""
    divisor = sum(weight) if normalize else 1.0
    if abs(divisor) < 1e-8:
        divisor = 1.0
    result = base.clone()
    for delta, share in zip(deltas, weight, strict=True):
        result += delta * (lambda_ * share / divisor)
    return result


def add_elected(
    base: Tensor,
    deltas: Sequence[Tensor],
    weight: Sequence[float],
    *,
    normalize: bool,
    lambda_: float,
    majority: float = 1.0,
) -> Tensor:
    """base + lambda * M, where M sums the weighted deltas whose sign agrees with the elected one, position by position.

    V_i = w_i D_i; the sign of sum_i V_i is elected, a zero sum counts as `majority` (+1 or -1); a zero entry never agrees. With
    `normalize` M is divided by the weights of those that agree (1 where nobody does). TIES, arXiv 2306.01708, steps 2 and 3.
    """
    import torch

    weighted = [delta * share for delta, share in zip(deltas, weight, strict=True)]
    vote = weighted[0].clone()
    for values in weighted[1:]:
        vote += values
    elected = (vote >= 0) if majority > 0 else (vote > 0)
    sign = elected.to(base.dtype) * 2 - 1
    merged = torch.zeros_like(base)
    share_sum = torch.zeros_like(base) if normalize else None
    for values, share in zip(weighted, weight, strict=True):
        agrees = ((values * sign) > 0).to(base.dtype)
        merged += values * agrees
        if share_sum is not None:
            share_sum += agrees * share
    if share_sum is not None:
        merged /= torch.where(share_sum == 0, torch.ones_like(share_sum), share_sum)
    return base + merged * lambda_
