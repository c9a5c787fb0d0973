"""The pipeline on task vectors written down plainly, in float64 and with a sort: what the fast versions are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def trim(delta: Array, density: float) -> Array:
    """The max(1, floor(density N)) entries of largest magnitude; of equal ones the first."""
    keep = max(1, int(np.floor(density * delta.size))) if density < 1 else delta.size
    order = np.argsort(-np.abs(delta), kind="stable")
    kept = np.zeros_like(delta)
    kept[order[:keep]] = delta[order[:keep]]
    return kept


def elect(base: Array, pruned: Sequence[Array], weight: Sequence[float], normalize: bool, scale: float, zero: float = 1) -> Array:
    values = [w * delta for w, delta in zip(weight, pruned, strict=True)]
    vote = np.sum(values, axis=0)
    sign = np.where(vote > 0, 1.0, np.where(vote < 0, -1.0, zero))
    agrees = [np.sign(value) == sign for value in values]
    merged = np.sum([value * agree for value, agree in zip(values, agrees, strict=True)], axis=0)
    if normalize:
        shares = np.sum([w * agree for w, agree in zip(weight, agrees, strict=True)], axis=0)
        merged = merged / np.where(shares == 0, 1.0, shares)
    result: Array = base + scale * merged
    return result
