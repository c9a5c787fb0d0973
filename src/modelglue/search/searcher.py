"""What every search method is: something that is asked for candidates and told what they are worth.

A searcher holds no evaluator, no clock and no store. What it asks is a function of its settings, its seed and what it was told, in that
order; that is why a run can be resumed by telling it everything again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Evaluator, Level, Scores, Status

#: `batch`: what is asked together races against each other and the best so far; `incumbent`: against the best so far alone; `off`: every
#: score must be whole
Racing: TypeAlias = Literal["off", "incumbent", "batch"]
#: how much a loss may count beside a score: less than the smallest step of any score
_TIE = 1e-9
#: a level brings those before it: who scores any items has items, who has items has tasks
_BROUGHT: Mapping[Level, tuple[Level, ...]] = {"E0": (), "E1": ("E0",), "E2": ("E1", "E0"), "E3": ("E2", "E1", "E0"), "E4": ()}


@dataclass(frozen=True)
class Needs:
    """What a searcher needs of the evaluator, and how its candidates may be scored."""

    levels: frozenset[Level] = frozenset({"E0"})
    racing: Racing = "incumbent"
    rival: int | None = None
    """Id of the candidate that those asked for now have to beat; default: the best so far."""

    def check(self, evaluator: Evaluator, who: str) -> None:
        """UserError if the evaluator offers less than is needed."""
        missing = sorted(self.levels - offered(evaluator))
        if missing:
            raise UserError(
                f"{who} needs an evaluator of level {', '.join(missing)}; this one offers {', '.join(sorted(offered(evaluator)))}. "
                "Use an evaluator that scores item by item, or another searcher."
            )


def offered(evaluator: Evaluator) -> frozenset[Level]:
    """The levels of an evaluator with those that they bring."""
    return frozenset(level for own in evaluator.levels for level in (own, *_BROUGHT[own]))


@dataclass(frozen=True)
class Proposal:
    """A candidate as a searcher means it."""

    candidate: Candidate | None
    """None: these parameters give no model; nothing is scored, and they are told as invalid."""
    params: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[int, ...] = ()
    """Ids of the candidates that it was made from."""
    tag: str = "child"
    """Where it comes from: init, random, child, verify, ..."""


@dataclass(frozen=True)
class Outcome:
    """What came of a proposal."""

    id: int
    """Number of the candidate in its run, in the order of asking."""
    proposal: Proposal
    status: Status
    value: float
    """The objective, larger is better; of a pruned candidate an estimate; -inf if it has no score."""
    tasks: Mapping[str, float]
    """Score per task; empty if there is none."""
    scores: Scores = field(default_factory=lambda: Scores({}))
    """What has been scored, item by item."""
    bound: float | None = None
    """The most that a pruned candidate may be worth (one-sided 95 %)."""

    @property
    def whole(self) -> bool:
        """Whether the value is the score itself and no estimate."""
        return self.status == "ok"

    @cached_property
    def merit(self) -> float:
        """The value; what scores the same is told apart by its loss, where the evaluator gives one."""
        loss = self.scores.loss if self.whole else None
        return self.value if loss is None or not math.isfinite(loss) else self.value - _TIE * loss / (1 + abs(loss))


@dataclass(frozen=True)
class Budget:
    """When a search ends; whichever comes first. Candidates that were seen before cost nothing."""

    candidates: int | None = None
    items: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"budget: {name} is {value}; allowed is a number above 0.")


class Searcher(Protocol):
    """A search method under way."""

    @property
    def needs(self) -> Needs: ...

    def ask(self, n: int) -> Sequence[Proposal]:
        """Proposals to score next, in order: a whole generation if the method has generations, else up to n. Empty: the search is over.

        The next `ask` comes after `tell`, unless the run ends.
        """

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """What came of the proposals last asked for, in their order."""

    def done(self) -> bool:
        """Whether the method has converged."""

    def report(self) -> Mapping[str, Any]:
        """What the method knows besides scores (rounds, surrogates, a family tree), ready for JSON."""


def told(outcomes: Sequence[Outcome]) -> list[float]:
    """Merits without infinities: what has no score stands below the worst that has one, by the width of what is known (1 at least)."""
    known = [outcome.merit for outcome in outcomes if math.isfinite(outcome.value)]
    floor = min(known) - max(1.0, max(known) - min(known)) if known else 0.0
    return [outcome.merit if math.isfinite(outcome.value) else floor for outcome in outcomes]


def finalists(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The best `count` recipes, each once: those that were scored whole, then, by their estimates, those that were given up on."""
    behind = sorted((one for one in outcomes if one.status == "pruned"), key=lambda outcome: (-outcome.value, outcome.id))
    once: dict[str, Outcome] = {}
    for outcome in [*ranked(outcomes), *behind]:
        if outcome.proposal.candidate is not None:
            once.setdefault(outcome.proposal.candidate.key, outcome)
    return list(once.values())[:count]


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Whole outcomes, the best first; the earlier on ties."""
    return sorted((outcome for outcome in outcomes if outcome.whole), key=lambda outcome: (-outcome.merit, outcome.id))
