"""The heuristics of Model-GLUE (arXiv 2410.05357, algorithms 1 to 3) as searchers: ask for candidates, tell scores.

A searcher holds no evaluator and no tensor. It is told the scores in the order in which it asked; an empty list means
that it is done.
Linear merges are flattened: every candidate is a combination of the original members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from modelglue.search.ranking import Current, Ranking, Rule, candidate, gain
from modelglue.search.selection import Round

if TYPE_CHECKING:
    from modelglue.recipe import Candidate, Scores

#: chooses the next candidate from the remaining members (in ranking order), given the current coefficients
Chooser = Callable[[Sequence[str], Mapping[str, float]], str]


class Searcher(Protocol):
    """A strategy under way."""

    @property
    def current(self) -> Current:
        """The best merge so far."""

    @property
    def rounds(self) -> Sequence[Round]:
        """Decisions taken so far."""

    def ask(self) -> list[Candidate]:
        """Candidates to score next; empty when the search is over."""

    def tell(self, scores: Sequence[Scores]) -> None:
        """Scores of the candidates last asked for, in their order."""


class AverageSearch:
    """Heuristic-Average: add a member to the uniform average if the average does not get worse. n - 1 candidates."""

    def __init__(self, ranking: Ranking, rule: Rule) -> None:
        self.current = ranking.start()
        self.rounds: list[Round] = []
        self._rule = rule
        self._remaining = list(ranking.order[1:])

    def ask(self) -> list[Candidate]:
        return [candidate(self._trial())] if self._remaining else []

    def tell(self, scores: Sequence[Scores]) -> None:
        (score,) = scores
        weights = self._trial()
        alias = self._remaining.pop(0)
        improvement = gain(score, self.current.scores)
        accepted = self._rule.accepts(improvement, score, self.current.scores)
        if accepted:
            self.current = Current(weights, score)
        self.rounds.append(Round(alias, None, None, score.mean, accepted, self.current.scores.mean, improvement))

    def _trial(self) -> dict[str, float]:
        chosen = [alias for alias, weight in self.current.weights.items() if weight or alias == self._remaining[0]]
        return {alias: 1 / len(chosen) if alias in chosen else 0.0 for alias in self.current.weights}


class CoefficientSearch:
    """Heuristic-Coefficient and Heuristic-Similarity: blend one member after the other into the current merge.

    Each round tries every coefficient c of the grid for c x current + (1 - c) x member and keeps the best one; of
    equally good ones the largest. `choose` says which member is next; a rejected member does not come back.
    len(grid) x (n - 1) candidates.
    """

    def __init__(self, ranking: Ranking, rule: Rule, grid: Sequence[float], choose: Chooser) -> None:
        self.current = ranking.start()
        self.rounds: list[Round] = []
        self._rule = rule
        self._grid = tuple(sorted(grid))
        self._choose = choose
        self._remaining = list(ranking.order[1:])
        self._next = ""

    def ask(self) -> list[Candidate]:
        if not self._remaining:
            return []
        self._next = self._choose(self._remaining, self.current.weights)
        return [candidate(self.current.joined_by(self._next, coefficient)) for coefficient in self._grid]

    def tell(self, scores: Sequence[Scores]) -> None:
        trials = list(zip(self._grid, scores, strict=True))
        coefficient, best = max(trials, key=lambda trial: (trial[1].mean, trial[0]))
        improvement = gain(best, self.current.scores)
        accepted = self._rule.accepts(improvement, best, self.current.scores)
        if accepted:
            self.current = Current(self.current.joined_by(self._next, coefficient), best)
        self._remaining.remove(self._next)
        self.rounds.append(
            Round(
                self._next,
                {str(c): score.mean for c, score in trials},
                coefficient if accepted else 1.0,
                best.mean,
                accepted,
                self.current.scores.mean,
                improvement,
            )
        )


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
