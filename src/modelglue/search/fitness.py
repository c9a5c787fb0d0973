"""On which items candidates are scored, and what that says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Evaluator, Level, Scores
from modelglue.search.racing import CHUNK, schedule

#: task -> ids of the items that are scored together
Part: TypeAlias = Mapping[str, tuple[str, ...]]


class Fitness(Protocol):
    """What a candidate's answers are taken for."""

    @property
    def levels(self) -> frozenset[Level]:
        """What it needs of the evaluator."""

    @property
    def may_race(self) -> bool:
        """Whether a candidate may be given up between two parts."""

    def endpoints(self) -> Sequence[Candidate]:
        """Candidates that are scored on everything before the search begins."""

    def prepare(self, evaluator: Evaluator, endpoints: Sequence[Scores]) -> None:
        """Take notice of their scores, in their order."""

    def parts(self, evaluator: Evaluator) -> Sequence[Part]:
        """What is scored of a candidate, one part after the other."""

    def tasks(self, scores: Scores) -> Mapping[str, float]:
        """Score per task from what was scored of a candidate."""


@dataclass(frozen=True)
class Everything:
    """All items, in growing prefixes if candidates may race, else at once; means of tasks."""

    racing: bool = True
    chunk: int = CHUNK
    limit: int | None = None
    """Only the first so many items of every task."""

    @property
    def levels(self) -> frozenset[Level]:
        return frozenset() if self.limit is None else frozenset({"E3"})

    @property
    def may_race(self) -> bool:
        return self.racing

    def endpoints(self) -> Sequence[Candidate]:
        return []

    def prepare(self, evaluator: Evaluator, endpoints: Sequence[Scores]) -> None:
        """Nothing is prepared."""

    def parts(self, evaluator: Evaluator) -> Sequence[Part]:
        items = {task: tuple(evaluator.items(task)[: self.limit]) for task in evaluator.tasks}
        if empty := [task for task, ids in items.items() if not ids]:
            raise UserError(f"task {', '.join(empty)}: has no items, so candidates cannot be scored on it. Leave it out.")
        if not self.racing:
            return [items]
        rounds = schedule({task: len(ids) for task, ids in items.items()}, self.chunk)
        before = [dict.fromkeys(items, 0), *rounds]
        return [
            {task: items[task][start[task] : stop[task]] for task in items if stop[task] > start[task]}
            for start, stop in zip(before, rounds, strict=False)
        ]

    def tasks(self, scores: Scores) -> Mapping[str, float]:
        return scores.tasks()
