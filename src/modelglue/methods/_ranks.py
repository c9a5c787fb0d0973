"""Ranks of magnitudes inside rows: exact, of equal magnitudes by index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: entries sorted at once, whole rows of them: 8 bytes each, and they should stay in the cache
_AT_ONCE = 2**16


def by_rank(scores: Array, values: Array, lower: Literal["first", "last"] = "first") -> Array:
    """`values[rank]` for every entry of `scores` ([rows, c], non-negative float32), with rank 0 .. c-1 ascending in its row.

    Of equal scores the `first` one (or the `last`) has the lower rank. A score and its index make one 64-bit integer, whose order is that
    of the pair, so a plain sort of integers ranks exactly; numpy's is several times faster than a sort that carries an index along.
    """
    import numpy as np
    import torch

    rows, c = scores.shape
    index = np.arange(c, dtype=np.int64)
    tags = index if lower == "first" else index[::-1]
    ranked = np.empty((rows, c), values.dtype)
    values_of_row = torch.from_numpy(values).expand(rows, c)
    step = max(_AT_ONCE // max(c, 1), 1)
    keys = np.empty((min(step, rows), c), np.int64)
    for start in range(0, rows, step):
        part = keys[: min(step, rows - start)]
        np.copyto(part, scores[start : start + step].view(np.int32))
        np.left_shift(part, 32, out=part)
        np.bitwise_or(part, tags, out=part)
        part.sort(axis=1)
        np.bitwise_and(part, 0xFFFFFFFF, out=part)
        if lower == "last":
            np.subtract(c - 1, part, out=part)
        torch.from_numpy(ranked[start : start + len(part)]).scatter_(1, torch.from_numpy(part), values_of_row[: len(part)])
    return ranked
