"""Random search: what every other searcher has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.search.decode import Decoder
from modelglue.search.randomness import rng
from modelglue.search.searcher import Needs, Outcome, Proposal
from modelglue.search.space import Params


class RandomSearch:
    """Points drawn uniformly from the unit cube, one generator per trial, after those of `start`; without `trials`, for ever."""

    needs = Needs(racing="batch")

    def __init__(self, decoder: Decoder, *, seed: int = 0, trials: int | None = None, start: Sequence[Params] = ()) -> None:
        self._decoder, self._seed, self._trials = decoder, seed, trials
        self._start = [decoder.space.canonical(params) for params in start]
        self._count = 0

    def ask(self, n: int) -> list[Proposal]:
        end = self._count + n if self._trials is None else min(self._count + n, self._trials)
        batch = [self._proposal(number) for number in range(self._count, end)]
        self._count = max(end, self._count)
        return batch

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing is learnt."""

    def done(self) -> bool:
        return self._trials is not None and self._count >= self._trials

    def report(self) -> Mapping[str, Any]:
        return {}

    def _proposal(self, number: int) -> Proposal:
        if number < len(self._start):
            return Proposal(self._decoder.candidate(self._start[number]), self._start[number], tag="init")
        space = self._decoder.space
        params = space.from_unit_cube(rng(self._seed, "random", number).random(space.dimensions))
        return Proposal(self._decoder.candidate(params), params, tag="random")
