"""Run one strategy, or all of them, against an evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from modelglue.errors import RunError, UserError, did_you_mean
from modelglue.recipe import Candidate, Scorer, Scores
from modelglue.search.ranking import Accept, Ranking, Rule
from modelglue.search.selection import Selection
from modelglue.search.strategies import AverageSearch, CoefficientSearch, Searcher, by_similarity, in_order

Strategy = Literal["average", "coefficient", "similarity_highest", "similarity_lowest", "all"]
#: in this order they are run, and earlier ones win ties
STRATEGIES = ("average", "coefficient", "similarity_highest", "similarity_lowest")
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SimilarityTo = Callable[[Mapping[str, float], str], float]
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
    strategy: Strategy = "all",
    coefficients: Sequence[float] = GRID,
    accept: Accept = ">=",
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
    twice; n - 1 new ones for `average`, len(coefficients) x (n - 1) for each of the others.
    `on_event("select", fields)` is called after the ranking and after every round.
    """
    names = _names(strategy, similarity_to)
    grid = _grid(coefficients)
    if not members or len(set(members)) != len(members):
        raise UserError(f"members are {list(members)}; allowed is a list of at least one, each named once.")
    if accept not in get_args(Accept):
        raise UserError(f"accept is '{accept}'; allowed are {', '.join(get_args(Accept))}.{did_you_mean(accept, get_args(Accept))}")
    emit = on_event or _silent
    book = _Book(evaluator)
    ranking = Ranking({alias: book.score(Candidate.single(alias)) for alias in members})
    first = ranking.order[0]
    if book.is_nan(Candidate.single(first)):
        raise RunError(f"'{first}': its score is NaN and no other member scores above 0, so there is nothing to start from.")
    emit("select", {"strategy": None, "round": 0, "of": 0, "candidate": first, "score": ranking.individual[first]})

    selections = []
    for name in names:
        searcher = _searcher(name, ranking, Rule(accept), grid, similarity_to)
        selection = _run(name, searcher, ranking, book, emit)
        if confirm is not None:
            scores, warnings = _without_nan(confirm.evaluate(Candidate.linear(selection.weights)), selection.strategy)
            selection = replace(selection, confirmation=scores.mean, warnings=(*selection.warnings, *warnings))
        selections.append(selection)
    chosen = max(selections, key=lambda one: (one.score if one.confirmation is None else one.confirmation, one.score))
    return SelectResult(selections, chosen, len(book))


def _run(name: str, searcher: Searcher, ranking: Ranking, book: _Book, emit: Listener) -> Selection:
    singles = [Candidate.single(alias) for alias in ranking.members]
    asked: dict[str, Candidate] = {}
    for batch in iter(searcher.ask, []):
        asked |= {candidate.key: candidate for candidate in batch}
        searcher.tell([book.score(candidate) for candidate in batch])
        last = searcher.rounds[-1]
        emit(
            "select",
            {
                "strategy": name,
                "round": len(searcher.rounds),
                "of": len(ranking.members) - 1,
                "candidate": last.candidate,
                "accepted": last.accepted,
                "score": last.current,
            },
        )
    warnings = list(book.warnings([*singles, *asked.values()]))
    seen = {book.score(candidate).mean for candidate in [*singles, *asked.values()]}
    if len(ranking.members) > 1 and len(seen) == 1:
        warnings.append(f"proxy cannot tell these models apart: every candidate scores {seen.pop():.4f}.")
    final = searcher.current
    return Selection(
        strategy=name,
        order=ranking.order,
        individual=ranking.individual,
        weights=dict(final.weights),
        score=final.scores.mean,
        tasks=final.scores.tasks(),
        evaluations=len(asked.keys() - {candidate.key for candidate in singles}),
        rounds=tuple(searcher.rounds),
        warnings=tuple(warnings),
    )


def _searcher(name: str, ranking: Ranking, rule: Rule, grid: Sequence[float], similarity_to: SimilarityTo | None) -> Searcher:
    if name == "average":
        return AverageSearch(ranking, rule)
    if name == "coefficient":
        return CoefficientSearch(ranking, rule, grid, in_order)
    assert similarity_to is not None
    return CoefficientSearch(ranking, rule, grid, by_similarity(similarity_to, highest=name == "similarity_highest"))


@dataclass
class _Book:
    """Scores by candidate key, each asked for once; NaN is written as 0 with a warning."""

    evaluator: Scorer
    _scores: dict[str, Scores] = field(default_factory=dict)
    _warnings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _nan: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._scores)

    def score(self, candidate: Candidate) -> Scores:
        key = candidate.key
        if key not in self._scores:
            raw = self.evaluator.evaluate(candidate)
            self._scores[key], self._warnings[key] = _without_nan(raw, _describe(candidate))
            if math.isnan(raw.mean):
                self._nan.add(key)
        return self._scores[key]

    def is_nan(self, candidate: Candidate) -> bool:
        return candidate.key in self._nan

    def warnings(self, candidates: Sequence[Candidate]) -> Iterator[str]:
        """What was said about these candidates, each sentence once."""
        yield from dict.fromkeys(text for candidate in candidates for text in self._warnings[candidate.key])


def _silent(name: str, fields: dict[str, Any]) -> None:
    """Nobody listens."""


def _without_nan(scores: Scores, what: str) -> tuple[Scores, tuple[str, ...]]:
    if not math.isnan(scores.mean):
        return scores, tuple(scores.warnings)
    zero = Scores({task: dict.fromkeys(items, 0.0) for task, items in scores.items.items()}, scores.warnings)
    return zero, (*scores.warnings, f"{what}: its score is NaN; it counts as 0.")


def _describe(candidate: Candidate) -> str:
    return f"'{candidate.alone}'" if candidate.alone is not None else candidate.describe()


def _names(strategy: str, similarity_to: SimilarityTo | None) -> tuple[str, ...]:
    allowed = (*STRATEGIES, "all")
    if strategy not in allowed:
        raise UserError(f"strategy is '{strategy}'; allowed are {', '.join(allowed)}.{did_you_mean(strategy, allowed)}")
    names = STRATEGIES if strategy == "all" else (strategy,)
    if similarity_to is None and any(name.startswith("similarity") for name in names):
        raise UserError(f"strategy '{strategy}' needs the similarities of the members. Give similarity_to.")
    return names


def _grid(coefficients: Sequence[float]) -> list[float]:
    grid = sorted({float(value) for value in coefficients})
    if not grid or not all(0 < value < 1 for value in grid):
        raise UserError(f"coefficients are {list(coefficients)}; allowed are numbers between 0 and 1, at least one.")
    return grid
