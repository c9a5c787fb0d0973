"""Sums over tensors that come out the same whatever the chunk: fixed blocks, in index order, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.settings import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor


def block_sums(values: Tensor) -> list[float]:
    """One float64 sum per block of 65,536 elements of a 1-D chunk that starts at a block's edge."""
    import torch

    return [float(block.sum(dtype=torch.float64)) for block in values.split(BLOCK_ELEMENTS)]


def block_dots(left: Tensor, right: Tensor) -> list[float]:
    """Inner products of two 1-D chunks, block by block, with float64 products."""
    blocks = zip(left.split(BLOCK_ELEMENTS), right.split(BLOCK_ELEMENTS), strict=True)
    return [float(a.double().dot(b.double())) for a, b in blocks]


def total(partials: Sequence[Sequence[float]]) -> float:
    """The sum over all blocks, in index order."""
    result = 0.0
    for blocks in partials:
        for block in blocks:
            result += block
    return result
