"""Several objectives at once: who dominates whom, how spread out a front is, and how much it covers. Larger is better everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modelglue.errors import UserError
from modelglue.search.item_response import Floats, Positions


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """Whether `a` is at least as good as `b` in every objective and better in one."""
    x, y = np.asarray(a), np.asarray(b)
    return bool((x >= y).all() and (x > y).any())


def fronts(values: ArrayLike) -> list[Positions]:
    """Positions of points [n, objectives], sorted into fronts: nobody dominates the first, only the first dominates the second, ...

    NSGA-II's fast non-dominated sort (Deb et al. 2002). Within a front positions ascend; equal points share a front. O(n^2 objectives).
    """
    F = _points(values)
    better = _domination(F)  # [i, j]: i dominates j
    above = better.sum(axis=0)
    found: list[Positions] = []
    left = np.ones(len(F), dtype=bool)
    while left.any():
        front = np.flatnonzero(left & (above == 0))
        found.append(front)
        left[front] = False
        above = above - better[front].sum(axis=0)
    return found


def non_dominated(values: ArrayLike) -> Positions:
    """Positions of the points that nobody dominates, ascending."""
    F = _points(values)
    return np.flatnonzero(~_domination(F).any(axis=0))


def crowding(values: ArrayLike) -> Floats:
    """[n]: how far the neighbours of each point of a front are apart, summed over objectives scaled to their range; infinite at the ends.

    Points with equal coordinates stand in the order of their positions (Deb et al. 2002).
    """
    F = _points(values)
    distance = np.zeros(len(F))
    if len(F) < 3:
        return distance + np.inf
    for column in F.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if width > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance


def reference_directions(objectives: int, divisions: Sequence[int], scales: Sequence[float] | None = None) -> Floats:
    """[directions, objectives], each summing to 1: the simplex cut into `divisions` (Das and Dennis), one layer per entry.

    A layer of scale s is shrunk towards the centre: s * d + (1 - s) / objectives; the default of scales is 1 for each layer. Layers of
    few divisions with scales 1 and 0.5 are how NSGA-III keeps the number small for many objectives.
    """
    factors = [1.0] * len(divisions) if scales is None else list(scales)
    if objectives < 1 or not divisions or min(divisions) < 1 or len(factors) != len(divisions):
        raise UserError("reference directions need an objective, and for every layer divisions from 1 and a scale.")
    layers = []
    for parts, factor in zip(divisions, factors, strict=True):
        lattice = np.array(_compositions(parts, objectives), dtype=np.float64) / parts
        assert len(lattice) == comb(parts + objectives - 1, objectives - 1)
        layers.append(factor * lattice + (1 - factor) / objectives)
    return np.unique(np.concatenate(layers).round(12), axis=0)[::-1]


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    """The area (2 objectives), volume (3) or length (1) that points [n, objectives] dominate above a reference point.

    Points that are not better than the reference everywhere add nothing. O(n log n) for 2, O(n^2 log n) for 3.
    """
    F, ref = _points(values), np.asarray(reference, dtype=np.float64)
    if F.shape[1] not in (1, 2, 3) or ref.shape != (F.shape[1],):
        raise UserError(f"hypervolume of {F.shape[1]} objectives above a reference of {ref.size}; allowed are 1 to 3, the same in both.")
    gained = F - ref
    F = gained[(gained > 0).all(axis=1)]
    if not len(F):
        return 0.0
    if F.shape[1] == 1:
        return float(F.max())
    return _area(F) if F.shape[1] == 2 else _volume(F)


def _area(F: Floats) -> float:
    """Union of rectangles from the origin: from the widest to the narrowest, each adds what it is higher."""
    total, height = 0.0, 0.0
    for x, y in F[np.lexsort((-F[:, 1], -F[:, 0]))]:
        if y > height:
            total += x * (y - height)
            height = y
    return float(total)


def _volume(F: Floats) -> float:
    """Slabs between successive third coordinates, from the top: each has the area of the points that reach it."""
    total = 0.0
    levels = np.append(np.unique(F[:, 2])[::-1], 0.0)
    for top, bottom in itertools.pairwise(levels):
        total += _area(F[F[:, 2] >= top][:, :2]) * (top - bottom)
    return float(total)


def _domination(F: Floats) -> NDArray[np.bool_]:
    at_least = np.ones((len(F), len(F)), dtype=bool)
    better = np.zeros((len(F), len(F)), dtype=bool)
    for column in F.T:
        at_least &= column[:, None] >= column[None, :]
        better |= column[:, None] > column[None, :]
    return at_least & better


def _compositions(total: int, parts: int) -> list[list[int]]:
    """Every way to write `total` as an ordered sum of `parts` numbers from 0."""
    if parts == 1:
        return [[total]]
    return [[first, *rest] for first in range(total, -1, -1) for rest in _compositions(total - first, parts - 1)]


def _points(values: ArrayLike) -> Floats:
    F = np.asarray(values, dtype=np.float64)
    if F.ndim != 2 or not F.shape[1]:
        raise UserError(f"objectives of shape {list(F.shape)}; allowed is [points, objectives].")
    if np.isnan(F).any():
        raise UserError("objectives hold NaN. Give a failed candidate its worst score.")
    return F
