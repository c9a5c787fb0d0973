"""Answers marked by lm-evaluation-harness: its filters and its metric, one item at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelglue.errors import UserError
from modelglue.evaluation.items import Item, Reply

#: answers to one item whose marks are remembered
_REMEMBERED = 32


@dataclass(frozen=True)
class HarnessMarker:
    """One document of a harness task: `golds` are the positions of the requests whose continuation is right.

    `lengths`: of the choices, where the task is a plain choice of one right answer, which the harness marks by log probability (`acc`) or
    by that over length (`acc_norm`); its general code takes ten times as long for that. None: the harness marks.
    """

    task: Any
    instances: tuple[Any, ...]
    metric: str
    golds: tuple[int, ...] = ()
    lengths: tuple[int, ...] | None = None
    _known: dict[tuple[Reply, ...], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def gives_loss(self) -> bool:
        return bool(self.golds)

    @property
    def concurrent(self) -> bool:
        return False

    def mark(self, item: Item, replies: Sequence[Reply]) -> tuple[float, float | None]:
        """The metric's value, and the negative log likelihood (nats) of the right answer, of the likeliest where there are several."""
        texts = tuple(replies) if all(isinstance(reply, str) for reply in replies) else None
        if texts is not None and texts in self._known:  # candidates that resemble each other mostly write the same
            return self._known[texts], None
        if self.lengths is not None:
            return self._chosen(replies, self.lengths)
        try:
            found = self._results(replies)
        except Exception as error:  # filters and metrics may be anybody's code
            raise UserError(f"{self._where}: its metric fails on item {item.id}: {error!r}. Mend the task.") from error
        if self.metric not in found:
            raise UserError(f"{self._where}: gives no '{self.metric}', but {', '.join(found)}. Name one as TASK:METRIC in the task list.")
        value = found[self.metric]
        number = float(value) if isinstance(value, int | float | np.number | np.bool_) else math.nan
        if not 0 <= number <= 1:
            raise UserError(
                f"{self._where}: its metric '{self.metric}' gives {value!r} for item {item.id}; "
                "allowed is a number from 0 to 1 per item. Choose another metric as TASK:METRIC."
            )
        if texts is not None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[texts] = number
        losses = [-reply[0] for reply in (replies[gold] for gold in self.golds) if isinstance(reply, tuple)]
        return number, min(losses, default=None)

    def _chosen(self, replies: Sequence[Any], lengths: Sequence[int]) -> tuple[float, float]:
        """1 if the right answer is the likeliest (the first of equal ones), else 0; and its negative log likelihood."""
        (gold,) = self.golds
        values = [value for value, _ in replies]
        ranked = values if self.metric == "acc" else [value / length for value, length in zip(values, lengths, strict=True)]
        return float(ranked.index(max(ranked)) == gold), -values[gold]

    @property
    def _where(self) -> str:
        return f"task '{self.task.task_name}'"

    def _results(self, replies: Sequence[Reply]) -> Mapping[str, Any]:
        """All metrics of the task for one item, by the harness: filters first."""
        pipeline = self.task._filters[0]
        filtered = list(replies)
        if not takes_first(pipeline):
            pairs = zip(self.instances, replies, strict=True)
            instances = [dataclasses.replace(instance, resps=[reply], filtered_resps={}) for instance, reply in pairs]
            pipeline.apply(instances)
            filtered = [instance.filtered_resps[pipeline.name] for instance in instances]
        found: Mapping[str, Any] = self.task.process_results(self.instances[0].doc, filtered)
        return found


def takes_first(pipeline: Any) -> bool:
    """Whether the filters take the first reply to each request, of which there is one, and do nothing else."""
    from lm_eval.filters.selection import TakeFirstFilter

    return all(getattr(made, "func", made) is TakeFirstFilter and not getattr(made, "keywords", None) for made in pipeline.filters)
