"""Candidates of a search, built in memory and scored: nothing is written but the scores."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modelglue.checkpoint import Checkpoint
from modelglue.evaluation.crew import Crew, Outcome, Processes
from modelglue.evaluation.failures import judged
from modelglue.evaluation.items import Item
from modelglue.evaluation.members import Members
from modelglue.evaluation.resident import Resident, ResidentModel
from modelglue.evaluation.scoring import Asked, BatchListener, answer, marks_of
from modelglue.evaluation.store import ScoreStore
from modelglue.evaluation.tasks import TaskSet
from modelglue.recipe import Candidate, Level, Plan, Scores, Status

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

#: part of what scores depend on: raise it when equal candidates would get other scores
_VERSION = 1


class CandidateEvaluator:
    """Scores candidates over the members `checkpoints` on one task set; an `Evaluator` of every level for every search.

    `store_dtype`: see `Members`. Evaluators of several task sets may share one `resident` model. With `workers` above 1 (or a `crew`)
    `evaluate_many` scores several candidates at once, or parts of one; batches are the same whoever scores them, so the scores do not
    depend on the number of workers. `timeout`: seconds that one evaluation may take; checked between batches, and where there are
    workers a batch that takes longer is ended. With `strict` whatever fails is raised, whosever fault it is. Use it as a context manager
    where there are workers.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        tasks: TaskSet,
        store: ScoreStore,
        *,
        store_dtype: str | None = None,
        resident: Resident | None = None,
        on_batch: BatchListener | None = None,
        workers: int = 1,
        crew: Crew | None = None,
        timeout: float | None = None,
        strict: bool = False,
    ) -> None:
        self.members = Members(checkpoints, store_dtype)
        self._task_set = tasks
        self._store = store
        self._resident = resident or ResidentModel()
        self._on_batch = on_batch
        self._crew = crew or (Processes(self.members, workers) if workers > 1 else None)
        self._timeout = timeout
        self._strict = strict

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._crew is not None:
            self._crew.close()

    @property
    def tasks(self) -> Sequence[str]:
        """The skills, in order."""
        return list(self._task_set.skills)

    @property
    def levels(self) -> frozenset[Level]:
        """All; E4 only if some task gives a loss."""
        lossy = any(item.marker.gives_loss for items in self._task_set.skills.values() for item in items)
        return frozenset({"E0", "E1", "E2", "E3", "E4"} if lossy else {"E0", "E1", "E2", "E3"})

    @property
    def identity(self) -> str:
        """SHA-256 (hex) over the contents of members and items, the stored dtype and the evaluator's version."""
        members = {alias: checkpoint.identity for alias, checkpoint in self.members.checkpoints.items()}
        content = [_VERSION, members, self.members.store_dtype, self._task_set.identity]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def items(self, task: str) -> Sequence[str]:
        """The task's item ids in their fixed shuffled order."""
        return self._task_set.order[task]

    def key(self, candidate: Candidate) -> str:
        """What the store knows the candidate by; see `Members.identity`."""
        return self.members.identity(candidate)

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        """Per-item scores; computes only what the store does not have. See `Evaluator` for what becomes of failures."""
        if self._crew is not None:
            return next(iter(self.evaluate_many([(candidate, plan)])))[1]
        work = self._work(0, candidate, plan)
        try:
            while batch := work.next_batch():
                if self._timeout is not None and time.monotonic() > work.end:
                    raise TimeoutError
                live = self._resident.holding(self.members.expression(candidate), work.key)
                work.asked.add(marks_of(batch, *answer(live, [item.requests for item in batch])), self._on_batch)
        except Exception as error:
            return work.outcome(self._judged(error))
        return work.outcome()

    def evaluate_many(self, requests: Sequence[tuple[Candidate, Plan]]) -> Iterator[tuple[int, Scores]]:
        """(position, scores) as they are done. Workers that have nothing else to do share the batches of what is left."""
        if self._crew is None:
            for number, (candidate, plan) in enumerate(requests):
                yield number, self.evaluate(candidate, plan)
            return
        yield from _Shift(self, self._crew, requests).run()

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _judged(self, error: Exception) -> tuple[Status, str]:
        if self._strict:
            raise error
        return judged(error, self._timeout)

    def _work(self, number: int, candidate: Candidate, plan: Plan) -> _Work:
        key = self.key(candidate)
        asked = Asked(key, self._task_set, self._store, plan, description=candidate.key)
        end = time.monotonic() + (self._timeout if self._timeout is not None else 0.0)
        return _Work(number, candidate, key, asked, deque(asked.missing()), end)


