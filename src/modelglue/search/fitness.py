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
        rounds = self._rounds({task: len(ids) for task, ids in items.items()})
        before = [dict.fromkeys(items, 0), *rounds]
        return [
            {task: items[task][start[task] : stop[task]] for task in items if stop[task] > start[task]}
            for start, stop in zip(before, rounds, strict=False)
        ]

    def tasks(self, scores: Scores) -> Mapping[str, float]:
        return scores.tasks()

    def _rounds(self, sizes: Mapping[str, int]) -> list[dict[str, int]]:
        """Items of every task that are scored after each part."""
        return schedule(sizes, self.chunk)


@dataclass(frozen=True)
class Halving(Everything):
    """Successive halving, as in a bracket of Hyperband (arXiv 1603.06560): of the candidates that are asked for together, all are scored on
    `chunk` items, the best 1 / `eta` of them on `eta` times as many, and so on; only the last ones are scored on everything.
    """

    eta: int = 3

    def kept(self, count: int) -> int:
        """How many of so many candidates go on."""
        return max(1, -(-count // self.eta))

    def _rounds(self, sizes: Mapping[str, int]) -> list[dict[str, int]]:
        total = sum(sizes.values())
        rungs, size = [], self.chunk
        while size < total:
            rungs.append(size)
            size *= self.eta
        found = [{task: max(1, round(rung * count / total)) for task, count in sizes.items()} for rung in rungs]
        return [one for one, after in zip(found, [*found[1:], None], strict=True) if one not in (after, sizes)] + [dict(sizes)]
