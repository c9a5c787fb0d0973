"""The heuristics of Model-GLUE (arXiv 2410.05357, algorithms 1 to 3) step by step, once the members are ranked.

A strategy holds no evaluator and no tensor. It is told outcomes in the order in which it asked; an empty list means that it is done.
Linear merges are flattened: every candidate is a combination of the original members. `heuristics` makes a searcher of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from modelglue.recipe import Candidate
from modelglue.search.ranking import Current, Ranking, Rule, candidate, gain
from modelglue.search.searcher import Outcome
from modelglue.search.selection import Round

#: chooses the next candidate from the remaining members (in ranking order), given the current coefficients
Chooser = Callable[[Sequence[str], Mapping[str, float]], str]


class Strategy(Protocol):
    """A strategy under way."""

    @property
    def current(self) -> Current:
        """The best merge so far."""

    @property
    def rounds(self) -> Sequence[Round]:
        """Decisions taken so far."""

    @property
    def deciding(self) -> bool:
        """Whether a round has begun and is not decided."""

    def ask(self) -> list[Candidate]:
        """Candidates to score next; empty when the search is over."""

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """What became of the candidates last asked for, in their order."""


class AverageSearch:
    """Heuristic-Average: add a member to the uniform average if the average does not get worse. n - 1 candidates."""

    def __init__(self, ranking: Ranking, rule: Rule) -> None:
        self.current = ranking.start()
        self.rounds: list[Round] = []
        self._rule = rule
        self._remaining = list(ranking.order[1:])

    deciding = False

    def ask(self) -> list[Candidate]:
        return [candidate(self._trial())] if self._remaining else []

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        (trial,) = outcomes
        weights = self._trial()
        alias = self._remaining.pop(0)
        improvement = gain(trial, self.current)
        accepted = self._rule.accepts(improvement, trial, self.current)
        if accepted:
            self.current = Current(weights, trial)
        self.rounds.append(Round(alias, None, None, shown(trial), accepted, self.current.value, improvement))

    def _trial(self) -> dict[str, float]:
        chosen = [alias for alias, weight in self.current.weights.items() if weight or alias == self._remaining[0]]
        return {alias: 1 / len(chosen) if alias in chosen else 0.0 for alias in self.current.weights}


class CoefficientSearch:
    """Heuristic-Coefficient and Heuristic-Similarity: blend one member after the other into the current merge.

    Each round tries every coefficient c of the grid for c x current + (1 - c) x member and keeps the best one; of
    equally good ones the largest. `choose` says which member is next; a rejected member does not come back.
    len(grid) x (n - 1) candidates. With `coarse` a round tries every other coefficient of the inner grid first, then the neighbours of
    the best: 4 or 5 of the usual 9.
    """

    def __init__(self, ranking: Ranking, rule: Rule, grid: Sequence[float], choose: Chooser, *, coarse: bool = False) -> None:
        self.current = ranking.start()
        self.rounds: list[Round] = []
        self._rule = rule
        self._grid = tuple(sorted(grid))
        self._coarse = coarse
        self._choose = choose
        self._remaining = list(ranking.order[1:])
        self._next = ""
        self._asked: list[float] = []
        self._trials: dict[float, Outcome] = {}

    @property
    def deciding(self) -> bool:
        return bool(self._trials)

    def ask(self) -> list[Candidate]:
        if not self._remaining:
            return []
        if not self._trials:
            self._next = self._choose(self._remaining, self.current.weights)
            self._asked = list(self._grid[2:-2:2] if self._coarse and len(self._grid) > 4 else self._grid)
        else:
            self._asked = self._neighbours()
        return [candidate(self.current.joined_by(self._next, coefficient)) for coefficient in self._asked]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self._trials |= dict(zip(self._asked, outcomes, strict=True))
        if self._coarse and self._neighbours() and len(self._asked) == len(self._trials):
            return
        coefficient, best = self._best()
        improvement = gain(best, self.current)
        accepted = self._rule.accepts(improvement, best, self.current)
        if accepted:
            self.current = Current(self.current.joined_by(self._next, coefficient), best)
        self._remaining.remove(self._next)
        self.rounds.append(
            Round(
                self._next,
                {str(c): shown(self._trials[c]) for c in sorted(self._trials)},
                coefficient if accepted else 1.0,
                shown(best),
                accepted,
                self.current.value,
                improvement,
            )
        )
        self._trials = {}

    def _best(self) -> tuple[float, Outcome]:
        return max(self._trials.items(), key=lambda trial: (trial[1].whole, trial[1].value, trial[0]))

    def _neighbours(self) -> list[float]:
        """What stands beside the best coefficient on the grid and was not tried."""
        place = self._grid.index(self._best()[0])
        return [c for c in self._grid[max(0, place - 1) : place + 2] if c not in self._trials]


def shown(outcome: Outcome) -> float:
    """The score; of a candidate that was given up on, its mean so far; 0 if there is none."""
    if outcome.whole:
        return outcome.value
    return outcome.scores.mean if outcome.status == "pruned" else 0.0


def in_order(remaining: Sequence[str], weights: Mapping[str, float]) -> str:
    """Best individual score first."""
    return remaining[0]


def by_similarity(similarity_to: Callable[[Mapping[str, float], str], float], *, highest: bool) -> Chooser:
    """The member most (or least) similar to the current merge; ties by ranking. What cannot be compared comes last."""

    def choose(remaining: Sequence[str], weights: Mapping[str, float]) -> str:
        kept = {alias: weight for alias, weight in weights.items() if weight}
        values = [similarity_to(kept, alias) for alias in remaining]
        keys = [float("-inf") if value != value else (value if highest else -value) for value in values]
        return remaining[keys.index(max(keys))]

    return choose
