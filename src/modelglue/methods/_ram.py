"""Task vectors added where one model alone has changed a position, averaged where several have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def changes(base: Tensor, models: Sequence[Tensor], epsilon: Any) -> list[Tensor]:
    """The task vectors, 0 where their magnitude is not above `epsilon`."""
    import torch

    deltas = [model - base for model in models]
    return [torch.where(delta.abs() > epsilon, delta, 0.0) for delta in deltas]


def add_changes(base: Tensor, models: Sequence[Tensor], epsilon: float, alone: Sequence[float]) -> Tensor:
    """B + where c models changed a position: the mean of their c changes, and for c = 1 the change of model i times `alone[i]`."""
    import torch

    count, shared, single = torch.zeros_like(base), torch.zeros_like(base), torch.zeros_like(base)
    for change, factor in zip(changes(base, models, epsilon), alone, strict=True):
        count += change.sign().abs_()
        shared += change
        single += change * factor
    return base + torch.where(count > 1.0, shared / count.clamp(min=1.0), single)
