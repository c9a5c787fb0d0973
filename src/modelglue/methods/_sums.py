"""Sums over tensors that come out the same whatever the chunk: fixed blocks, in index order, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.checkpoint.engine import native
from modelglue.settings import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor

#: the products of a run are added in float32, to so many sums
_RUN, _LANES = 1024, 64
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


def block_squares(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Squared lengths of 1-D chunks: per chunk one float64 number per block, with float64 products."""
    return [[float(block.dot(block)) for block in _blocks(vector.double())] for vector in vectors]


def block_grams(models: Sequence[Tensor], base: Tensor | None, *, quick: bool) -> list[list[float]]:
    """Inner products of every pair (i <= j) of 1-D chunks of any floating dtype, or of their differences to the base: per pair one
    number per block; not finite where an input is not, in the diagonal pairs at the least.

    In float64; `quick` adds runs of 1,024 products in float32 to 64 sums and those in float64, which is a small part of the work, for
    those who subtract no sums of nearly equal size: the error is below 1e-6 of the product of the lengths (measured: some 1e-8). Blocks
    that are short, whose squares could leave float32, or that are stored in float64 are not done quickly. The bits are the same with
    and without machine code.
    """
    import torch

    inputs = [*models, *([base] if base is not None else [])]
    length, narrow = len(inputs[0]), all(vector.dtype != torch.float64 for vector in inputs)
    found: list[list[float]] | None = None
    if quick and narrow and length >= _SHORT:
        made = native.grams(models, base)
        found = (_halved(models, base) if made is None else made).tolist()
    sums: list[list[float]] = [[] for _ in pairs(len(models))]
    room: Tensor | None = None  # one for all blocks: fresh memory costs as much as what is done in it
    for number, start in enumerate(range(0, length, BLOCK_ELEMENTS)):
        block = [vector[start : start + BLOCK_ELEMENTS] for vector in inputs]
        if (
            found is not None
            and len(block[0]) >= _SHORT
            and _sound(found[number], block[: len(models)], block[-1] if base is not None else None)
        ):
            gram = found[number]
        else:
            if room is None:
                room = inputs[0].new_empty(len(inputs), min(length, BLOCK_ELEMENTS), dtype=torch.float64)
            rows = _rows(block, base is not None, room[:, : len(block[0])])
            gram = [float(rows[i].dot(rows[j])) for i, j in pairs(len(rows))]
        for blocks, value in zip(sums, gram, strict=True):
            blocks.append(value)
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


def _halved(models: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """Inner products [blocks, pairs] in float64, added in the order of `modelglue_grams` in sums.c, which says what it is."""
    import torch

    inputs = [*models, *([base] if base is not None else [])]
    length, wanted = len(inputs[0]), pairs(len(models))
    lanes = inputs[0].new_zeros(len(wanted), -(-length // BLOCK_ELEMENTS), BLOCK_ELEMENTS // _RUN, _LANES, dtype=torch.float32)
    room = inputs[0].new_empty(len(inputs) + 1, min(-(-length // _RUN) * _RUN, BLOCK_ELEMENTS), dtype=torch.float32)
    runs = 0
    for number, start in enumerate(range(0, length, BLOCK_ELEMENTS)):
        block = [vector[start : start + BLOCK_ELEMENTS] for vector in inputs]
        if runs != -(-len(block[0]) // _RUN):  # the first block and the last: views take their time
            runs = -(-len(block[0]) // _RUN)
            *vectors, products = room[:, : runs * _RUN]
            parts = products.view(runs, _RUN // _LANES, _LANES)
            halves = [(parts[:, :half], parts[:, half : 2 * half]) for half in (8, 4, 2)]
            lower, upper = parts[:, 0], parts[:, 1]
        room[:-1, len(block[0]) : runs * _RUN] = 0
        _rows(block, base is not None, room[:-1, : len(block[0])])
        for found, (i, j) in zip(lanes[:, number, :runs], wanted, strict=True):
            torch.mul(vectors[i], vectors[j], out=products)
            for one, other in halves:
                one.add_(other)
            torch.add(lower, upper, out=found)
    lanes = lanes.flatten(2)
    half = lanes.shape[2] // 2
    sums = lanes[..., :half].double()
    sums += lanes[..., half:]
    while half > 1:
        half //= 2
        sums[..., :half] += sums[..., half : 2 * half]
    return sums[..., 0].T


def _sound(gram: Sequence[float], models: Sequence[Tensor], base: Tensor | None) -> bool:
    """Whether no sum of squares is so small or large that products may be lost; the zero of a vector of zeros is not."""
    for (i, j), value in zip(pairs(len(models)), gram, strict=True):
        if i != j or _SMALLEST < value < _LARGEST:
            continue
        if value != 0.0 or bool((models[i] if base is None else models[i] != base).any()):
            return False
    return True


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
