"""Sums over tensors that come out the same whatever the chunk: fixed blocks, in index order, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.settings import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor

#: so many products are added in float32
_RUN = 1024
#: blocks below this many elements cost little either way
_SHORT = 4096
#: sums of squares between these have lost nothing that counts to the smallest or the largest number of float32
_SMALLEST, _LARGEST = 1e-20, 1e30


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


def block_grams(models: Sequence[Tensor], base: Tensor | None, *, quick: bool) -> list[list[float]]:
    """Inner products of every pair (i <= j) of 1-D chunks of any floating dtype, or of their differences to the base: per pair one
    number per block; not finite where an input is not, in the diagonal pairs at the least.

    In float64; `quick` adds runs of 1,024 products in float32 and the runs in float64, which is a third of the work, for those who
    subtract no sums of nearly equal size: the error is below 1e-6 of the product of the lengths (measured: some 1e-8). Blocks that are
    short, whose squares could leave float32, or that are stored in float64 are not done quickly.
    """
    import torch

    inputs = [*models, *([base] if base is not None else [])]
    narrow = quick and all(vector.dtype != torch.float64 for vector in inputs)
    sums: list[list[float]] = [[] for _ in pairs(len(models))]
    room = torch.empty(len(inputs), min(BLOCK_ELEMENTS, len(inputs[0])), dtype=torch.float32, device=inputs[0].device) if narrow else None
    for start in range(0, len(inputs[0]), BLOCK_ELEMENTS):
        block = [vector[start : start + BLOCK_ELEMENTS] for vector in inputs]
        gram = None
        if room is not None and len(block[0]) >= _SHORT:
            gram = _quick_gram(_rows(block, base is not None, room[:, : len(block[0])]))
        if gram is None:
            gram = _gram(_rows(block, base is not None, inputs[0].new_empty(len(inputs), len(block[0]), dtype=torch.float64)))
        for found, (i, j) in zip(sums, pairs(len(models)), strict=True):
            found.append(gram[i][j])
    return sums


def _rows(block: Sequence[Tensor], differences: bool, rows: Tensor) -> Tensor:
    """The chunks as rows of one matrix; where the last one is the base, the differences to it."""
    for row, values in zip(rows, block, strict=True):
        row.copy_(values)
    if not differences:
        return rows
    for row in rows[:-1]:
        row.sub_(rows[-1])
    return rows[:-1]


def _quick_gram(rows: Tensor) -> list[list[float]] | None:
    """Inner products of float32 rows [n, length] as [n][n]; None where a sum of squares is so small or large that products may be lost."""
    import torch

    count, length = rows.shape
    whole = length // _RUN * _RUN
    runs = rows[:, :whole].view(count, -1, _RUN).transpose(0, 1)
    gram = torch.bmm(runs, runs.transpose(1, 2)).sum(0, dtype=torch.float64)
    if whole < length:
        rest = rows[:, whole:]
        gram += torch.mm(rest, rest.T)
    found: list[list[float]] = gram.tolist()
    sound = all(_SMALLEST < found[i][i] < _LARGEST or (found[i][i] == 0.0 and not rows[i].any()) for i in range(count))
    return found if sound else None


def _gram(rows: Tensor) -> list[list[float]]:
    """Inner products of float64 rows, the upper half."""
    return [[float(one.dot(two)) if i <= j else 0.0 for j, two in enumerate(rows)] for i, one in enumerate(rows)]


def pairs(n: int) -> list[tuple[int, int]]:
    """The upper half of a symmetric matrix, row by row."""
    return [(i, j) for i in range(n) for j in range(i, n)]


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
