"""Processes that answer for candidates, each with a resident model of its own; the caller keeps items, marks and store.

A lane gets (candidate, its key, the requests of some items) and gives the replies, so neither tasks nor scores ever travel.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeAlias

from modelglue.errors import ModelGlueError, WorkerDiedError
from modelglue.evaluation.failures import is_out_of_memory
from modelglue.evaluation.members import Members
from modelglue.evaluation.resident import ResidentModel
from modelglue.evaluation.scoring import Answers, Questions, answer
from modelglue.recipe import Candidate

#: candidate, its key, what is asked
Unit: TypeAlias = tuple[Candidate, str, Questions]
#: what a unit comes back as: replies and tokens of its items, or what went wrong
Outcome: TypeAlias = tuple[Answers, list[int]] | Exception


class Crew(Protocol):
    """Lanes by number; every lane does one unit at a time."""

    lanes: int

    def give(self, lane: int, unit: Unit) -> None: ...
    def wait(self, timeout: float | None) -> Iterator[tuple[int, Outcome]]:
        """Lanes that have finished, as soon as there is one; none when the time is over.

        What a dead worker was doing is done once more by a fresh one, as anything may have killed it. WorkerDiedError as the outcome where
        that one dies too: then it is the unit.
        """

    def renew(self, lane: int) -> None:
        """End whatever the lane does, and have a fresh one in its place."""

    def close(self) -> None: ...


class Worker:
    """What runs in a lane."""

    def __init__(self, members: Members, device: str | None) -> None:
        self._members = members
        self._resident = ResidentModel(device)

    def do(self, unit: Unit) -> Outcome:
        candidate, key, questions = unit
        try:
            return answer(self._resident.holding(self._members.expression(candidate), key), questions)
        except Exception as error:  # whatever it is, the caller decides what it means for the candidate
            return portable(error)


class Processes:
    """Lanes that are processes of this machine, started when the first of them is needed and alive until `close`.

    `devices` are given to them in turn (default: the processor). They are forked where that is safe and cheap (Linux, and no accelerator
    anywhere). A lane ends with its parent.
    """

    def __init__(self, members: Members, lanes: int, devices: Sequence[str] = ()) -> None:
        self.lanes = lanes
        self._members = members
        self._devices = tuple(devices)
        self._running: dict[int, tuple[Any, Connection]] = {}
        self._units: dict[int, Unit] = {}
        self._died: set[int] = set()

    def give(self, lane: int, unit: Unit) -> None:
        if lane not in self._running:
            self._start(range(self.lanes) if not self._running else (lane,))
        self._units[lane] = unit
        with contextlib.suppress(BrokenPipeError):  # it has died: `wait` finds that out
            self._running[lane][1].send(unit)

    def wait(self, timeout: float | None) -> Iterator[tuple[int, Outcome]]:
        lanes: Mapping[Any, int] = {self._running[lane][1]: lane for lane in sorted(self._units)}
        for connection in wait(list(lanes), timeout):
            lane = lanes[connection]
            try:
                outcome: Outcome = self._running[lane][1].recv()
            except (EOFError, OSError):
                unit, again = self._units[lane], lane not in self._died
                self.renew(lane)
                if again:
                    self._died.add(lane)
                    self.give(lane, unit)
                    continue
                outcome = WorkerDiedError("the worker process died twice, probably for want of memory.")
            self._units.pop(lane, None)
            self._died.discard(lane)
            yield lane, outcome

    def renew(self, lane: int) -> None:
        self._units.pop(lane, None)
        self._died.discard(lane)
        process, connection = self._running.pop(lane, (None, None))
        if process is not None and connection is not None:
            process.kill()
            process.join()
            connection.close()

    def close(self) -> None:
        for lane in list(self._running):
            self.renew(lane)

    def _start(self, lanes: Iterable[int]) -> None:
        """Processes for these lanes. Those that begin afresh are waited for, as no candidate shall be blamed for the time that it takes."""
        torch = sys.modules.get("torch")
        on_processor = all(name.startswith("cpu") for name in self._devices) and not (torch is not None and torch.cuda.is_initialized())
        fork = sys.platform.startswith("linux") and on_processor
        context = multiprocessing.get_context("fork" if fork else "spawn")
        for lane in lanes:
            ours, theirs = context.Pipe()
            foreign = [ours, *(connection for _, connection in self._running.values())] if fork else []
            device = self._devices[lane % len(self._devices)] if self._devices else None
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(theirs, foreign, self._members, device), daemon=True
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child starts none of theirs
                process.start()
            theirs.close()
            self._running[lane] = (process, ours)
        for lane in lanes if not fork else ():
            try:
                self._running[lane][1].recv()
            except (EOFError, OSError) as error:
                raise WorkerDiedError("a worker process ended before it could begin; what it wrote to standard error says why.") from error


def _serve(connection: Connection, foreign: list[Connection], members: Members, device: str | None) -> None:
    for other in foreign:  # a forked process has them all; a pipe ends only when nobody has its end
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):
            set_death_signal = 1
            ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    import torch

    torch.set_num_threads(1)
    worker = Worker(members, device)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        if not foreign:
            connection.send(None)  # it has begun
        while True:
            connection.send(worker.do(connection.recv()))
    os._exit(0)


def portable(error: Exception) -> Exception:
    """An exception that survives the way back: our own as they are, torch's and other people's as text."""
    if isinstance(error, ModelGlueError | MemoryError | TimeoutError):
        return type(error)(str(error))
    if is_out_of_memory(error):
        return MemoryError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
