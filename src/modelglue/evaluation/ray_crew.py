"""Workers on a Ray cluster that answer for candidates. The models stand at the same paths on every machine; scores stay with the caller."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelglue.checkpoint.engine.executor import RayCluster
from modelglue.errors import RunError, UserError, WorkerDiedError
from modelglue.evaluation.crew import Outcome, Unit, Worker, portable
from modelglue.evaluation.members import Members


class RayCrew:
    """A `Crew` whose lanes are actors of a cluster: one processor each, or one GPU where `gpus`. They are up when this returns.

    `workers`: default is as many as the cluster has room for. UserError if it has no room for that many, RunError if it cannot be reached
    or its workers cannot begin.
    """

    def __init__(self, members: Members, cluster: RayCluster, workers: int | None = None, *, gpus: bool = False) -> None:
        self._actors: dict[int, Any] = {}
        self._running: dict[int, tuple[Any, Unit]] = {}
        self._died: set[int] = set()
        self._stack = contextlib.ExitStack()
        self._ray = self._stack.enter_context(cluster.joined())
        try:
            self.lanes = self._room(workers, "GPU" if gpus else "CPU")
            options = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
            self._actor = self._ray.remote(max_restarts=0, **options)(_Far)
            self._shared = self._ray.put((members, "cuda" if gpus else None, str(Path.cwd())))
            self._actors = {lane: self._actor.remote(self._shared) for lane in range(self.lanes)}
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Wait for all workers, so that no candidate is blamed for what none of them can do, or for the time that it takes."""
        try:
            self._ray.get([actor.begun.remote() for actor in self._actors.values()])
        except self._ray.exceptions.RayError as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise RunError(
                f"the workers of the cluster cannot begin ({last}). Every machine needs modelglue and the models at the same paths."
            ) from error

    def _room(self, workers: int | None, kind: str) -> int:
        room = int(self._ray.cluster_resources().get(kind, 0))
        if room < (workers or 1):
            raise UserError(f"the cluster has {room} {kind}s, and {workers or 1} workers need one each. Give fewer, or add machines.")
        return workers or room

    def give(self, lane: int, unit: Unit) -> None:
        if lane not in self._actors:
            self._actors[lane] = self._actor.remote(self._shared)
        self._running[lane] = (self._actors[lane].do.remote(unit), unit)

    def wait(self, timeout: float | None) -> Iterator[tuple[int, Outcome]]:
        lanes = {reference: lane for lane, (reference, _) in self._running.items()}
        try:
            done, _ = self._ray.wait(list(lanes), num_returns=1, timeout=timeout)
        except ConnectionError as error:
            raise RunError(f"the connection to the cluster was lost ({error}). Resume the search; what was scored is kept.") from error
        for reference in done:
            lane = lanes[reference]
            unit = self._running[lane][1]
            try:
                outcome: Outcome = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                outcome = portable(error.cause if isinstance(error.cause, Exception) else error)
            except self._ray.exceptions.RayError as error:
                again = lane not in self._died
                self.renew(lane)
                if again:
                    self._died.add(lane)
                    self.give(lane, unit)
                    continue
                outcome = WorkerDiedError(f"its worker on the cluster died twice: {(str(error).splitlines() or [type(error).__name__])[0]}")
            self._running.pop(lane, None)
            self._died.discard(lane)
            yield lane, outcome

    def renew(self, lane: int) -> None:
        self._running.pop(lane, None)
        self._died.discard(lane)
        actor = self._actors.pop(lane, None)
        if actor is not None:
            with contextlib.suppress(Exception):  # it may be dead already, and the cluster too
                self._ray.kill(actor)

    def close(self) -> None:
        for lane in list(self._actors):
            self.renew(lane)
        self._stack.close()


class _Far:
    """One process of the cluster."""

    def __init__(self, shared: tuple[Members, str | None, str]) -> None:
        import torch

        torch.set_num_threads(1)
        members, device, folder = shared
        with contextlib.suppress(OSError):  # then relative paths are not found, and the error names them
            os.chdir(folder)
        self._worker = Worker(members, device)

    def begun(self) -> None:
        """Comes back when the worker is there."""

    def do(self, unit: Unit) -> Outcome:
        return self._worker.do(unit)
