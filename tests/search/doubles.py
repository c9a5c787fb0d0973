"""Evaluators that misbehave, count, or answer out of order; and a searcher that asks what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.recipe import Candidate, Cost, Level, Plan, Request, Scores
from modelglue.search import Needs, Outcome, Proposal, SyntheticEvaluator
from modelglue.search.searcher import Racing


@dataclass
class Counting:
    """Another evaluator, with a list of the requests that reached it; `workers` answers come at once, the last one first."""

    inner: SyntheticEvaluator
    workers: int = 1
    asked: list[tuple[str, Plan]] = field(default_factory=list)
    before: Callable[[Candidate, int], Scores | None] = lambda _candidate, _number: None
    """What to answer instead, given the candidate and how many requests came before."""

    @property
    def tasks(self) -> Sequence[str]:
        return self.inner.tasks

    @property
    def levels(self) -> frozenset[Level]:
        return self.inner.levels

    @property
    def identity(self) -> str:
        return self.inner.identity

    @property
    def items_asked(self) -> int:
        return sum(len(ids) for _, plan in self.asked for ids in (plan.items or self._everything()).values())

    def _everything(self) -> dict[str, tuple[str, ...]]:
        return {task: tuple(self.items(task)) for task in self.tasks}

    def items(self, task: str) -> Sequence[str]:
        return self.inner.items(task)

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        number = len(self.asked)
        self.asked.append((candidate.key, plan))
        instead = self.before(candidate, number)
        return self.inner.evaluate(candidate, plan) if instead is None else instead

    def evaluate_many(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scores]]:
        for start in range(0, len(requests), self.workers):
            together = range(start, min(start + self.workers, len(requests)))
            for number in reversed(together):
                yield number, self.evaluate(*requests[number])


class Plain:
    """An evaluator of one number per candidate, and nothing else."""

    tasks: Sequence[str] = ("score",)
    levels: frozenset[Level] = frozenset({"E0"})
    identity = "plain"

    def __init__(self, value: Callable[[Mapping[str, float]], float]) -> None:
        self.value = value
        self.asked: list[str] = []

    def items(self, task: str) -> Sequence[str]:
        return ("*",)

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        assert plan.items is None
        self.asked.append(candidate.key)
        weights = dict(zip(candidate.members, candidate.weights, strict=True))
        return Scores({"score": {"*": self.value(weights)}}, cost=Cost(items=1, computed=1))

    def evaluate_many(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scores]]:
        for number, request in enumerate(requests):
            yield number, self.evaluate(*request)


@dataclass
class Scripted:
    """Asks for given batches of candidates."""

    batches: list[Sequence[Candidate | None]]
    racing: Racing = "off"
    told: list[list[Outcome]] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(racing=self.racing)

    def ask(self, n: int) -> list[Proposal]:
        return [Proposal(candidate) for candidate in self.batches.pop(0)] if self.batches else []

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.told.append(list(outcomes))

    def done(self) -> bool:
        return False

    def report(self) -> Mapping[str, Any]:
        return {}
