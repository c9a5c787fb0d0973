"""The base, pulled towards a model where the two nearly agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor


@method(models=(1, 1), symmetric=False, source="model card of QuartetAnemoi-70B-t0.0001; no paper")
def nearswap(models: Sequence[Tensor], base: Tensor, *, t: float) -> Tensor:
    """Take the model's value where it is within t of the base's, and elsewhere move the base by t towards it.

    q = min(t / max(|X - B|, 1e-6), 1), position by position: q X + (1-q) B. Time O(P), both inputs read once; memory: one chunk of both.

    Parameters:
        t: the largest step, in units of the weights; 0 or less gives the base.
    """
    import torch

    delta = models[0] - base
    share = (t / delta.abs().clamp(min=1e-6)).clamp(0.0, 1.0)
    return torch.where(share >= 1.0, models[0], base + share * delta)
