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


def band(delta: Array, density: float, gamma: float) -> Array:
    """Breadcrumbs: without the floor(gamma N) largest (of equal ones the first is the larger), the max(1, floor(density N)) next stay."""
    if density >= 1:
        return delta
    keep = max(1, int(np.floor(density * delta.size)))
    top = min(int(np.floor(gamma * delta.size)), delta.size - keep)
    order = np.argsort(-np.abs(delta), kind="stable")[top : top + keep]
    kept = np.zeros_like(delta)
    kept[order] = delta[order]
    return kept


def chances(delta: Array, density: float, epsilon: float) -> Array:
    """DELLA: the probability of every entry of one row, by its rank (of equal ones the first is the smaller)."""
    if delta.size == 1:
        return np.full(1, density)
    rank = np.argsort(np.argsort(np.abs(delta), kind="stable"), kind="stable")
    result: Array = density - epsilon + 2 * epsilon * rank / (delta.size - 1)
    return result


def restored(delta: Array, pruned: Array) -> Array:
    """Stretched to the L1 norm that it had."""
    left = np.abs(pruned).sum()
    return pruned * (np.abs(delta).sum() / left) if left >= 1e-7 else pruned


def total(base: Array, pruned: Sequence[Array], weight: Sequence[float], normalize: bool, scale: float) -> Array:
    """Without election."""
    merged = np.sum([w * delta for w, delta in zip(weight, pruned, strict=True)], axis=0)
    result: Array = base + scale * merged / (sum(weight) if normalize else 1.0)
    return result
