"""One thread that owns the model: requests wait in lanes, one for each set of experts that answers together, and run batched.

A row joins its lane's batch between two tokens and leaves it when it has ended, or when its client has gone; the others go on as if
it had never been there. Where not all experts fit into memory, lanes take turns: the oldest prompt decides whose it is.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from modelglue.errors import ModelGlueError, RunError, UserError
from modelglue.models.running import Row, RunningBatch
from modelglue.models.writer import Asked, Writer
from modelglue.serve.hosts import Host, Placed
from modelglue.serve.jobs import Ended, Failed, Job, Piece, Started
from modelglue.serve.limits import Limits


class BusyError(RunError):
    """Too many prompts wait already; nothing was begun."""


class _RefusedError(Exception):
    """A request that its model cannot answer."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class _Ticket:
    """A job in the engine."""

    job: Job
    number: int
    """Of its arrival."""
    deadline: float
    placed: Placed = field(default_factory=lambda: Placed(()))
    rows: list[Row] = field(default_factory=list)
    told: set[int] = field(default_factory=set)
    """Choices whose end has been delivered."""
    over: bool = False


@dataclass(eq=False)
class _Lane:
    """The prompts of one set of experts. `writer` and `batch` are there while its experts are in memory."""

    key: tuple[int, ...]
    waiting: deque[_Ticket] = field(default_factory=deque)
    running: list[_Ticket] = field(default_factory=list)
    writer: Writer | None = None
    batch: RunningBatch | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


