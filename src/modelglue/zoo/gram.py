"""Inner products of every pair of models, column by column, in one pass over the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from modelglue.errors import CheckpointError
from modelglue.settings import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from modelglue.checkpoint import Checkpoint

Floats = NDArray[np.float64]
#: bytes of the inner products that are held at once; more columns than fit are done in several passes
PRODUCT_BYTES = 32_000_000


def columns_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """(matrices, rows, columns of each): a vector is one column; leading dimensions are separate matrices (experts)."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def pair_number(i: int, j: int, count: int) -> int:
    """Where the pair (i, j) stands among the pairs i <= j of `count` models in row order."""
    i, j = sorted((i, j))
    return i * count - i * (i - 1) // 2 + (j - i)


def column_products(checkpoints: Sequence[Checkpoint], labels: Sequence[str], name: str, base: Checkpoint | None) -> Iterator[Floats]:
    """Blocks [pairs, columns] (float64) of <A[:, c], B[:, c]> for all pairs i <= j of models, in column order.

    The tensor has the same shape in all models. It is read in blocks of about 65,536 elements of whole rows, minus
    `base` if one is given. All arithmetic is float64: products of stored numbers are exact, and measured it takes less
    than twice the time of float32. Memory: one block per model plus a few times PRODUCT_BYTES. Time n^2/2 multiply-adds
    per element. CheckpointError names the model and the tensor that hold NaN or infinity.
    """
    import torch

    matrices, rows, columns = columns_of(checkpoints[0].info(name).shape)
    count = len(checkpoints)
    pairs = count * (count + 1) // 2
    width = min(columns, max(1, PRODUCT_BYTES // (8 * pairs)))
    step = min(rows, max(1, BLOCK_ELEMENTS // columns))
    starts = [pair_number(i, i, count) for i in range(count)]
    # a reduction to one number alone would be split over threads and depend on their number; a row of zeros prevents it
    spare = 1 if width == 1 else 0
    block = torch.zeros(count + spare, step, width, dtype=torch.float64)
    for matrix in range(matrices):
        for left in range(0, columns, width):
            right = min(left + width, columns)
            sums = torch.zeros(pairs, right - left, dtype=torch.float64)
            for top in range(0, rows, step):
                bottom = min(top + step, rows)
                first, last = (matrix * rows + top) * columns, (matrix * rows + bottom) * columns
                X = block[:, : bottom - top, : right - left]  # [n, rows, columns]
                for number, checkpoint in enumerate(checkpoints):
                    X[number].copy_(checkpoint.read(name, first, last).view(-1, columns)[:, left:right])
                if base is not None:
                    X[:count] -= base.read(name, first, last).view(-1, columns)[:, left:right].double()
                for i, start in enumerate(starts):
                    sums[start : start + count - i] += (X[i:] * X[i]).sum(1)[: count - i]
            if not bool(torch.isfinite(sums[starts]).all()):
                _explain(checkpoints, labels, name, base)
            yield sums.numpy()


def cosines(products: Floats, count: int) -> tuple[Floats, NDArray[np.bool_]]:
    """(cosine, whether it says anything) [pairs, columns] of products in the layout of `column_products`.

    The product of norms is taken as at least 1e-8. A column that is zero in both models says nothing.
    """
    i, j = np.triu_indices(count)
    squares = products[[pair_number(k, k, count) for k in range(count)]]
    values = products / np.maximum(np.sqrt(squares[i] * squares[j]), 1e-8)
    return values, (squares[i] > 0) | (squares[j] > 0)


def _explain(checkpoints: Sequence[Checkpoint], labels: Sequence[str], name: str, base: Checkpoint | None) -> None:
    import torch

    sources = list(zip(checkpoints, labels, strict=True))
    if base is not None:
        sources.append((base, "the base"))
    for checkpoint, label in sources:
        values: torch.Tensor = checkpoint.read(name)
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise CheckpointError(
                f"{label}: tensor '{name}' holds {bad} values that are NaN or infinite. Leave the model out, or restore its weights."
            )
    raise CheckpointError(f"tensor '{name}' holds values whose squares exceed float64. Leave the model out that has them.")
