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

    return [float(block.sum(dtype=torch.float64)) for block in _blocks(values)]


def row_sums(values: Tensor) -> list[float]:
    """One float64 sum per row (or channel) of a chunk of whole ones."""
    import torch

    sums: list[float] = values.flatten(1).sum(dim=1, dtype=torch.float64).tolist()
    return sums


def block_dots(vectors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> list[list[float]]:
    """Inner products of the named pairs of 1-D chunks: per pair one float64 number per block, with float64 products."""
    blocks = [_blocks(vector.double()) for vector in vectors]
    return [[float(a.dot(b)) for a, b in zip(blocks[i], blocks[j], strict=True)] for i, j in pairs]


def _blocks(values: Tensor) -> Sequence[Tensor]:
    import torch

    return torch.split(values, BLOCK_ELEMENTS)


def total(partials: Sequence[Sequence[float]]) -> float:
    """The sum over all blocks, in index order."""
    result = 0.0
    for blocks in partials:
        for block in blocks:
            result += block
    return result