@dataclass
class _Work:
    """One request on its way."""

    number: int
    candidate: Candidate
    key: str
    asked: Asked
    batches: deque[list[Item]]
    end: float
    lanes: set[int] = field(default_factory=set)
    problem: tuple[Status, str] | None = None

    def next_batch(self) -> list[Item] | None:
        """Items of the next batch that nobody has scored by now; None where there are no more."""
        while self.batches:
            if batch := self.asked.unscored(self.batches.popleft()):
                return batch
        return None

    def outcome(self, problem: tuple[Status, str] | None = None) -> Scores:
        scores = self.asked.scores(complete=problem is None)
        name = self.candidate.describe()
        scores = replace(scores, warnings=tuple(f"{name}: {warning}" for warning in scores.warnings))
        return scores if problem is None else replace(scores, status=problem[0], error=f"{name}: {problem[1]}")


class _Shift:
    """The requests of one call, handed out to the lanes of a crew. A lane stays with a candidate as long as there is something to do."""

    def __init__(self, evaluator: CandidateEvaluator, crew: Crew, requests: Sequence[tuple[Candidate, Plan]]) -> None:
        self._evaluator = evaluator
        self._crew = crew
        self._waiting = deque(enumerate(requests))
        self._active: dict[str, _Work] = {}
        self._lane: dict[int, tuple[_Work, list[Item]]] = {}

    def run(self) -> Iterator[tuple[int, Scores]]:
        try:
            while self._waiting or self._active:
                yield from self._hand_out()
                if self._lane:
                    yield from self._collect()
        finally:
            for lane in list(self._lane):  # somebody stopped listening, or something was raised
                self._crew.renew(lane)

    def _hand_out(self) -> Iterator[tuple[int, Scores]]:
        idle = deque(lane for lane in range(self._crew.lanes) if lane not in self._lane)
        while idle:
            work = self._next()
            if work is None:
                return
            batch = work.next_batch()
            if batch is None:
                if not work.lanes:
                    del self._active[work.key]
                    yield work.number, work.outcome()
                continue
            lane = idle.popleft()
            work.lanes.add(lane)
            self._lane[lane] = (work, batch)
            self._crew.give(lane, (work.candidate, work.key, [item.requests for item in batch]))

    def _next(self) -> _Work | None:
        """Work for a lane: a request that nobody works at, else batches of the one with most of them left."""
        for place, (number, (candidate, plan)) in enumerate(self._waiting):
            if self._evaluator.key(candidate) not in self._active:  # equal ones wait, and find their items in the store
                del self._waiting[place]
                work = self._evaluator._work(number, candidate, plan)
                self._active[work.key] = work
                return work
        return max((work for work in self._active.values() if work.batches), key=lambda work: len(work.batches), default=None)

    def _collect(self) -> Iterator[tuple[int, Scores]]:
        timed = self._evaluator._timeout is not None
        soonest = min(work.end for work, _ in self._lane.values())
        for lane, outcome in self._crew.wait(max(soonest - time.monotonic(), 0.0) if timed else None):
            work, batch = self._lane.pop(lane)
            work.lanes.discard(lane)
            if work.problem is None:
                self._take(work, batch, outcome)
            more = work.next_batch() if work.problem is None else None
            if more is not None:  # the same lane goes on with the same candidate
                self._lane[lane] = (work, more)
                work.lanes.add(lane)
                self._crew.give(lane, (work.candidate, work.key, [item.requests for item in more]))
            elif not work.lanes:
                del self._active[work.key]
                yield work.number, work.outcome(work.problem)
        if timed:
            yield from self._end_late()

    def _take(self, work: _Work, batch: list[Item], outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            work.problem = self._evaluator._judged(outcome)
            work.batches.clear()
        else:
            work.asked.add(marks_of(batch, *outcome), self._evaluator._on_batch)

    def _end_late(self) -> Iterator[tuple[int, Scores]]:
        now = time.monotonic()
        for work in [work for work in self._active.values() if work.end < now and (work.lanes or work.batches)]:
            for lane in list(work.lanes):
                self._crew.renew(lane)
                del self._lane[lane]
            del self._active[work.key]
            yield work.number, work.outcome(self._evaluator._judged(TimeoutError()))