class Engine:
    """Start it with `with`, or `start` and `close`. `submit` and `cancel` may be called from any thread."""

    def __init__(self, host: Host, limits: Limits | None = None) -> None:
        self.host = host
        self.limits = limits or Limits()
        self._changed = threading.Condition()
        self._inbox: list[_Ticket] = []
        self._cancelled: set[Job] = set()
        self._waiting = 0
        self._closing = False
        self._numbers = count()
        self._lanes: dict[tuple[int, ...], _Lane] = {}
        self._thread = threading.Thread(target=self._run, name="modelglue-engine", daemon=True)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """What runs is told that it has failed; returns when the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Iterable[Job]) -> None:
        """All of them, or none: BusyError where too many wait, UserError for more choices than are ever written at a time."""
        jobs = list(jobs)
        if most := max((job.choices for job in jobs if job.choices > self.limits.rows), default=0):
            raise UserError(f"a prompt asks for {most} choices, but {self.limits.rows} rows are written at a time. Ask for fewer.")
        deadline = time.monotonic() + self.limits.timeout
        with self._changed:
            if self._closing:
                raise BusyError("the server is closing. Ask again later.")
            if self._waiting + len(jobs) > self.limits.queue:
                raise BusyError(f"{self._waiting} prompts wait already, at most {self.limits.queue} may. Ask again later.")
            self._waiting += len(jobs)
            self._inbox += [_Ticket(job, next(self._numbers), deadline) for job in jobs]
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """These jobs are let go of, wherever they are; nothing more is delivered of them."""
        with self._changed:
            self._cancelled |= set(jobs)
            self._changed.notify()

    # -- the thread ---------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._turn():
            pass
        for ticket in self._tickets():
            self._end(ticket, Failed("closed", "the server is closing."))

    def _turn(self) -> bool:
        """What has arrived, and one more token for everybody. False when the engine is to end."""
        with self._changed:
            while not (self._inbox or self._closing or self._cancelled or any(lane.busy for lane in self._lanes.values())):
                self._changed.wait()
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, set()
            closing = self._closing
        for ticket in inbox:
            ticket.over = ticket.job in cancelled
        self._place([ticket for ticket in inbox if not ticket.over])
        self._forget(sum(ticket.over for ticket in inbox))
        for ticket in self._tickets():
            if ticket.job in cancelled:
                ticket.over = True
            elif time.monotonic() >= ticket.deadline:
                self._end(ticket, Failed("timeout", f"the answer was not complete after {self.limits.timeout:g} seconds."))
        for lane in self._lanes.values():
            self._forget(sum(ticket.over for ticket in lane.waiting))
            lane.waiting = deque(ticket for ticket in lane.waiting if not ticket.over)
        if closing:
            return False
        before = self._open()
        for lane in list(self._lanes.values()):
            if lane.writer is not None and lane.busy:
                self._guarded(lane, before)
        return True

    def _tickets(self) -> list[_Ticket]:
        return [ticket for lane in self._lanes.values() for ticket in [*lane.waiting, *lane.running] if not ticket.over]

    def _forget(self, tickets: int) -> None:
        """So many wait no longer."""
        with self._changed:
            self._waiting -= tickets

    def _end(self, ticket: _Ticket, last: Failed) -> None:
        ticket.over = True
        ticket.job.deliver(last)

    def _place(self, tickets: list[_Ticket]) -> None:
        """New prompts go to their lanes; one decision for each, taken together."""
        if not tickets:
            return
        try:
            placed = self.host.place([ticket.job.routed_on for ticket in tickets])
        except Exception as error:
            if len(tickets) > 1:  # one of them, and the others shall not answer for it
                for ticket in tickets:
                    self._place([ticket])
                return
            self._end(tickets[0], _failure(error))
            self._forget(1)
            return
        for ticket, where in zip(tickets, placed, strict=True):
            ticket.placed = where
            self._lanes.setdefault(where.key, _Lane(where.key)).waiting.append(ticket)

    def _open(self) -> float:
        """Bring lanes' experts into memory, the oldest prompt's first.

        Where one does not fit, the lanes that are there finish what they have begun, and begin nothing that came after what waits: the
        number of the first prompt that waits for room is returned.
        """
        closed = [lane for lane in self._lanes.values() if lane.waiting and lane.writer is None]
        for lane in sorted(closed, key=lambda lane: lane.waiting[0].number):
            first = lane.waiting[0].number
            open_lanes = [other for other in self._lanes.values() if other.writer is not None]
            for other in [other for other in open_lanes if not other.running and not (other.waiting and other.waiting[0].number < first)]:
                if not self._fits(lane, open_lanes):
                    other.writer = other.batch = None
                    open_lanes.remove(other)
            if not self._fits(lane, open_lanes):
                return first
            try:
                lane.writer = self.host.writer(lane.key)
                lane.batch = lane.writer.batch()
            except Exception as error:
                self._fail(lane, error)
        return float("inf")

    def _fits(self, lane: _Lane, others: list[_Lane]) -> bool:
        return len(set(lane.key).union(*(other.key for other in others))) <= self.host.capacity

    def _guarded(self, lane: _Lane, before: float) -> None:
        """A lane that fails takes its own prompts with it, and nobody else's."""
        try:
            self._tick(lane, before)
        except Exception as error:
            self._fail(lane, error)

    def _fail(self, lane: _Lane, error: Exception) -> None:
        for ticket in [*lane.waiting, *lane.running]:
            if not ticket.over:
                self._end(ticket, _failure(error))
        self._forget(len(lane.waiting))
        del self._lanes[lane.key]

    def _tick(self, lane: _Lane, before: float) -> None:
        """New rows as far as there is room, and one more token in all."""
        assert lane.writer is not None
        assert lane.batch is not None
        new: list[_Ticket] = []
        dropped = [row for ticket in lane.running if ticket.over for row in ticket.rows]
        lane.running = [ticket for ticket in lane.running if not ticket.over]
        room = self.limits.rows - sum(row.finish is None for ticket in lane.running for row in ticket.rows)
        with lane.writer.running():
            while lane.waiting and lane.waiting[0].number < before and lane.waiting[0].job.choices <= room:
                ticket = lane.waiting.popleft()
                self._forget(1)
                lane.running.append(ticket)  # first of all: whatever happens now, it is known to be here
                if self._begin(lane.writer, ticket):
                    new.append(ticket)
                    room -= len(ticket.rows)
            lane.batch.tick([row for ticket in new for row in ticket.rows], dropped)
        for ticket in lane.running:
            if not ticket.over:
                self._tell(ticket)
        lane.running = [ticket for ticket in lane.running if not ticket.over]

    def _begin(self, writer: Writer, ticket: _Ticket) -> bool:
        """Make a prompt's rows; a prompt that its model cannot take is told so."""
        job = ticket.job
        try:
            asked = self._asked(writer, job)
            for sample in range(job.choices):
                how = {"until": job.until, "sampling": job.sampling, "sample": sample}
                ticket.rows.append(self.host.row(writer, ticket.placed, asked, **how))
        except _RefusedError as error:
            self._end(ticket, Failed("request", str(error), error.code))
            return False
        except ModelGlueError as error:
            self._end(ticket, Failed("request", str(error)))
            return False
        except Exception as error:
            self._end(ticket, _failure(error))
            return False
        job.deliver(Started(ticket.placed.expert, ticket.placed.weight, len(asked.ids)))
        return True

    def _asked(self, writer: Writer, job: Job) -> Asked:
        prompt = job.prompt if job.messages is None else writer.chat(job.messages)
        ids = writer.ids(prompt)
        room = writer.limit - len(ids)
        steps = min(room, self.limits.tokens) if job.max_tokens is None else job.max_tokens
        if room < max(steps, 1):
            raise _RefusedError(
                f"this model holds {writer.limit} tokens; the prompt has {len(ids)}, and max_tokens is "
                f"{'not set' if job.max_tokens is None else steps}. Shorten the prompt, or ask for fewer tokens.",
                "context_length_exceeded",
            )
        return Asked(ids, steps)

    def _tell(self, ticket: _Ticket) -> None:
        """Deliver what is new of each choice."""
        for choice, row in enumerate(ticket.rows):
            if choice in ticket.told:
                continue
            if row.finish == "invalid":
                self._end(ticket, Failed("model", "the model's logits are no numbers, so it cannot answer this prompt."))
                return
            if ticket.job.stream and (piece := row.fresh()):
                ticket.job.deliver(Piece(choice, piece))
            if row.finish is not None:
                ticket.told.add(choice)
                ticket.job.deliver(Ended(choice, row.text(), row.finish, len(row.written)))
        ticket.over = len(ticket.told) == len(ticket.rows)


def _failure(error: Exception) -> Failed:
    if isinstance(error, ModelGlueError):
        return Failed("model", str(error))
    traceback.print_exception(error, file=sys.stderr)
    return Failed("model", f"the model failed: {type(error).__name__}: {error}")
