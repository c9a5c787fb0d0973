"""Data-flow space: which layers a token passes, in which order, with which scales (arXiv 2403.13187).

A slot is a layer of a model in one of several repetitions of all layers; it is used or not, which is a yes or no and no number: the search
is CatCMA, which has categories and numbers in one distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from modelglue.errors import UserError
from modelglue.recipe import DATA_FLOW, Candidate
from modelglue.recipe.dataflow import FlowSpace, Hop
from modelglue.search.cma import LEAST_POPULATION
from modelglue.search.item_response import Floats
from modelglue.search.randomness import rng
from modelglue.search.searcher import Needs, Outcome, Proposal, ranked, told
from modelglue.search.space import Bool, Float, Parameter, Params, Space, When

#: chance that a slot of the starting path is used at first, and any other one
_ON, _OFF = 0.9, 0.1


def path_candidate(hops: Sequence[Hop], donor: str, recipes: Mapping[str, Any] | None = None) -> Candidate:
    """The model of a path; neighbours in a path are told apart by place, so every hop stands in the recipe.

    `recipes`: name -> recipe of those models that are no members but merges of them.
    """
    named = recipes or {}
    path = [{"model": named.get(hop.model, hop.model), "layer": hop.layer, "scale": hop.scale} for hop in hops]
    return Candidate.of({"method": DATA_FLOW, "base": named.get(donor, donor), "hops": path})


@dataclass(frozen=True)
class PathSpace:
    """Slots that are used or not, and the logarithm of a scale per used slot. Paths of more than `max_layers` hops are no models."""

    flow: FlowSpace
    max_layers: int | None = None
    scales: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest scale of a hop; (1, 1) searches the path alone."""
    recipes: Mapping[str, Any] = field(default_factory=dict)
    """Of those models that are merges of members."""

    @property
    def donor(self) -> str:
        """Gives embeddings, final norm and head."""
        return next(iter(self.flow.depths))

    @property
    def scaled(self) -> bool:
        return self.scales[0] < self.scales[1]

    @cached_property
    def space(self) -> Space:
        names = [f"{slot:04d}" for slot in range(self.flow.slots)]
        parameters: list[Parameter] = [Bool(f"use/{name}") for name in names]
        if self.scaled:
            parameters += [Float(f"scale/{name}", *self.scales, log=True, when=When(f"use/{name}", (True,))) for name in names]
        return Space(tuple(parameters))

    def candidate(self, params: Params) -> Candidate | None:
        names = [f"{slot:04d}" for slot in range(self.flow.slots)]
        used = [1.0 if params[f"use/{name}"] else -1.0 for name in names]
        scales = [params.get(f"scale/{name}", 1.0) for name in names]
        hops = self.flow.decode(used, scales)
        most = self.flow.most_layers if self.max_layers is None else self.max_layers
        return path_candidate(hops, self.donor, self.recipes) if 0 < len(hops) <= most else None

    def start(self) -> dict[str, Any]:
        """The first model as it is."""
        used = self.flow.start()
        found: dict[str, Any] = {f"use/{slot:04d}": bool(value > 0) for slot, value in enumerate(used)}
        if self.scaled:
            found |= {f"scale/{slot:04d}": 1.0 for slot in np.flatnonzero(used > 0).tolist()}
        return found


class DataFlowSearch:
    """CatCMA over slots and scales, from the first model as it is; a generation per ask. Paths that are no models rank last."""

    needs = Needs(racing="incumbent")

    def __init__(
        self, depths: Mapping[str, int], *, repeats: int = 3, max_layers: int | None = None, scales: tuple[float, float] = (0.5, 2.0),
        trials: int = 1000, population: int | None = None, seed: int = 0, recipes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        from cmaes import CatCMAwM

        if len(depths) < 1 or repeats < 1 or not 0 < scales[0] <= scales[1]:
            raise UserError(f"{len(depths)} models, {repeats} repetitions, scales {list(scales)}; allowed are 1 or more, scales above 0.")
        if population is not None and population < LEAST_POPULATION:
            raise UserError(f"a population of {population}; allowed are {LEAST_POPULATION} or more.")
        self._space = PathSpace(FlowSpace(dict(depths), repeats), max_layers, scales, recipes or {})
        self._seed, self._trials, self._count, self._generation = seed, trials, 0, 0
        slots = self._space.flow.slots
        used = self._space.flow.start() > 0
        chances = np.stack([np.where(used, 1 - _ON, 1 - _OFF), np.where(used, _ON, _OFF)], axis=1)
        numbers = {"x_space": [[0.0, 1.0]] * slots, "mean": np.full(slots, self._middle()), "sigma": 1 / 6} if self._space.scaled else {}
        self._optimiser = CatCMAwM(c_space=[2] * slots, cat_param=chances, population_size=population, seed=0, **numbers)
        self._population = self._optimiser.population_size
        self._asked: list[Any] = []
        self._start = self._space.space.canonical(self._space.start())
        self._extra = 0

    def ask(self, n: int) -> list[Proposal]:
        self._optimiser.reseed_rng(int(rng(self._seed, "dataflow", self._generation).integers(2**31)))
        extra = [Proposal(self._space.candidate(self._start), self._start, tag="init")] if self._generation == 0 else []
        self._extra = len(extra)
        self._asked = [self._optimiser.ask() for _ in range(self._population)]
        batch = [*extra, *(self._proposal(solution) for solution in self._asked)][: self._trials - self._count]
        self._count += len(batch)
        return batch

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        values = told(outcomes)
        if len(outcomes) == self._extra + self._population:
            self._optimiser.tell([(x, -value) for x, value in zip(self._asked, values[self._extra :], strict=True)])
        self._generation += 1

    def done(self) -> bool:
        return self._count >= self._trials or (self._space.scaled and bool(self._optimiser.should_stop()))

    def report(self) -> Mapping[str, Any]:
        return {"generations": self._generation, "slots": self._space.flow.slots, "donor": self._space.donor}

    def _proposal(self, solution: Any) -> Proposal:
        used: Floats = np.asarray(solution.c)[:, 1]
        point = np.concatenate([np.where(used > 0, 0.75, 0.25), *([np.asarray(solution.x)] if self._space.scaled else [])])
        params = self._space.space.from_unit_cube(point)
        return Proposal(self._space.candidate(params), params)

    def _middle(self) -> float:
        """Where a scale of 1 stands in the unit interval."""
        low, high = (math.log(scale) for scale in self._space.scales)
        return min(1.0, max(0.0, -low / (high - low))) if high > low else 0.5


#: what the best merge of the first half of a search is called among the models of the second
MERGED = "merged"


def after_parameters(outcomes: Sequence[Outcome], depths: Mapping[str, int], **options: Any) -> DataFlowSearch:
    """The data-flow search that follows one over parameters: its best merge joins the models, stands first, and is the start.

    As the paper chains the two. The merge is stored as it would be written. UserError if nothing could be scored.
    """
    candidates = (outcome.proposal.candidate for outcome in ranked(outcomes))
    best = next((one for one in candidates if one is not None and one.members[0] in depths), None)  # the base alone is no member
    if best is None:
        raise UserError("no merge could be scored, so there is none to continue with in data-flow space.")
    if best.alone is not None:
        return DataFlowSearch({best.alone: depths[best.alone], **depths}, **options)
    recipes = {MERGED: {**best.recipe, "dtype": {"store": "donor"}}}
    return DataFlowSearch({MERGED: depths[best.members[0]], **depths}, recipes=recipes, **options)
