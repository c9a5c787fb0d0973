"""CMA-ES over a search space's unit cube."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from modelglue.errors import UserError
from modelglue.search.decode import Decoder
from modelglue.search.distributions import Distribution, Mixed, Numbers, Sample
from modelglue.search.randomness import rng
from modelglue.search.searcher import Needs, Outcome, Proposal, told
from modelglue.search.space import Choice, Int, Params

#: the setting of the evolutionary strategy of Model-GLUE (arXiv 2410.05357)
TRIALS, SIGMA = 200, 1 / 6
#: dimensions above which the covariance of two of them is not learned
MANY = 100
Covariance: TypeAlias = Literal["auto", "full", "diagonal"]
#: with fewer there is no covariance to learn
LEAST_POPULATION = 4


def population_for(dimensions: int) -> int:
    """round(4 + 3 ln N)."""
    return int(4 + 3 * np.log(dimensions) + 0.5)


class CmaSearch:
    """Covariance matrix adaptation (Hansen), one generation per ask, as Model-GLUE sets it.

    `covariance`: `full`; `diagonal` (separable, time O(dimensions)); `auto`: diagonal above 100 dimensions. A space with whole numbers or
    choices is searched by CatCMA with margin, whatever that says: a joint distribution of numbers and categories.

    Starts at the middle of the cube, or at `start`, with a step of a sixth of every range. Without `start` the first trial is uniformly
    random and told to nobody; with it, `start` itself is scored first. Points outside are drawn again up to 10 x dimensions times, then
    clipped. Ends after `trials` candidates (a generation that is cut short is scored and not told), when the distribution has collapsed,
    or after `patience` generations without a new best.
    Time: O(dimensions^3) per generation at worst; memory O(dimensions^2).
    """

    needs = Needs(racing="batch")

    def __init__(
        self, decoder: Decoder, *, seed: int = 42, trials: int | None = TRIALS, population: int | None = None, sigma: float = SIGMA,
        start: Params | None = None, patience: int | None = None, least: int = 0, name: str = "cma", covariance: Covariance = "auto",
    ) -> None:  # fmt: skip
        if covariance not in get_args(Covariance):
            raise UserError(f"covariance is '{covariance}'; allowed are {', '.join(get_args(Covariance))}.")
        space = decoder.space
        self._decoder, self._seed, self._trials, self._name = decoder, seed, trials, name
        self._dimensions = space.dimensions
        self._population = population or population_for(self._dimensions)
        if self._population < LEAST_POPULATION or not sigma > 0:
            raise UserError(
                f"a population of {self._population} with a step of {sigma:g}; allowed are {LEAST_POPULATION} or more, and a step above 0."
            )
        self._start = None if start is None else space.canonical(start)
        mean = None if start is None else space.to_unit_cube(start)
        self._optimiser: Distribution
        if any(isinstance(parameter, Int | Choice) for parameter in space.parameters):
            self._optimiser = Mixed(space, mean, sigma, self._population)
        else:
            diagonal = covariance == "diagonal" or (covariance == "auto" and self._dimensions > MANY)
            self._optimiser = Numbers(self._dimensions, mean, sigma, self._population, diagonal=diagonal)
        self._patience, self._least = patience, least
        self._asked: list[Sample] = []
        self._extra = 0
        self._count = 0
        self._generation = 0
        self._best = -np.inf
        self._since_best = 0
        self._parents: tuple[int, ...] = ()

    def lasting(self, least: int, generations: int, most: int) -> CmaSearch:
        """The same, for `least` trials or so many generations, whichever is more; then until `patience` or `most` trials end it."""
        if self._trials is None:
            self._least = max(least, generations * self._population) + 1  # the start is one more
            self._trials = max(most, self._least)
        return self

    def ask(self, n: int) -> list[Proposal]:
        self._optimiser.reseed(int(rng(self._seed, self._name, self._generation).integers(2**31)))
        extra: list[Proposal] = []
        if self._generation == 0 and self._start is not None:
            extra = [self._proposal(self._start, "init")]
        elif self._generation == 0:
            drawn = rng(self._seed, self._name, "first").random(self._dimensions)
            extra = [self._proposal(self._decoder.space.from_unit_cube(drawn), "random")]
        self._extra = len(extra)
        self._asked = [self._optimiser.ask() for _ in range(self._population)]
        children = [self._decoder.space.from_unit_cube(sample.point) for sample in self._asked]
        batch = [*extra, *(self._proposal(params, "child") for params in children)]
        left = len(batch) if self._trials is None else self._trials - self._count
        self._count += len(batch[:left])
        return batch[:left]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        values = told(outcomes)
        if len(outcomes) == self._extra + self._population:
            self._optimiser.tell(list(zip(self._asked, values[self._extra :], strict=True)))
        best = max((outcome.merit for outcome in outcomes if outcome.whole), default=-np.inf)
        self._since_best = 0 if best > self._best else self._since_best + 1
        self._best = max(self._best, best)
        self._generation += 1
        ranked = sorted(outcomes[self._extra :], key=lambda outcome: (-outcome.value, outcome.id))
        self._parents = tuple(outcome.id for outcome in ranked[: self._population // 2])

    def done(self) -> bool:
        if self._trials is not None and self._count >= self._trials:
            return True
        if self._patience is not None and self._since_best >= self._patience and self._count >= self._least:
            return True
        return self._optimiser.collapsed()

    def report(self) -> Mapping[str, Any]:
        return {
            "generations": self._generation, "population": self._population, "dimensions": self._dimensions,
            "distribution": self._optimiser.kind,
        }  # fmt: skip

    def _proposal(self, params: Params, tag: str) -> Proposal:
        return Proposal(self._decoder.candidate(params), params, self._parents if tag == "child" else (), tag)


#: what came so far -> the searcher that goes on from there
Stage = Callable[[Sequence[Outcome]], Any]


class StagedSearch:
    """Searchers one after the other, each made from what the ones before it found."""

    def __init__(self, *stages: Stage) -> None:
        self._stages = list(stages)
        self._outcomes: list[Outcome] = []
        self._reports: list[Mapping[str, Any]] = []
        self._current = self._stages.pop(0)([])

    @property
    def needs(self) -> Needs:
        needs: Needs = self._current.needs
        return needs

    def ask(self, n: int) -> list[Proposal]:
        while True:
            batch = [] if self._current.done() else list(self._current.ask(n))
            if batch or not self._stages:
                return batch
            self._reports.append(self._current.report())
            self._current = self._stages.pop(0)(self._outcomes)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes += outcomes
        self._current.tell(outcomes)

    def done(self) -> bool:
        return not self._stages and bool(self._current.done())

    def report(self) -> Mapping[str, Any]:
        return {"stages": [*self._reports, self._current.report()]}
