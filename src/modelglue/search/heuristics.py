"""The strategies of Model-GLUE as one searcher: rank the members, then blend them one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from modelglue.errors import UserError, did_you_mean
from modelglue.recipe import Candidate
from modelglue.search.ranking import Accept, Ranking, Rule
from modelglue.search.searcher import Needs, Outcome, Proposal
from modelglue.search.selection import Selection
from modelglue.search.strategies import AverageSearch, Chooser, CoefficientSearch, Strategy, by_similarity, in_order

StrategyName: TypeAlias = Literal["average", "coefficient", "similarity_highest", "similarity_lowest", "all"]
#: in this order they are run, and earlier ones win ties
STRATEGIES = ("average", "coefficient", "similarity_highest", "similarity_lowest")
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: (coefficients of a merge, member) -> how similar they are
SimilarityTo: TypeAlias = Callable[[Mapping[str, float], str], float]


@dataclass
class HeuristicSearch:
    """Members are scored alone first; then each strategy of `names` walks through them. Every candidate is a flat linear merge.

    Candidates of a round race against each other: only the best of a round matters. n + n - 1 candidates for `average`,
    n + len(grid) (n - 1) for the others (about half with `coarse`).
    """

    members: Sequence[str]
    strategy: StrategyName = "all"
    grid: Sequence[float] = GRID
    accept: Accept = ">="
    coarse: bool = False
    similarity_to: SimilarityTo | None = None

    ranking: Ranking | None = field(default=None, init=False)
    finished: list[tuple[str, Strategy]] = field(default_factory=list, init=False)
    """Strategies that are over, with their names."""
    asked: dict[str, set[str]] = field(default_factory=dict, init=False)
    """Strategy -> keys of the candidates that it asked for."""

    def __post_init__(self) -> None:
        members = list(self.members)
        if not members or len(set(members)) != len(members):
            raise UserError(f"members are {members}; allowed is a list of at least one, each named once.")
        if self.accept not in get_args(Accept):
            hint = did_you_mean(self.accept, get_args(Accept))
            raise UserError(f"accept is '{self.accept}'; allowed are {', '.join(get_args(Accept))}.{hint}")
        self.grid = checked_grid(self.grid)
        self._names = list(strategy_names(self.strategy, self.similarity_to))
        self._running: Strategy | None = None

    @property
    def needs(self) -> Needs:
        if self.ranking is None or self._running is None:
            return Needs(racing="off")
        return Needs(racing="batch", rival=self._running.current.outcome.id)

    @property
    def name(self) -> str | None:
        """The strategy that is under way, or None while members are ranked and when all is over."""
        return self._names[len(self.finished)] if self.ranking is not None and len(self.finished) < len(self._names) else None

    def ask(self, n: int) -> list[Proposal]:
        if self.ranking is None:
            return [Proposal(Candidate.single(alias), tag="member") for alias in self.members]
        while (name := self.name) is not None:
            if self._running is None:
                self._running = self._start(name, self.ranking)
                self.asked[name] = set()
            if batch := self._running.ask():
                self.asked[name] |= {candidate.key for candidate in batch}
                return [Proposal(candidate, _params(candidate), tag=name) for candidate in batch]
            self.finished.append((name, self._running))
            self._running = None
        return []

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        if self.ranking is None:
            self.ranking = Ranking(dict(zip(self.members, outcomes, strict=True)))
        else:
            assert self._running is not None, "told what was not asked"
            self._running.tell(outcomes)

    def done(self) -> bool:
        return False

    @property
    def running(self) -> Strategy | None:
        return self._running

    def report(self) -> dict[str, Any]:
        return {"strategies": [selection.to_json() for selection in self.selections()]}

    def selections(self) -> list[Selection]:
        """What every finished strategy chose, and how."""
        singles = {Candidate.single(alias).key for alias in self.members}
        return [
            _selection(name, strategy, self.ranking, len(self.asked[name] - singles)) for name, strategy in self.finished if self.ranking
        ]

    def _start(self, name: str, ranking: Ranking) -> Strategy:
        if name == "average":
            return AverageSearch(ranking, Rule(self.accept))
        choose: Chooser = in_order
        if name != "coefficient":
            assert self.similarity_to is not None
            choose = by_similarity(self.similarity_to, highest=name == "similarity_highest")
        return CoefficientSearch(ranking, Rule(self.accept), self.grid, choose, coarse=self.coarse)


def _params(candidate: Candidate) -> dict[str, Any]:
    return {"weights": dict(zip(candidate.members, candidate.weights, strict=True))}


def _selection(name: str, strategy: Strategy, ranking: Ranking, evaluations: int) -> Selection:
    final = strategy.current
    return Selection(
        strategy=name,
        order=ranking.order,
        individual=ranking.individual,
        weights=dict(final.weights),
        score=final.value,
        tasks=dict(final.outcome.tasks),
        evaluations=evaluations,
        rounds=tuple(strategy.rounds),
    )


def strategy_names(strategy: str, similarity_to: SimilarityTo | None) -> tuple[str, ...]:
    """The strategies that a name means. UserError for an unknown one, and where similarities are needed and missing."""
    allowed = (*STRATEGIES, "all")
    if strategy not in allowed:
        raise UserError(f"strategy is '{strategy}'; allowed are {', '.join(allowed)}.{did_you_mean(strategy, allowed)}")
    names = STRATEGIES if strategy == "all" else (strategy,)
    if similarity_to is None and any(name.startswith("similarity") for name in names):
        raise UserError(f"strategy '{strategy}' needs the similarities of the members. Give similarity_to.")
    return names


def checked_grid(coefficients: Sequence[float]) -> list[float]:
    """Coefficients in order, each once; UserError for one outside of (0, 1)."""
    grid = sorted({float(value) for value in coefficients})
    if not grid or not all(0 < value < 1 for value in grid):
        raise UserError(f"coefficients are {list(coefficients)}; allowed are numbers between 0 and 1, at least one.")
    return grid
