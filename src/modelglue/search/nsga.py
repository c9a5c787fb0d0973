"""NSGA-II and NSGA-III: a population that approaches a Pareto front, one generation per ask and tell. Larger is better.

With one objective NSGA-II is an ordinary genetic algorithm. Every random number is drawn from (seed, searcher, generation, index), so a
search that is replayed asks for the same points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from modelglue.errors import UserError
from modelglue.search.item_response import Floats, Positions
from modelglue.search.pareto import crowding, fronts, non_dominated
from modelglue.search.randomness import draw, permutation, rng

#: so many times the population's pairs are tried for children that are new; then repetitions are taken
_ATTEMPTS = 5
Survival: TypeAlias = Callable[[Floats, int, np.random.Generator], Positions]


@dataclass(frozen=True)
class Variation:
    """How children differ from their parents: simulated binary crossover (SBX) and polynomial mutation (Deb and Agrawal 1995)."""

    crossover: float = 0.9
    """Share of pairs that are crossed."""
    crossover_eta: float = 15.0
    """Larger: children nearer to their parents."""
    mutation: float | None = None
    """Share of coordinates that are mutated; default 1 / dimensions."""
    mutation_eta: float = 20.0


class Nsga:
    """One search in a box: `ask` for the points of a generation, `tell` their objectives, until the budget is spent.

    `population` points per generation, `start` [any, dimensions] are the first of generation 0, the rest is uniform in the box.
    `directions` [any, objectives] makes it NSGA-III, without them it is NSGA-II. O(population^2) per generation.
    """

    def __init__(
        self, low: ArrayLike, high: ArrayLike, population: int, *, seed: int = 0, name: str = "nsga", start: ArrayLike | None = None,
        directions: ArrayLike | None = None, variation: Variation | None = None,
    ) -> None:  # fmt: skip
        self._low, self._high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        if self._low.ndim != 1 or self._low.shape != self._high.shape or not len(self._low) or not (self._low <= self._high).all():
            raise UserError("a search needs a box: as many lower as upper bounds, each lower one at most the upper one.")
        if population < 2:
            raise UserError(f"a population of {population}; allowed is a number from 2.")
        self._size, self._seed, self._name = population, seed, name
        self._start = np.zeros((0, len(self._low))) if start is None else np.asarray(start, dtype=np.float64)
        if self._start.ndim != 2 or self._start.shape[1] != len(self._low):
            raise UserError(f"starting points of shape {list(self._start.shape)}; allowed is [points, {len(self._low)}].")
        self._survival: Survival = survivors_by_crowding
        if directions is not None:
            rays = np.asarray(directions, dtype=np.float64)
            self._survival = lambda values, count, generator: survivors_by_niche(values, count, rays, generator)
        self._tournament: Literal["rank", "random"] = "rank" if directions is None else "random"
        self._variation = variation or Variation()
        self._asked: Floats | None = None
        self.generation = 0
        self.points: Floats = np.zeros((0, len(self._low)))
        """The population [n, dimensions]."""
        self.values: Floats | None = None
        """Its objectives [n, objectives]; None before the first generation was told."""

    def ask(self) -> Floats:
        """[population, dimensions]: the points of this generation. Asking again gives them again."""
        if self._asked is None:
            self._asked = self._first() if self.values is None else self._children()
        return self._asked

    def tell(self, values: ArrayLike) -> None:
        """Objectives [population, objectives] of what was asked, in the same order; NaN counts as the worst."""
        asked = self.ask()
        F = np.asarray(values, dtype=np.float64)
        if F.ndim != 2 or len(F) != len(asked) or (self.values is not None and F.shape[1] != self.values.shape[1]):
            raise UserError(
                f"objectives of shape {list(F.shape)} for {len(asked)} points; allowed is [points, objectives], always as many."
            )
        F = np.where(np.isnan(F), -np.inf, F)
        points, F = (asked, F) if self.values is None else (np.concatenate([self.points, asked]), np.concatenate([self.values, F]))
        kept = self._survival(F, min(self._size, len(F)), self._rng("survival"))
        self.points, self.values = points[kept], F[kept]
        self.generation += 1
        self._asked = None

    def front(self) -> tuple[Floats, Floats]:
        """(points, objectives) that nothing in the population dominates, without repetitions, in order of the objectives."""
        if self.values is None:
            raise UserError("nothing was told yet, so there is no front.")
        best = non_dominated(self.values)
        both = np.unique(np.concatenate([-self.values[best], self.points[best]], axis=1), axis=0)
        count = self.values.shape[1]
        return both[:, count:], -both[:, :count] + 0.0

    def _rng(self, *words: int | str) -> np.random.Generator:
        return rng(self._seed, self._name, self.generation, *words)

    def _first(self) -> Floats:
        given = self._start[: self._size]
        drawn = [self._rng(number).random(len(self._low)) for number in range(len(given), self._size)]
        fresh = self._low + np.array(drawn).reshape(-1, len(self._low)) * (self._high - self._low)
        points: Floats = np.clip(np.concatenate([given, fresh]), self._low, self._high)
        return points

    def _children(self) -> Floats:
        assert self.values is not None
        rank = _ranking(self.values) if self._tournament == "rank" else np.zeros(len(self.values))
        found: list[Floats] = []
        known = {tuple(point) for point in self.points.tolist()}
        for attempt in range(_ATTEMPTS * self._size):
            generator = self._rng(attempt)
            mother, father = (self.points[_winner(rank, generator)] for _ in range(2))
            for child in sbx(mother, father, self._low, self._high, self._variation, generator):
                mutant = polynomial_mutation(child, self._low, self._high, self._variation, generator)
                key = tuple(mutant.tolist())
                if key not in known or attempt >= (_ATTEMPTS - 1) * self._size:
                    known.add(key)
                    found.append(mutant)
            if len(found) >= self._size:
                break
        return np.stack(found[: self._size])


def maximise(function: Callable[[Floats], Floats], search: Nsga, generations: int) -> tuple[Floats, Floats]:
    """(points, objectives) of the front after so many generations of a function [n, dimensions] -> [n, objectives] that costs nothing."""
    for _ in range(generations):
        search.tell(function(search.ask()))
    return search.front()


# -- variation -------------------------------------------------------------------------------------------------------------------


def sbx(a: Floats, b: Floats, low: Floats, high: Floats, variation: Variation, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Two children of two points by simulated binary crossover within bounds: each coordinate is crossed with chance 1/2."""
    n = len(a)
    crossed, coordinate, swap, u = generator.random(), generator.random(n), generator.random(n), generator.random(n)
    lower, upper = np.minimum(a, b), np.maximum(a, b)
    width = upper - lower
    active = (coordinate <= 0.5) & (width > 1e-14) & (crossed <= variation.crossover)
    gap = np.where(active, width, 1.0)
    children = []
    for distance in (lower - low, high - upper):  # to the bound on the child's own side
        beta = 1 + 2 * distance / gap
        alpha = 2 - beta ** -(variation.crossover_eta + 1)
        inner = u <= 1 / alpha
        base = np.where(inner, u * alpha, 1 / np.maximum(2 - u * alpha, 1e-300))
        children.append(base ** (1 / (variation.crossover_eta + 1)))
    first = np.where(active, np.clip((lower + upper - children[0] * width) / 2, low, high), a)
    second = np.where(active, np.clip((lower + upper + children[1] * width) / 2, low, high), b)
    exchange = active & (swap <= 0.5)
    return np.where(exchange, second, first), np.where(exchange, first, second)


