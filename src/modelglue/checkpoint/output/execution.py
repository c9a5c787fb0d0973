"""Where the tasks of an output run, how many beside each other, and in what chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint.engine.compiled import plain
from modelglue.checkpoint.engine.device import DEVICE_CHUNK_ELEMENTS, devices_of, lanes_of
from modelglue.checkpoint.engine.executor import RayCluster, executor_of
from modelglue.checkpoint.engine.workers import run_tasks
from modelglue.checkpoint.output.fill import Digest, Filling, fill
from modelglue.checkpoint.output.memory import WORKER_BYTES, Division, divide
from modelglue.checkpoint.output.plan import Plan, Task
from modelglue.checkpoint.protocol import Checkpoint
from modelglue.errors import UserError
from modelglue.settings import SMALL_OUTPUT_BYTES, default_workers


@dataclass(frozen=True)
class Execution:
    """Where tasks run: processes of this machine, one for each device, or a cluster."""

    division: Division
    devices: tuple[str, ...]
    cluster: RayCluster | None
    workers: int | None  # as asked for

    def filling(self, checkpoint: Checkpoint, plan: Plan, folder: Path) -> Filling:
        return Filling(checkpoint, plan, folder, self.division.chunk, self.division.mapped, self.devices, self.cluster is not None)

    def prepare(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Surveys of the whole model run here, on the first device if there is one."""
        lanes = lanes_of(self.devices[0]) if self.devices and self.cluster is None else ()
        with lanes[0].active() if lanes else contextlib.nullcontext(), plain() if self.cluster else contextlib.nullcontext():
            checkpoint.prepare(names)

    def run(self, filling: Filling, tasks: Sequence[Task | Digest], on_done: Callable[[Any, dict[str, str]], Sequence[Digest]]) -> None:
        if self.cluster is not None:
            self.cluster.run(fill, filling, tasks, workers=self.workers, on_done=on_done)
            return
        division = self.division

        def cost(task: Task | Digest) -> int:
            return WORKER_BYTES if isinstance(task, Digest) else division.cost(filling.checkpoint, task)

        shared = any(cost(task) * division.workers > division.capacity for task in tasks)  # else all of them fit beside each other
        run_tasks(
            fill, filling, tasks, workers=division.workers, on_done=on_done, cost=cost if shared else None, capacity=division.capacity,
            spawn=bool(self.devices),
        )  # fmt: skip


def execution_of(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    workers: int | None,
    chunk: int | None,
    memory: int | None,
    device: str | None,
    executor: str | None,
) -> Execution:
    """What the options of `save` mean for this output; UserError for what cannot be had."""
    devices, cluster = devices_of(device), executor_of(executor)
    if devices and cluster is not None:
        raise UserError(f"device '{device}' and executor '{executor}' do not go together: workers of a cluster compute on processors.")
    if devices:
        wanted = len(devices)
        chunk = chunk or DEVICE_CHUNK_ELEMENTS
    elif workers is not None:
        wanted = workers
    else:
        wanted = 1 if plan.tensor_bytes < SMALL_OUTPUT_BYTES else default_workers()
    division = divide(checkpoint, memory=memory, workers=wanted, fixed_workers=workers is not None or bool(devices), chunk=chunk)
    return Execution(division, devices, cluster, workers)
