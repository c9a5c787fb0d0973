"""The search loop: ask, score, tell; every candidate once, every score on disk before it is believed.

What is asked and told depends on settings and scores alone. Workers only change when a score arrives: a batch is told when it is complete,
in the order of asking, so any number of workers gives the same search, and a killed one is resumed by running it again over its journal.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modelglue.errors import CheckpointError, MergeError, ModelGlueError, RecipeError, RunError, UserError
from modelglue.recipe import WHOLE, Candidate, Cost, Evaluator, Plan, Request, Scores, Status
from modelglue.search.fitness import Everything, Fitness, Halving, Part
from modelglue.search.journal import Asked, Journal, as_text
from modelglue.search.objective import Objective
from modelglue.search.racing import Crowd, Gap, compare, leader_of
from modelglue.search.searcher import Budget, Outcome, Proposal, Racing, Searcher, finalists, offered, ranked

#: event name and its fields
Listener = Callable[[str, dict[str, Any]], None]
SEARCH, CONFIRM = "search", "confirm"
#: a search that asked so often in a row for what it had seen already has nothing new to ask
_STALLED = 200
#: errors that say that a candidate is no model; other errors of ours concern all candidates
_OF_ONE = (CheckpointError, MergeError, RecipeError)


@dataclass
class Study:
    """A searcher, an evaluator, and the journal between them. `run` returns every outcome; a report is made of the journal's content."""

    searcher: Searcher
    evaluator: Evaluator
    journal: Journal
    objective: Objective = field(default_factory=Objective)
    fitness: Fitness = field(default_factory=Everything)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    """For decoding, the same for every candidate."""
    batch: int = 1
    """How many candidates a searcher without generations is asked for at once."""
    max_failures: int = 5
    """So many failed candidates in a row end the search."""
    confirm: Evaluator | None = None
    """The same tasks on items that the search does not see."""
    finalists: int = 5
    """So many of the best are scored again by `confirm`."""
    on_event: Listener = lambda _name, _fields: None

    outcomes: list[Outcome] = field(default_factory=list, init=False)
    """Everything that was scored, in order; a batch that the budget cut short is not told, and counts."""
    confirmed: dict[int, Scores] = field(default_factory=dict, init=False)
    """Finalists: scores on the confirmation items."""
    spent: Cost = field(default=Cost(), init=False)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("candidates", "duplicates", "replayed"), 0), init=False)
    stopped: str = field(default="", init=False)
    """Why the search ended."""

    def __post_init__(self) -> None:
        self._first: dict[str, Outcome] = {}  # by candidate key
        self._rows: dict[int, int] = {}  # the candidate under which the journal keeps the scores of another one with the same key
        self._paid: set[tuple[int, int]] = set()
        self._best: list[Outcome] = []
        self._crowd = Crowd()
        self._asked = 0
        self._batches = 0
        self._stalled = 0
        self._failures = 0
        self._prepared: list[Part] = []
        self._clock = _Clock(self.journal)
        # batch -> how many of it were scored together at a time, where the budget was too little for all at once
        self._waves = {fields["batch"]: fields["counts"] for kind, fields in self.journal.events(trace=False) if kind == "waves"}
        self._cut: list[int] = []

    def run(self) -> list[Outcome]:
        """Search until the searcher is done or the budget is spent, then confirm the best.

        UserError before anything is scored if evaluator, searcher and objective do not fit; RunError after `max_failures` failures in a
        row; ReplayError if the journal's search went another way.
        """
        self._check()
        self._prepare()
        while not self._over():
            proposals = list(self.searcher.ask(self.batch))
            if not proposals:
                self.stopped = "the searcher has nothing more to ask"
                break
            outcomes = self._score_batch(proposals)
            self._remember(outcomes)
            if len(outcomes) < len(proposals):
                break
            self._tell(outcomes)
        self._confirm()
        return self.outcomes

    # -- before --------------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.evaluator.tasks:
            raise UserError("the evaluator has no tasks, so there is nothing to search on. Give it one.")
        self.objective.check(self.evaluator.tasks)
        self.searcher.needs.check(self.evaluator, type(self.searcher).__name__)
        if missing := sorted(self.fitness.levels - offered(self.evaluator)):
            raise UserError(f"these settings need an evaluator of level {', '.join(missing)}, which scores any items that it is asked for.")
        if self.confirm is None:
            return
        if list(self.confirm.tasks) != list(self.evaluator.tasks):
            raise UserError(
                f"the confirmation tasks are {', '.join(self.confirm.tasks)}, those of the search {', '.join(self.evaluator.tasks)}. "
                "Give the same."
            )
        for task in self.evaluator.tasks:
            shared = set(self.evaluator.items(task)) & set(self.confirm.items(task)) - {WHOLE}
            if shared:
                raise UserError(
                    f"task '{task}': {len(shared)} items are both searched and confirmed on, so the confirmation would confirm luck. "
                    "Give disjoint items."
                )

    def _prepare(self) -> None:
        endpoints = [Proposal(candidate, tag="endpoint") for candidate in self.fitness.endpoints()]
        if endpoints:
            everything: Part = {task: tuple(self.evaluator.items(task)) for task in self.evaluator.tasks}
            ids = self._record(endpoints)
            found = dict(
                self._evaluate(SEARCH, 0, [(id_, endpoint.candidate, everything) for id_, endpoint in zip(ids, endpoints, strict=True)])
            )
            for id_, endpoint in zip(ids, endpoints, strict=True):
                if found[id_].status != "ok":
                    raise RunError(f"{endpoint.candidate and endpoint.candidate.describe()}: cannot be scored ({found[id_].error}).")
                self.spent += found[id_].cost
                self.counts["candidates"] += 1
            self.fitness.prepare(self.evaluator, [found[id_] for id_ in ids])
        can_race = self.fitness.may_race and "E3" in offered(self.evaluator) and self.objective.is_mean
        fitness = replace(self.fitness, racing=False) if isinstance(self.fitness, Everything) and not can_race else self.fitness
        self._prepared = list(fitness.parts(self.evaluator))
        self._can_race = can_race

    # -- a batch -------------------------------------------------------------------------------------------------------------------

    def _score_batch(self, proposals: Sequence[Proposal]) -> list[Outcome]:
        """Outcomes in order; fewer where the budget did not reach to the end of the batch."""
        needs = self.searcher.needs
        racing = needs.racing if self._can_race else "off"
        rivals = [outcome for outcome in self.outcomes if outcome.id == needs.rival and outcome.whole]
        incumbents = rivals or self._best
        ids = self._record(proposals)
        found: dict[int, Outcome] = {}
        fresh: dict[str, int] = {}  # key -> the first proposal of this batch that has it
        for id_, proposal in zip(ids, proposals, strict=True):
            if proposal.candidate is None:
                found[id_] = Outcome(id_, proposal, "invalid", -math.inf, {})
            elif (key := proposal.candidate.key) in self._first and not _reopened(self._first[key], incumbents, racing):
                found[id_] = replace(self._first[key], id=id_, proposal=proposal)
                self.counts["duplicates"] += 1
            elif key in fresh:
                self.counts["duplicates"] += 1
            else:
                fresh[key] = id_
                self._rows[id_] = self._rows.get(self._first[key].id, self._first[key].id) if key in self._first else id_
                self.counts["duplicates"] += key in self._first
        by_id = dict(zip(ids, proposals, strict=True))
        waiting = list(fresh.values())
        together = racing == "batch" or isinstance(self.fitness, Halving)
        # Settled for the whole batch, however little of it the budget allows: a search may go on with a larger one.
        against = racing if incumbents or (together and len(waiting) > 1) else "off"
        begun = any(self._rows[id_] != id_ for id_ in waiting)  # and what has begun in parts goes on in parts
        parts = self._prepared if against != "off" or begun else [_whole(self._prepared)]
        self._stalled = 0 if waiting else self._stalled + len(proposals)
        known = deque(self._waves.get(self._batches - 1, ()))
        self._cut = []
        while waiting:
            count = known.popleft() if known else self._affordable(len(waiting))
            wave, waiting = waiting[:count], waiting[count:]
            self._cut.append(count)
            scored = self._race({id_: by_id[id_] for id_ in wave}, parts, against, incumbents) if wave else None
            if scored is None:
                break
            found |= scored
            self._first |= {key: scored[id_] for key, id_ in fresh.items() if id_ in scored}
        for id_, proposal in by_id.items():
            if id_ not in found and proposal.candidate is not None and proposal.candidate.key in self._first:
                first = self._first[proposal.candidate.key]
                if not _reopened(first, incumbents, racing):
                    found[id_] = replace(first, id=id_, proposal=proposal)
        return [found[id_] for id_ in ids if id_ in found]

    def _record(self, proposals: Sequence[Proposal]) -> list[int]:
        rows = [
            Asked(
                self._asked + number, self._batches, proposal.tag,
                None if proposal.candidate is None else proposal.candidate.key,
                None if proposal.candidate is None else proposal.candidate.text,
                as_text(proposal.params), as_text(list(proposal.parents)),
            )
            for number, proposal in enumerate(proposals)
        ]  # fmt: skip
        self.journal.ask(rows)
        self._asked += len(rows)
        self._batches += 1
        return [row.id for row in rows]

    def _race(
        self, proposals: Mapping[int, Proposal], parts: Sequence[Part], racing: Racing, incumbents: Sequence[Outcome]
    ) -> dict[int, Outcome] | None:
        """Score candidates part by part, giving up those that are surely behind; None when the time is up."""
        scores: dict[int, Scores] = {}
        behind: dict[int, tuple[int, Gap]] = {}  # id -> who is ahead, and by how much
        order: list[int] = []
        active = list(proposals)
        for number, part in enumerate(parts):
            if number and self._clock.is_over(self.budget):
                self.stopped = "the time is up"
                return None
            for id_, more in self._evaluate(SEARCH, number, [(id_, proposals[id_].candidate, part) for id_ in active]):
                scores[id_] = joined(scores[id_], more) if id_ in scores else more
                if (place := (self._rows[id_], number)) not in self._paid:
                    self._paid.add(place)
                    self.spent += more.cost
            active = [id_ for id_ in active if scores[id_].status == "ok"]
            if racing == "off" or number + 1 == len(parts):
                continue
            for id_, (leader, gap) in self._losers(active, scores, incumbents, racing).items():
                behind[id_] = (leader, gap)
                order.append(id_)
                active.remove(id_)
        found = {id_: self._outcome(id_, proposals[id_], scores[id_]) for id_ in proposals if id_ not in behind}
        values = {outcome.id: (outcome.value, outcome.value) for outcome in [*incumbents, *found.values()]}
        for id_ in reversed(order):  # who was given up last may have led before
            leader, gap = behind[id_]
            value, bound = values[leader]
            pruned = replace(scores[id_], status="pruned")
            tasks = self.fitness.tasks(pruned)
            if math.isfinite(value):
                values[id_] = (value + gap.difference, bound + min(0.0, gap.upper))
            else:  # who was ahead has failed since, which says nothing of this one
                values[id_] = (self.objective(tasks), math.inf)
            found[id_] = Outcome(id_, proposals[id_], "pruned", values[id_][0], tasks, pruned, values[id_][1])
        self.counts["candidates"] += sum(self._rows[id_] == id_ for id_ in proposals)
        return {id_: found[id_] for id_ in proposals}

    def _losers(
        self, active: Sequence[int], scores: Mapping[int, Scores], incumbents: Sequence[Outcome], racing: Racing
    ) -> dict[int, tuple[int, Gap]]:
        if isinstance(self.fitness, Halving):
            return self._lower(active, scores, self.fitness.kept(len(active)))
        standing = [(outcome.id, outcome.scores) for outcome in incumbents]
        if racing == "batch":
            standing += [(id_, scores[id_]) for id_ in active]
        if not standing:
            return {}
        leader, ahead = standing[leader_of(standing, self.objective)]
        sizes = {task: sum(len(part.get(task, ())) for part in self._prepared) for task in self.evaluator.tasks}
        crowd = self._crowd.scores
        gaps = {id_: compare(scores[id_], ahead, self.objective, sizes, crowd) for id_ in active if id_ != leader}
        return {id_: (leader, gap) for id_, gap in gaps.items() if gap.behind}

    def _lower(self, active: Sequence[int], scores: Mapping[int, Scores], kept: int) -> dict[int, tuple[int, Gap]]:
        """All but the best so many on what they have scored; the earlier stay on ties."""
        order = sorted(active, key=lambda id_: (-self.objective(scores[id_].tasks()), id_))
        return {id_: (order[0], compare(scores[id_], scores[order[0]], self.objective)) for id_ in order[kept:]}

    def _outcome(self, id_: int, proposal: Proposal, scores: Scores) -> Outcome:
        if scores.status != "ok":
            return Outcome(id_, proposal, scores.status, -math.inf, {}, scores)
        tasks = dict(self.fitness.tasks(scores))
        value = self.objective(tasks)
        if not math.isfinite(value):
            return Outcome(id_, proposal, "invalid", -math.inf, {}, replace(scores, status="invalid"))
        return Outcome(id_, proposal, "ok", value, tasks, scores)

    # -- scoring -------------------------------------------------------------------------------------------------------------------

    def _evaluate(
        self, split: str, number: int, wanted: Sequence[tuple[int, Candidate | None, Part]], evaluator: Evaluator | None = None
    ) -> Iterator[tuple[int, Scores]]:
        """(id, scores) in the order of `wanted`; what the journal lacks is scored and committed as it comes."""
        evaluator = evaluator or self.evaluator
        rows = {id_: self._rows.get(id_, id_) for id_, _, _ in wanted}
        known = {id_: self.journal.result(rows[id_], split, number) for id_ in rows}
        missing = [(id_, candidate, part) for id_, candidate, part in wanted if candidate is not None and known[id_] is None]
        plans = [self._plan(evaluator, part) for _, _, part in missing]
        requests = [(candidate, plan) for (_, candidate, _), plan in zip(missing, plans, strict=True) if candidate is not None]
        self.counts["replayed"] += len(wanted) - len(missing)
        for position, scores in _guarded(evaluator, requests):
            id_ = missing[position][0]
            checked = _checked(scores)
            self.journal.add_result(rows[id_], split, number, checked)
            known[id_] = checked
            self.on_event("scored", {"candidate": id_, "split": split, "items": checked.cost.items, "status": checked.status})
        for id_, _, _ in wanted:
            found = known[id_]
            assert found is not None
            yield id_, found

    def _plan(self, evaluator: Evaluator, part: Part) -> Plan:
        """Everything is asked for as such: an evaluator need not know subsets."""
        whole = len(part) == len(evaluator.tasks) and all(len(ids) == len(evaluator.items(task)) for task, ids in part.items())
        return Plan(None if whole else dict(part), self.seed)

    # -- after a batch -------------------------------------------------------------------------------------------------------------

    def _remember(self, outcomes: Sequence[Outcome]) -> None:
        """What was scored counts, told or not."""
        for outcome in outcomes:
            if outcome.whole and self._first[_key(outcome)].id == outcome.id:
                self._crowd.add(outcome.scores)
        self.outcomes += outcomes
        self._best = ranked([*self._best, *outcomes])[:1]

    def _tell(self, outcomes: list[Outcome]) -> None:
        self.searcher.tell(outcomes)
        fields = {
            "batch": self._batches - 1,
            "values": [None if not math.isfinite(outcome.value) else outcome.value for outcome in outcomes],
            "statuses": [outcome.status for outcome in outcomes],
            "items": self.spent.items,
        }
        batch = self._batches - 1
        if len(self._cut) > 1 and batch not in self._waves:  # with a larger budget others would have raced against each other
            self.journal.note("waves", {"batch": batch, "counts": self._cut})
        fresh = self.journal.trace("told", fields)
        self._clock.tick(self._batches, fresh=fresh)
        best = self._best
        self.on_event(
            "told",
            {
                **fields, "candidates": self.counts["candidates"], "best": best[0].value if best else None,
                "best_candidate": best[0].id if best else None, "seconds": self._clock.now,
            },
        )  # fmt: skip
        for outcome in outcomes:
            self._failures = self._failures + 1 if outcome.status == "failed" and fresh else 0
            if self._failures >= self.max_failures:
                self.journal.note("stopped", {"failures": self._failures, "error": outcome.scores.error})
                raise RunError(
                    f"{self._failures} candidates in a row could not be scored; the last one: {outcome.scores.error} "
                    "Mend the cause and resume the search."
                )

    def _over(self) -> bool:
        if self.searcher.done():
            self.stopped = "the searcher has converged"
        elif self._clock.is_over(self.budget):
            self.stopped = "the time is up"
        elif self._stalled >= _STALLED:
            self.stopped = "the searcher asks for nothing new"
        return bool(self.stopped)

    def _affordable(self, count: int) -> int:
        """How many more candidates the budget allows, should none of them be given up."""
        each = sum(len(ids) for part in self._prepared for ids in part.values())
        if self.budget.candidates is not None:
            count = min(count, self.budget.candidates - self.counts["candidates"])
        if self.budget.items is not None:
            count = min(count, (self.budget.items - self.spent.items) // each)
        if self.budget.tokens is not None and self.spent.tokens >= self.budget.tokens:
            count = 0
        if count <= 0:
            self.stopped = "the budget is spent"
        return max(0, count)

    def _confirm(self) -> None:
        """Score the best again, on items that they were not chosen by."""
        if self.confirm is None:
            return
        everything: Part = {task: tuple(self.confirm.items(task)) for task in self.confirm.tasks}
        wanted = [(outcome.id, outcome.proposal.candidate, everything) for outcome in finalists(self.outcomes, self.finalists)]
        self.confirmed = dict(self._evaluate(CONFIRM, 0, wanted, self.confirm))


def _key(outcome: Outcome) -> str:
    assert outcome.proposal.candidate is not None, "scored without a recipe"
    return outcome.proposal.candidate.key


def _whole(parts: Sequence[Part]) -> Part:
    """All parts as one."""
    found: dict[str, tuple[str, ...]] = {}
    for part in parts:
        found |= {task: (*found.get(task, ()), *ids) for task, ids in part.items()}
    return found


def _reopened(outcome: Outcome, rivals: Sequence[Outcome], racing: Racing) -> bool:
    """Whether a candidate that was given up on is needed whole, or may yet win: what it has to beat now is less."""
    return outcome.status == "pruned" and (
        racing == "off" or not rivals or any(outcome.bound is None or outcome.bound >= rival.value for rival in rivals)
    )


class _Clock:
    """Seconds that a search has taken, over all its processes; remembered with every batch."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._stored = {fields["batch"]: float(fields["seconds"]) for kind, fields in journal.events(trace=False) if kind == "clock"}
        self._before = max(self._stored.values(), default=0.0)
        self._start = time.monotonic()
        self._batch = 0

    @property
    def now(self) -> float:
        later = any(batch > self._batch for batch in self._stored)
        return self._stored.get(self._batch, 0.0) if later else self._before + time.monotonic() - self._start

    def tick(self, batch: int, *, fresh: bool) -> None:
        self._batch = batch
        if fresh:
            self._journal.note("clock", {"batch": batch, "seconds": round(self.now, 3)})

    def is_over(self, budget: Budget) -> bool:
        return budget.seconds is not None and self.now >= budget.seconds


def joined(first: Scores, second: Scores) -> Scores:
    """Two parts of one candidate's scores as one."""
    return Scores(
        _united(first.items, second.items), tuple(dict.fromkeys((*first.warnings, *second.warnings))), second.status,
        _united(first.losses, second.losses), first.cost + second.cost, second.error,
    )  # fmt: skip


def _united(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {task: {**a.get(task, {}), **b.get(task, {})} for task in dict.fromkeys((*a, *b))}


def _checked(scores: Scores) -> Scores:
    """Scores that are no numbers make a candidate invalid, whatever its evaluator says."""
    finite = all(math.isfinite(value) for values in scores.items.values() for value in values.values())
    return replace(scores, status="invalid", error="a score is NaN or infinite") if scores.status == "ok" and not finite else scores


def _guarded(evaluator: Evaluator, requests: Sequence[Request]) -> Iterator[tuple[int, Scores]]:
    """`evaluate_many`, and if it raises something that is no error of ours, the rest one by one, so that only the culprit fails."""
    done: set[int] = set()
    if len(requests) > 1:
        try:
            for position, scores in evaluator.evaluate_many(requests):
                done.add(position)
                yield position, scores
        except GeneratorExit:
            raise
        except Exception as error:
            if isinstance(error, ModelGlueError) and not isinstance(error, _OF_ONE):
                raise
    for position, (candidate, plan) in enumerate(requests):
        if position not in done:
            yield position, _one(evaluator, candidate, plan)


def _one(evaluator: Evaluator, candidate: Candidate, plan: Plan) -> Scores:
    began = time.monotonic()
    try:
        return evaluator.evaluate(candidate, plan)
    except Exception as error:
        if isinstance(error, ModelGlueError) and not isinstance(error, _OF_ONE):
            raise
        text = " ".join(str(error).split())
        status: Status = "invalid" if isinstance(error, _OF_ONE) else "failed"
        what = text if isinstance(error, ModelGlueError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
        return Scores({}, status=status, cost=Cost(seconds=time.monotonic() - began), error=f"{candidate.describe()}: {what}")