def polynomial_mutation(x: Floats, low: Floats, high: Floats, variation: Variation, generator: np.random.Generator) -> Floats:
    """The point with some coordinates moved within bounds; small moves are likelier."""
    chance = 1 / len(x) if variation.mutation is None else variation.mutation
    moved, u = generator.random(len(x)) < chance, generator.random(len(x))
    width = high - low
    active = moved & (width > 0)
    span = np.where(active, width, 1.0)
    power = variation.mutation_eta + 1
    down = (2 * u + (1 - 2 * u) * (1 - (x - low) / span) ** power) ** (1 / power) - 1
    up = 1 - (2 * (1 - u) + 2 * (u - 0.5) * (1 - (high - x) / span) ** power) ** (1 / power)
    return np.where(active, np.clip(x + np.where(u < 0.5, down, up) * span, low, high), x)


# -- survival --------------------------------------------------------------------------------------------------------------------


def survivors_by_crowding(values: Floats, count: int, generator: np.random.Generator | None = None) -> Positions:
    """NSGA-II: whole fronts as long as they fit, of the next those with the most room around them; the best come first."""
    kept: list[int] = []
    for front in fronts(values):
        room = crowding(_finite(values[front]))
        kept += [int(front[position]) for position in np.argsort(-room, kind="stable")]
        if len(kept) >= count:
            break
    return np.array(kept[:count], dtype=np.int64)


