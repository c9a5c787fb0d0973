"""Top-k greedy merging with model kinship (arXiv 2410.12613): merge the best with each other, and now and then with a distant relative."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from modelglue.errors import UserError
from modelglue.methods import get
from modelglue.recipe import Candidate
from modelglue.search.searcher import Needs, Outcome, Proposal

#: coefficients of two merges over the members -> their kinship
KinshipOf: TypeAlias = Callable[[Mapping[str, float], Mapping[str, float]], float]
#: the best are so alike that merging them changes nothing any more
STOP_KINSHIP = 0.95


@dataclass(frozen=True)
class Relative:
    """A model of the pool."""

    id: int
    candidate: Candidate
    weights: Mapping[str, float]
    """Over the members; of a merge that is no linear one the mean of its parents', which it is near."""
    value: float
    parents: tuple[int, ...] = ()


class KinshipGreedySearch:
    """Generations: merge every pair of the `k` best that was not merged yet, and (`explore`) the best with its most distant relative.

    `method` is any two-model method: `slerp` (t = 0.5), `linear`, or one with weights and a `base`, at 0.5 each. Ends when the k best
    did not change, or their mean kinship exceeds `stop_kinship`. At most k (k - 1) / 2 + 1 candidates per generation.
    """

    needs = Needs(racing="off")

    def __init__(
        self, members: Sequence[str], *, kinship: KinshipOf | None = None, k: int = 3, explore: bool = True, method: str = "slerp",
        base: str | None = None, stop_kinship: float = STOP_KINSHIP,
    ) -> None:  # fmt: skip
        if k < 2 or len(members) < 2:
            raise UserError(f"the {k} best of {len(members)} members; allowed are 2 or more of 2 or more.")
        if kinship is None and explore:
            raise UserError("exploring needs the kinship of the members, and with it a base. Give it, or set explore to false.")
        if method != "slerp" and (get(method).max_models or 2) < 2:
            raise UserError(f"{method} does not merge two models. Choose slerp, linear, or a method with a weight per model.")
        if get(method).needs_base and method != "slerp" and base is None:
            raise UserError(f"{method} needs a base. Name it.")
        self._members, self._kinship, self._k, self._explore = list(members), kinship, k, explore
        self._method, self._base, self._stop = method, base, stop_kinship
        self._pool: list[Relative] = []
        self._merged: set[frozenset[int]] = set()
        self._asked: list[tuple[Proposal, dict[str, float]]] = []
        self._best: tuple[int, ...] = ()
        self._finished = False
        self._generations: list[dict[str, Any]] = []

    def ask(self, n: int) -> list[Proposal]:
        if not self._pool:
            self._asked = [(Proposal(Candidate.single(alias), tag="member"), {alias: 1.0}) for alias in self._members]
        else:
            best = self._top()
            pairs = [(a, b, "child") for a, b in itertools.combinations(best, 2)]
            distant = self._distant(best[0]) if self._explore else None
            if distant is not None:
                pairs.append((best[0], distant, "explore"))
            self._asked = []
            for a, b, tag in pairs:
                pair = frozenset((a.id, b.id))
                if pair not in self._merged:
                    self._merged.add(pair)
                    self._asked.append((Proposal(self._merge(a, b), {}, (a.id, b.id), tag), _mean(a.weights, b.weights)))
        return [proposal for proposal, _ in self._asked]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        known = {relative.candidate.key for relative in self._pool}
        for outcome, (proposal, weights) in zip(outcomes, self._asked, strict=True):
            assert proposal.candidate is not None
            if outcome.whole and proposal.candidate.key not in known:
                self._pool.append(Relative(outcome.id, proposal.candidate, weights, outcome.merit, proposal.parents))
        if not self._pool:
            raise UserError("none of the members could be scored, so there is nothing to merge.")
        best = self._top()
        kinship = self._mean_kinship(best)
        self._generations.append({"best": [relative.id for relative in best], "kinship": kinship, "value": best[0].value})
        unchanged = tuple(relative.id for relative in best) == self._best
        self._finished = unchanged or (kinship is not None and kinship > self._stop)
        self._best = tuple(relative.id for relative in best)

    def done(self) -> bool:
        return self._finished

    def report(self) -> Mapping[str, Any]:
        tree = [{"id": one.id, "parents": list(one.parents), "value": one.value, "weights": dict(one.weights)} for one in self._pool]
        return {"generations": self._generations, "family": tree}

    def _top(self) -> list[Relative]:
        return sorted(self._pool, key=lambda relative: (-relative.value, relative.id))[: self._k]

    def _distant(self, one: Relative) -> Relative | None:
        """The pool's member of lowest kinship with which `one` was not merged; the earlier on ties."""
        assert self._kinship is not None
        rest = [other for other in self._pool if other.id != one.id and frozenset((one.id, other.id)) not in self._merged]
        found = [(self._kinship(one.weights, other.weights), other.id, other) for other in rest]
        known = [entry for entry in found if not math.isnan(entry[0])]
        return min(known, key=lambda entry: entry[:2])[2] if known else None

    def _mean_kinship(self, best: Sequence[Relative]) -> float | None:
        if self._kinship is None or len(best) < 2:
            return None
        found = [self._kinship(a.weights, b.weights) for a, b in itertools.combinations(best, 2)]
        known = [value for value in found if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else None

    def _merge(self, a: Relative, b: Relative) -> Candidate:
        if self._method == "linear":
            return Candidate.linear(_mean(a.weights, b.weights))
        models = [_input(a.candidate), _input(b.candidate)]
        if self._method == "slerp":
            return Candidate.of({"method": "slerp", "base": models[0], "models": [{"model": models[1]}], "parameters": {"t": 0.5}})
        recipe: dict[str, Any] = {"method": self._method, "models": [{"model": model, "weight": 0.5} for model in models]}
        return Candidate.of(recipe if self._base is None else {**recipe, "base": self._base})


def _input(candidate: Candidate) -> Any:
    """A candidate as an input of another merge."""
    return candidate.alone or candidate.recipe


def _mean(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {alias: (a.get(alias, 0.0) + b.get(alias, 0.0)) / 2 for alias in dict.fromkeys((*a, *b))}
