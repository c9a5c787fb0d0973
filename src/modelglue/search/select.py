"""Run one strategy, or all of them, against an evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modelglue.errors import RunError
from modelglue.recipe import Candidate, Scorer, Scores
from modelglue.search.heuristics import GRID, HeuristicSearch, SimilarityTo, StrategyName
from modelglue.search.ranking import Accept, outcome_of
from modelglue.search.searcher import Outcome
from modelglue.search.selection import Selection

#: event name and its fields
Listener = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class SelectResult:
    """Every strategy's selection, in the order of STRATEGIES, and the one that counts."""

    selections: list[Selection]
    chosen: Selection
    evaluations: int
    """Distinct candidates of all strategies together, members themselves included."""

    def to_json(self) -> dict[str, Any]:
        return {
            "strategies": [selection.to_json() for selection in self.selections],
            "chosen": self.chosen.strategy,
            "evaluations": self.evaluations,
        }


def select(
    members: Sequence[str],
    evaluator: Scorer,
    *,
    strategy: StrategyName = "all",
    coefficients: Sequence[float] = GRID,
    accept: Accept = ">=",
    coarse: bool = False,
    similarity_to: SimilarityTo | None = None,
    confirm: Scorer | None = None,
    on_event: Listener | None = None,
) -> SelectResult:
    """Which members of a family to merge, with which coefficients, by measuring candidates.

    Members are ranked by their own scores; the best one is always in. `average` and `coefficient` offer the others in
    that order, `similarity_highest` and `similarity_lowest` by `similarity_to(weights, alias)`, the similarity between
    the current merge and a member. `accept`: a trial replaces the current merge if its score is >= (published), >, or
    significantly better (95 % paired bootstrap interval above 0).

    `all` runs the four and chooses the best score; equal scores: the earlier in STRATEGIES. With a `confirm` evaluator
    (items that the search has not seen) every strategy's winner is scored on it once, and the best confirmation counts;
    equal confirmations: the better search score, then the earlier strategy.

    A score that is NaN counts as 0, with a warning; NaN for the best member is an error. No candidate is asked for
    twice; n - 1 new ones for `average`, len(coefficients) x (n - 1) for each of the others, about half of them with `coarse`.
    `on_event("select", fields)` is called after the ranking and after every round.
    """
    searcher = HeuristicSearch(members, strategy, coefficients, accept, coarse, similarity_to)
    emit = on_event or _silent
    book = _Book(evaluator)
    for batch in iter(lambda: searcher.ask(1), []):
        ranked = searcher.ranking is not None
        searcher.tell([book.outcome(proposal.candidate) for proposal in batch if proposal.candidate is not None])
        if ranked:
            _tell_of(searcher, len(members), emit)
            continue
        assert searcher.ranking is not None
        first = searcher.ranking.order[0]
        if book.is_nan(Candidate.single(first)):
            raise RunError(f"'{first}': its score is NaN and no other member scores above 0, so there is nothing to start from.")
        emit("select", {"strategy": None, "round": 0, "of": 0, "candidate": first, "score": searcher.ranking.individual[first]})

    singles = [Candidate.single(alias).key for alias in members]
    selections = []
    for selection in searcher.selections():
        keys = list(dict.fromkeys([*singles, *searcher.asked[selection.strategy]]))
        warnings = [*book.warnings(keys), *_indistinct({book.value(key) for key in keys}, len(members))]
        selection = replace(selection, warnings=tuple(warnings))
        if confirm is not None:
            scores, more = _without_nan(confirm.evaluate(Candidate.linear(selection.weights)), selection.strategy)
            selection = replace(selection, confirmation=scores.mean, warnings=(*selection.warnings, *more))
        selections.append(selection)
    chosen = max(selections, key=lambda one: (one.score if one.confirmation is None else one.confirmation, one.score))
    return SelectResult(selections, chosen, len(book))


def _tell_of(searcher: HeuristicSearch, members: int, emit: Listener) -> None:
    assert searcher.running is not None
    rounds = searcher.running.rounds
    if searcher.running.deciding:
        return
    last = rounds[-1]
    emit(
        "select",
        {
            "strategy": searcher.name, "round": len(rounds), "of": members - 1, "candidate": last.candidate, "accepted": last.accepted,
            "score": last.current,
        },
    )  # fmt: skip


def _indistinct(values: set[float], members: int) -> list[str]:
    if members == 1 or len(values) > 1:
        return []
    return [f"proxy cannot tell these models apart: every candidate scores {values.pop():.4f}."]


@dataclass
class _Book:
    """Scores by candidate key, each asked for once; NaN is written as 0 with a warning."""

    evaluator: Scorer
    _scores: dict[str, Scores] = field(default_factory=dict)
    _warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _nan: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._scores)

    def outcome(self, candidate: Candidate) -> Outcome:
        key = candidate.key
        if key not in self._scores:
            raw = self.evaluator.evaluate(candidate)
            self._scores[key], self._warnings[key] = _without_nan(raw, _describe(candidate))
            if math.isnan(raw.mean):
                self._nan.add(key)
        return outcome_of(candidate, self._scores[key])

    def value(self, key: str) -> float:
        return self._scores[key].mean

    def is_nan(self, candidate: Candidate) -> bool:
        return candidate.key in self._nan

    def warnings(self, keys: Sequence[str]) -> Iterator[str]:
        """What was said about these candidates, each sentence once."""
        yield from dict.fromkeys(text for key in keys for text in self._warnings[key])


def _silent(name: str, fields: dict[str, Any]) -> None:
    """Nobody listens."""


def _without_nan(scores: Scores, what: str) -> tuple[Scores, tuple[str, ...]]:
    if not math.isnan(scores.mean):
        return scores, tuple(scores.warnings)
    zero = Scores({task: dict.fromkeys(items, 0.0) for task, items in scores.items.items()}, scores.warnings)
    return zero, (*scores.warnings, f"{what}: its score is NaN; it counts as 0.")


def _describe(candidate: Candidate) -> str:
    return f"'{candidate.alone}'" if candidate.alone is not None else candidate.describe()