def survivors_by_niche(values: Floats, count: int, directions: Floats, generator: np.random.Generator) -> Positions:
    """NSGA-III (Deb and Jain 2014): whole fronts as long as they fit, of the next those along the emptiest reference directions."""
    ranked = fronts(values)
    considered = np.zeros(0, dtype=np.int64)
    kept: list[int] = []
    for front in ranked:
        kept = considered.tolist()
        considered = np.concatenate([considered, front])
        if len(considered) >= count:
            break
    if len(considered) <= count:
        return considered
    niche, distance = _associated(_normalised(_finite(values[considered]), len(ranked[0])), directions)
    crowd = np.bincount(niche[: len(kept)], minlength=len(directions))
    waiting = list(range(len(kept), len(considered)))
    while len(kept) < count:
        open_niches = np.unique(niche[waiting])
        emptiest = open_niches[crowd[open_niches] == crowd[open_niches].min()]
        chosen = int(emptiest[draw(generator, len(emptiest))])
        there = [position for position in waiting if niche[position] == chosen]
        if crowd[chosen] == 0:
            pick = min(there, key=lambda position: float(distance[position]))
        else:
            pick = there[permutation(generator, len(there))[0]]
        waiting.remove(pick)
        kept.append(int(considered[pick]))
        crowd[chosen] += 1
    return np.array(kept, dtype=np.int64)


def _normalised(values: Floats, first: int) -> Floats:
    """Distance from the ideal point in every objective, 1 at the intercepts of the plane through the extreme points.

    The first `first` points are the first front; its worst values stand in for intercepts where the plane has none.
    """
    G = values.max(axis=0) - values  # smaller is better from here on
    count = G.shape[1]
    weights = np.where(np.eye(count) == 1, 1.0, 1e6)
    extremes = G[[int((G * weight).max(axis=1).argmin()) for weight in weights]]
    nadir = G[:first].max(axis=0)
    try:
        intercepts = 1 / np.linalg.solve(extremes, np.ones(count))
        usable = bool((intercepts > 1e-6).all() and np.isfinite(intercepts).all() and (intercepts <= G.max(axis=0) + 1e-9).all())
    except np.linalg.LinAlgError:
        usable = False
    scale = intercepts if usable else nadir
    scaled: Floats = G / np.where(scale > 1e-12, scale, 1.0)
    return scaled


def _associated(G: Floats, directions: Floats) -> tuple[Positions, Floats]:
    """Nearest direction of every point, and the distance from it."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    along = G @ unit.T
    away = np.sqrt(np.maximum((G**2).sum(axis=1, keepdims=True) - along**2, 0.0))
    niche = away.argmin(axis=1)
    return niche, away[np.arange(len(G)), niche]


def _finite(values: Floats) -> Floats:
    """Failed points stand a step below the worst that did not fail."""
    finite = np.where(np.isfinite(values), values, np.nan)
    if not np.isnan(finite).any():
        return values
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min(axis=0)
    high = np.where(known, values, -np.inf).max(axis=0)
    floor = np.where(np.isfinite(low), low - np.maximum(high - low, 1.0), 0.0)
    return np.where(known, values, floor)


def _ranking(values: Floats) -> Floats:
    """[n]: place of every point, the best 0."""
    rank = np.zeros(len(values))
    rank[survivors_by_crowding(values, len(values))] = np.arange(len(values))
    return rank


def _winner(rank: Floats, generator: np.random.Generator) -> int:
    """Binary tournament; the first on ties."""
    a, b = draw(generator, len(rank)), draw(generator, len(rank))
    return a if rank[a] <= rank[b] else b
