"""Genetic search with simulated binary crossover and polynomial mutation: one objective, or a whole front of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from modelglue.errors import UserError
from modelglue.search.decode import Decoder
from modelglue.search.nsga import Nsga, Variation
from modelglue.search.pareto import reference_directions
from modelglue.search.searcher import Needs, Outcome, Proposal, told
from modelglue.search.space import Params


class EvolutionSearch:
    """NSGA-II over the unit cube: on the run's objective (`objectives` = one), or on every task for itself (all), then it is a front.

    From three tasks on, `all` is NSGA-III. MERGE^3 and mergenetic search this way. `start` are members of the first generation.
    """

    def __init__(
        self, decoder: Decoder, *, population: int = 20, generations: int | None = None, objectives: Literal["one", "all"] = "one",
        seed: int = 0, start: Sequence[Params] = (), variation: Variation | None = None,
    ) -> None:  # fmt: skip
        if objectives not in ("one", "all"):
            raise UserError(f"objectives is '{objectives}'; allowed are one and all.")
        self._decoder, self._population, self._generations = decoder, population, generations
        self._seed, self._start, self._variation = seed, list(start), variation
        self._every = objectives == "all"
        self._nsga: Nsga = self._made(1)
        self._tasks: list[str] = []
        self._ids: dict[tuple[float, ...], int] = {}
        self._asked: list[tuple[float, ...]] = []

    @property
    def needs(self) -> Needs:
        return Needs(frozenset({"E1"}), "off") if self._every else Needs(racing="batch")

    def ask(self, n: int) -> list[Proposal]:
        self._asked = [tuple(point) for point in self._nsga.ask().tolist()]
        tag = "init" if self._nsga.generation == 0 else "child"
        parents = tuple(sorted({self._ids[tuple(point)] for point in self._nsga.points.tolist()}))
        found = []
        for point in self._asked:
            params = self._decoder.space.from_unit_cube(np.array(point))
            found.append(Proposal(self._decoder.candidate(params), params, parents, tag))
        return found

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self._ids |= {point: outcome.id for point, outcome in zip(self._asked, outcomes, strict=True)}
        if not self._every:
            self._nsga.tell(np.array(told(outcomes))[:, None])
            return
        if not self._tasks:
            self._tasks = next((list(outcome.tasks) for outcome in outcomes if outcome.tasks), [])
            if not self._tasks:
                raise UserError("no candidate of the first generation could be scored, so there are no objectives to evolve.")
            if len(self._tasks) > 2:
                self._nsga = self._made(len(self._tasks))
        rows = [[outcome.tasks.get(task, math.nan) if outcome.whole else math.nan for task in self._tasks] for outcome in outcomes]
        self._nsga.tell(np.array(rows))

    def done(self) -> bool:
        return self._generations is not None and self._nsga.generation >= self._generations

    def report(self) -> Mapping[str, Any]:
        return {"generations": self._nsga.generation, "population": self._population, "tasks": self._tasks}

    def _made(self, objectives: int) -> Nsga:
        space = self._decoder.space
        start = np.array([space.to_unit_cube(params) for params in self._start]).reshape(-1, space.dimensions)
        directions = None
        if objectives > 2:
            divisions = 1
            while math.comb(divisions + objectives, objectives - 1) <= self._population:
                divisions += 1
            directions = reference_directions(objectives, [divisions])
        low, high = np.zeros(space.dimensions), np.ones(space.dimensions)
        return Nsga(
            low, high, self._population, seed=self._seed, name="evolution", start=start, directions=directions, variation=self._variation
        )  # fmt: skip
