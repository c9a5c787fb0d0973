"""The operations by which PEFT combines adapters, on the tensors of one module.

The same function is applied to the A factors, to the B factors, or to whole updates: tensors of equal shape, one per adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

MajoritySign = Literal["total", "frequency"]
#: uniform numbers in [0, 1) of a tensor's shape, by the position of its adapter
Uniform = Callable[[int], "torch.Tensor"]


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_t w_t X_t."""
    result = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        result = result + weight * tensor
    return result


def prune_small(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep exactly the int(density * size) entries of largest magnitude, of equal ones the first."""
    import torch

    if density >= 1:
        return tensor
    magnitude = tensor.abs().flatten()
    count = int(density * magnitude.numel())
    kept = torch.zeros_like(magnitude, dtype=torch.bool)
    if count:
        threshold = magnitude.kthvalue(magnitude.numel() - count + 1).values
        kept = magnitude > threshold
        equal = (magnitude == threshold).nonzero().flatten()
        kept[equal[: count - int(kept.sum())]] = True
    return tensor * kept.view(tensor.shape)


def prune_at_random(tensor: torch.Tensor, density: float, uniform: torch.Tensor) -> torch.Tensor:
    """Keep an entry where its uniform number is below the density; divide by the density."""
    return tensor if density >= 1 else tensor * (uniform < density) / density


def elected_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], majority_sign: MajoritySign) -> torch.Tensor:
    """The weighted sum of the entries that have the majority's sign, divided by their number (not by their weights).

    The sign is elected by the unweighted tensors: by their sum ("total"), or by counting ("frequency"). A tie elects +.
    """
    import torch

    stacked = torch.stack(list(tensors))
    signs = stacked.sign()
    balance = stacked.sum(0) if majority_sign == "total" else signs.sum(0)
    agrees = signs == torch.where(balance >= 0, 1.0, -1.0).to(stacked.dtype)
    scale = torch.tensor(list(weights), dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
    return (stacked * scale * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def combined(
    operation: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float,
    majority_sign: MajoritySign,
    uniform: Uniform,
) -> torch.Tensor:
    """`linear`, `ties`, `dare_linear`, `dare_ties` or `magnitude_prune` of tensors of one shape."""
    if operation in ("ties", "magnitude_prune"):
        tensors = [prune_small(tensor, density) for tensor in tensors]
    elif operation.startswith("dare_"):
        tensors = [prune_at_random(tensor, density, uniform(position)) for position, tensor in enumerate(tensors)]
    if operation.endswith("ties"):
        return elected_mean(tensors, weights, majority_sign)
    return weighted_sum(tensors, weights)
