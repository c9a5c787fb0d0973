"""Where candidates are scored: in this process, in processes of this machine, or on a cluster, and on which devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelglue.checkpoint.engine.device import SIMULATED, devices_of
from modelglue.checkpoint.engine.executor import RayCluster, executor_of
from modelglue.errors import UserError
from modelglue.evaluation.crew import Crew, Processes
from modelglue.evaluation.members import Members


@dataclass(frozen=True)
class Place:
    """What `--workers`, `--device` and `--executor` say together; no score depends on the number of workers."""

    workers: int | None = None
    """Default: one for every device."""
    devices: tuple[str, ...] = ()
    """None for the processor."""
    cluster: RayCluster | None = None

    @classmethod
    def named(cls, workers: int | None = None, device: str = "cpu", executor: str = "local") -> Place:
        """UserError for a device that is not there, an executor that is unknown, or Ray where it is not installed."""
        cluster = executor_of(executor)
        if cluster is None:
            return cls(workers, accelerators(device))
        if device not in ("cpu", "cuda"):
            raise UserError(f"device '{device}' and executor '{executor}': allowed on a cluster are cpu, and cuda for one GPU each.")
        return cls(workers, () if device == "cpu" else (device,), cluster)

    @property
    def device(self) -> str | None:
        """Of a model in this process; the first of several."""
        return self.devices[0] if self.devices and self.cluster is None else None

    @contextmanager
    def crew(self, members: Members, *, apart: bool = False) -> Iterator[Crew | None]:
        """The workers until the end of the block; None where this process does it all, which it does not where they shall be `apart`."""
        count = self.workers or max(len(self.devices), 1)
        crew: Crew | None = None
        if self.cluster is not None:
            from modelglue.evaluation.ray_crew import RayCrew

            crew = RayCrew(members, self.cluster, self.workers, gpus=bool(self.devices))
        elif count > 1 or apart:
            crew = Processes(members, count, self.devices)
        try:
            yield crew
        finally:
            if crew is not None:
                crew.close()


def accelerators(text: str) -> tuple[str, ...]:
    """The devices that `--device` names; a kind without a number ("cuda") is all of that kind that torch sees. UserError for none."""
    names = devices_of(text)
    if len(names) == 1 and ":" not in names[0]:
        import torch

        count = int(torch.get_device_module(names[0]).device_count())
        return names if count == 1 else tuple(f"{names[0]}:{number}" for number in range(count))
    return tuple("cpu" if name == SIMULATED else name for name in names)
