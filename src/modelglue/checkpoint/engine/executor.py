"""Workers on other machines: a Ray cluster whose machines see the same disk.

Each worker writes its own byte ranges of the output; the caller keeps the journal.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint.engine.workers import OnDone
from modelglue.errors import RunError, UserError, WorkerDiedError

#: workers that may die before the cluster is given up; what they were doing is done again
_DEATHS = 3


@dataclass(frozen=True)
class RayCluster:
    """`--executor`: "ray" for the cluster that this machine belongs to, else one on this machine alone; "ray://HOST:PORT" for another."""

    address: str | None

    def run(self, function: Callable[[Any, Any], Any], state: Any, tasks: Sequence[Any], *, workers: int | None, on_done: OnDone) -> None:
        """`run_tasks` on the cluster: as many workers as it has processors, or `workers`, each a process that gets the state once.

        A task whose worker died is done again by a new one. After the third death WorkerDiedError, which keeps what was finished for the
        next run.
        """
        with self.joined() as ray:
            actors: list[Any] = []
            try:
                shared = ray.put((function, state, str(Path.cwd())))
                actor = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
                count = workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
                actors += [actor.remote(shared) for _ in range(min(count, len(tasks)))]
                self._drive(ray, actors, lambda: actor.remote(shared), tasks, on_done)
            finally:
                for one in actors:
                    with contextlib.suppress(Exception):  # it may be dead already, and the cluster too
                        ray.kill(one)

    @contextmanager
    def joined(self) -> Iterator[Any]:
        """Ray, connected to the cluster. A connection that was there before stays; RunError where there is no way to the cluster."""
        ray = _ray()
        mine = not ray.is_initialized()
        if mine:
            self._connect(ray)
        try:
            yield ray
        finally:
            if mine:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address is not None:
                ray.init(self.address, **quiet)
                return
            try:
                ray.init("auto", **quiet)
            except ConnectionError:  # none is running: one on this machine
                ray.init(include_dashboard=False, **quiet)
        except Exception as error:  # whatever stands between here and there
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"executor '{self.address or 'ray'}': cannot be reached ({reason}). Check the address and the cluster."
            ) from error

    def _drive(self, ray: Any, actors: list[Any], make: Callable[[], Any], tasks: Sequence[Any], on_done: OnDone) -> None:
        waiting = deque(tasks)
        idle = list(actors)
        running: dict[Any, tuple[Any, Any]] = {}
        deaths = 0
        while running or waiting:
            while waiting and idle:
                one, task = idle.pop(), waiting.popleft()
                running[one.do.remote(task)] = (one, task)
            [done], _ = ray.wait(list(running), num_returns=1)
            one, task = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except ray.exceptions.RayError as error:
                deaths += 1
                if deaths >= _DEATHS:
                    raise WorkerDiedError(
                        f"{deaths} workers of the cluster died, the last one with: {str(error).splitlines()[0]} "
                        "Run it again when the cluster is well; the finished part is kept."
                    ) from error
                waiting.appendleft(task)
                actors.remove(one)
                one = make()
                actors.append(one)
                idle.append(one)
                continue
            idle.append(one)
            waiting.extendleft(on_done(task, result) or ())


class _Worker:
    """One process of the cluster. The models and the output stand at the same paths as where the merge was called."""

    def __init__(self, shared: tuple[Callable[[Any, Any], Any], Any, str]) -> None:
        import torch

        torch.set_num_threads(1)
        self._function, self._state, folder = shared
        with contextlib.suppress(OSError):  # then relative paths are not found, and the error names them
            os.chdir(folder)

    def do(self, task: Any) -> Any:
        return self._function(self._state, task)


def executor_of(text: str | None) -> RayCluster | None:
    """What `--executor` names; None for the processes of this machine. UserError for anything else, and where Ray is not installed."""
    if text is None or text == "local":
        return None
    if text != "ray" and not text.startswith("ray://"):
        raise UserError(f"executor '{text}': there is none of this name. Allowed are local, ray and ray://HOST:PORT.")
    _ray()
    return RayCluster(None if text == "ray" else text)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("executor 'ray': Ray is not installed. Install it with: pip install 'modelglue[ray]'.") from error
    return ray
