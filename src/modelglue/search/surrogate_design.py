"""Where to score next, and how to take many tasks apart: MAP's Bayesian and nested variants (arXiv 2406.07529)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from modelglue.errors import UserError
from modelglue.search.item_response import Floats

_DELETIONS = 30
_DELETED = 0.2
_SPREAD_WEIGHT = 0.5
_TEMPERATURE = 0.07
_RADII = (0.2, 0.8)


def hyperspherical(points: ArrayLike) -> tuple[Floats, Floats]:
    """(radius [n], angles [n, models - 1]) of points [n, models]; angles in [0, pi/2] where all coordinates are positive."""
    C = np.asarray(points, dtype=np.float64)
    rest = np.sqrt(np.cumsum(C[:, ::-1] ** 2, axis=1)[:, ::-1])  # [n, models]: norm of the coordinates from each on
    angles = np.arctan2(rest[:, 1:], C[:, :-1])
    if C.shape[1] > 1:
        angles[:, -1] = np.arctan2(C[:, -1], C[:, -2])
    return rest[:, 0], angles


def cartesian(radius: ArrayLike, angles: ArrayLike) -> Floats:
    """Points [n, models] of radii [n] and angles [n, models - 1]."""
    r, phi = np.asarray(radius, dtype=np.float64), np.asarray(angles, dtype=np.float64)
    sines = np.concatenate([np.ones((len(r), 1)), np.cumprod(np.sin(phi), axis=1)], axis=1)
    cosines = np.concatenate([np.cos(phi), np.ones((len(r), 1))], axis=1)
    points: Floats = r[:, None] * sines * cosines
    return points


def bins_per_angle(models: int) -> int:
    """4, or 2 where four or more models would make too many bins."""
    return 4 if models < 4 else 2


def bin_scores(points: ArrayLike, squared_residuals: ArrayLike, generator: np.random.Generator) -> Floats:
    """[bins]: where the surrogate errs or is unsure: mean squared residual + 0.5 x spread of that mean under 30 random deletions.

    Every angle range [0, pi/2] is cut into bins, the first angle counts slowest; each deletion leaves out a fifth of the bin's points.
    A bin without points scores as the largest: nothing is known there.
    """
    C, squares = np.asarray(points, dtype=np.float64), np.asarray(squared_residuals, dtype=np.float64)
    number = _bin_numbers(C)
    count = bins_per_angle(C.shape[1]) ** (C.shape[1] - 1)
    scores = np.full(count, np.nan)
    for bin_ in range(count):
        inside = squares[number == bin_]
        if len(inside):
            kept = max(1, len(inside) - int(_DELETED * len(inside) + 0.5))
            means = [inside[np.argsort(generator.random(len(inside)))[:kept]].mean() for _ in range(_DELETIONS)]
            scores[bin_] = inside.mean() + _SPREAD_WEIGHT * float(np.std(means))
    known = scores[~np.isnan(scores)]
    return np.where(np.isnan(scores), known.max() if len(known) else 0.0, scores)


def next_points(points: ArrayLike, squared_residuals: ArrayLike, count: int, generator: np.random.Generator) -> Floats:
    """[count, models]: bins drawn by softmax of their scores (temperature 0.07), angles uniform inside, radius uniform in [0.2, 0.8]."""
    C = np.asarray(points, dtype=np.float64)
    if C.ndim != 2 or C.shape[1] < 2:
        raise UserError(f"scalings of shape {list(C.shape)}; directions need two models or more.")
    scores = bin_scores(C, squared_residuals, generator) / _TEMPERATURE
    chance = np.exp(scores - scores.max())
    heights = np.cumsum(chance / chance.sum())
    per_angle, angles_count = bins_per_angle(C.shape[1]), C.shape[1] - 1
    radii, angles = [], []
    for _ in range(count):
        number = min(int(np.searchsorted(heights, generator.random(), side="right")), len(heights) - 1)
        place = np.array(np.unravel_index(number, (per_angle,) * angles_count), dtype=np.float64)
        angles.append((place + generator.random(angles_count)) / per_angle * np.pi / 2)
        radii.append(_RADII[0] + generator.random() * (_RADII[1] - _RADII[0]))
    return cartesian(radii, angles)


def _bin_numbers(C: Floats) -> Floats:
    per_angle = bins_per_angle(C.shape[1])
    _, angles = hyperspherical(C)
    place = np.clip((angles / (np.pi / 2) * per_angle).astype(np.int64), 0, per_angle - 1)
    numbers: Floats = np.ravel_multi_index(tuple(place.T), (per_angle,) * place.shape[1])
    return numbers


# -- nested ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Node:
    """A merge inside the nested variant: scalings of the original task vectors, what it scores, and what its tasks are worth."""

    scalings: Floats
    score: float
    preference: float


def leaves(scores: Sequence[float], preferences: Sequence[float] | None = None) -> tuple[Node, ...]:
    """One node per model: the model alone, with its score on its own task."""
    weights = [1.0] * len(scores) if preferences is None else list(preferences)
    if len(weights) != len(scores) or not scores:
        raise UserError(f"{len(weights)} preferences for {len(scores)} models; allowed is one each, and a model at least.")
    units = np.eye(len(scores))
    return tuple(Node(units[number], float(score), float(weights[number])) for number, score in enumerate(scores))


def closest_pair(scores: ArrayLike) -> tuple[int, int]:
    """Positions i < j of the two scores that are nearest to each other; the first such pair on ties."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError("a pair needs two scores at least.")
    i, j = np.triu_indices(len(values), k=1)
    nearest = int(np.argmin(np.abs(values[i] - values[j])))
    return int(i[nearest]), int(j[nearest])


def joined(nodes: Sequence[Node], pair: tuple[int, int], scaling: tuple[float, float], score: float) -> tuple[Node, ...]:
    """The nodes with a pair replaced by its merge at this scaling, which stands at the place of the first.

    Of n nodes n - 1 joins leave one, whose `scalings` are the answer. A side's objective is the score on its tasks, weighted by
    their preferences; the sides' summed preferences choose the point.
    """
    i, j = pair
    if not 0 <= i < j < len(nodes):
        raise UserError(f"the pair {pair} of {len(nodes)} nodes; allowed are two positions in order.")
    a, b = nodes[i], nodes[j]
    merged = Node(scaling[0] * a.scalings + scaling[1] * b.scalings, float(score), a.preference + b.preference)
    return tuple(merged if number == i else node for number, node in enumerate(nodes) if number != j)
