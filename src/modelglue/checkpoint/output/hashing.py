"""When a tensor can be hashed that several tasks write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelglue.checkpoint.output.fill import Digest, whole_tensors
from modelglue.checkpoint.output.plan import Plan, Task
from modelglue.checkpoint.protocol import Checkpoint


class Hashing:
    """Which tensors several tasks write, and when the last of these tasks is done."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, waiting: Sequence[Task], known: Mapping[str, str]) -> None:
        self._left: dict[str, set[int]] = {}
        for task in plan.tasks:
            whole = whole_tensors(checkpoint, task)
            for name in {name for name, _, _ in task.spans} - whole - set(known):
                self._left.setdefault(name, set())
        for task in waiting:
            for name in {name for name, _, _ in task.spans} & set(self._left):
                self._left[name].add(task.number)
        # a task that was done before its hashes were known cannot be: they stand in one line of the journal

    def ready(self) -> list[Digest]:
        """What can be hashed now."""
        return self._take(sorted(name for name, tasks in self._left.items() if not tasks))

    def after(self, task: Task) -> list[Digest]:
        """What can be hashed once `task` is done as well."""
        names = {name for name, _, _ in task.spans} & set(self._left)
        for name in names:
            self._left[name].discard(task.number)
        return self._take(sorted(name for name in names if not self._left[name]))

    def _take(self, names: Sequence[str]) -> list[Digest]:
        for name in names:
            del self._left[name]
        return [Digest(name) for name in names]
