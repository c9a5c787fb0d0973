"""Recycling checkpoints: one linear combination of everything that a training effort left behind (arXiv 2412.04144)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from modelglue.recipe import Candidate
from modelglue.search.cma import CmaSearch, StagedSearch
from modelglue.search.decode import MergeSpace
from modelglue.search.evolution import EvolutionSearch
from modelglue.search.heuristics import HeuristicSearch
from modelglue.search.searcher import Needs, Outcome, Proposal


class RecyclingSearch(StagedSearch):
    """First the uniform average, every checkpoint alone and the greedy soup; then CMA-ES over the coefficients from uniform.

    `objectives` = all searches the front over tasks with NSGA-II instead. `allow_negative` lets coefficients run from -1 to 1 before they
    are normalised. `trials` are those of the optimiser alone.
    """

    def __init__(
        self, members: Sequence[str], *, trials: int = 100, seed: int = 0, allow_negative: bool = False,
        objectives: Literal["one", "all"] = "one",
    ) -> None:  # fmt: skip
        ranges = {"weight": [-1.0, 1.0]} if allow_negative else {}
        space = MergeSpace("linear", tuple(members), parameters=ranges)
        uniform = space.everywhere({"weight": dict.fromkeys(members, 1 / len(members))})

        def optimiser(_: Sequence[Outcome]) -> CmaSearch | EvolutionSearch:
            if objectives == "all":
                return EvolutionSearch(space, objectives="all", seed=seed, start=[uniform], generations=-(-trials // 20))
            return CmaSearch(space, seed=seed, trials=trials, start=uniform, name="recycling")

        super().__init__(
            lambda _: _Uniform(members),
            lambda _: HeuristicSearch(members, "average"),
            optimiser,
        )


class _Uniform:
    """The uniform average."""

    needs = Needs(racing="off")

    def __init__(self, members: Sequence[str]) -> None:
        self._members = members
        self._asked = False

    def ask(self, n: int) -> list[Proposal]:
        self._asked = True
        return [Proposal(Candidate.linear(dict.fromkeys(self._members, 1.0)), tag="init")]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing follows from it."""

    def done(self) -> bool:
        return self._asked

    def report(self) -> Mapping[str, Any]:
        return {}
