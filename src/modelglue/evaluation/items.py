"""One question to a model: what is asked, and how the answer is marked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelglue.errors import UserError


@dataclass(frozen=True)
class Generation:
    """How a continuation is generated: greedily, up to a stop string or this many tokens."""

    until: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Request:
    """One question to the model: how likely is `continuation` after `context`, or (with `generation`) what comes after it?"""

    context: str
    continuation: str = ""
    generation: Generation | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """One question of a task, and how its answer is marked."""

    id: str
    """Stable name of the document: equal documents, equal ids, whatever else is in the set."""
    key: str
    """SHA-256 of all that the value depends on besides the model."""
    requests: tuple[Request, ...]
    _task: Any
    _instances: tuple[Any, ...]
    _metric: str

    @property
    def context(self) -> str:
        """What stands before the answer; the text that a router reads."""
        return self.requests[0].context

    @property
    def question(self) -> tuple[tuple[str, str], ...]:
        """What is asked, without who asks: equal questions may stand in documents that differ in a number or a name."""
        return tuple((request.context, request.continuation) for request in self.requests)

    def mark(self, replies: Sequence[object]) -> float:
        """The metric's value in [0, 1] for the model's replies, in the order of the requests; NaN if one of them is NaN.

        Raises UserError naming task and item when the task's own code fails, or when its metric gives anything else for one item.
        """
        if any(isinstance(reply, tuple) and reply[0] != reply[0] for reply in replies):
            return math.nan
        where = f"task '{self._task.task_name}'"
        try:
            found = self._results(replies)
        except Exception as error:  # filters and metrics may be anybody's code
            raise UserError(f"{where}: its metric fails on item {self.id}: {error!r}. Mend the task.") from error
        if self._metric not in found:
            raise UserError(f"{where}: gives no '{self._metric}', but {', '.join(found)}. Name one as TASK:METRIC in the task list.")
        value = found[self._metric]
        number = float(value) if isinstance(value, int | float | np.number | np.bool_) else math.nan
        if not 0 <= number <= 1:
            raise UserError(
                f"{where}: its metric '{self._metric}' gives {value!r} for item {self.id}; "
                "allowed is a number from 0 to 1 per item. Choose another metric as TASK:METRIC."
            )
        return number

    def _results(self, replies: Sequence[object]) -> Mapping[str, Any]:
        """All metrics of the task for one item, by the harness: filters first."""
        instances = [
            dataclasses.replace(instance, resps=[reply], filtered_resps={})
            for instance, reply in zip(self._instances, replies, strict=True)
        ]
        pipeline = self._task._filters[0]
        pipeline.apply(instances)
        found: Mapping[str, Any] = self._task.process_results(
            instances[0].doc, [instance.filtered_resps[pipeline.name] for instance in instances]
        )
        return found
