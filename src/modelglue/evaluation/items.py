"""One question to a model: what is asked, and how the answer is marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from modelglue.models import Unanswered

#: (log probability, is it the greedy continuation), or a text
Reply: TypeAlias = object


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


@dataclass(frozen=True)
class Mark:
    """What an answer is worth, and what the store keeps of it."""

    value: float
    """In [0, 1], larger is better; NaN where the model's numbers were none."""
    loss: float | None = None
    """Smaller is better, in nats or bits as the task says; None for tasks that have no loss."""
    answer: str | None = None
    """The first 16 hexadecimal digits of the SHA-256 of what was generated; None where nothing was."""
    tokens: int = 0
    """Token ids that were read and written for it."""


class Marker(Protocol):
    """How the answers to the items of one task are marked. Picklable where items shall be."""

    @property
    def gives_loss(self) -> bool:
        """Whether items are marked with a loss besides the value."""

    @property
    def concurrent(self) -> bool:
        """Whether marking takes so long, outside of this process, that several items are marked at once."""

    def mark(self, item: Item, replies: Sequence[Reply]) -> tuple[float, float | None]:
        """(value, loss) of one item for the model's replies, in the order of its requests."""


@dataclass(frozen=True, eq=False)
class Item:
    """One question of a task, and how its answer is marked."""

    id: str
    """Stable name of the document: equal documents, equal ids, whatever else is in the set."""
    key: str
    """SHA-256 of all that the value depends on besides the model."""
    requests: tuple[Request, ...]
    marker: Marker

    @property
    def context(self) -> str:
        """What stands before the answer; the text that a router reads."""
        return self.requests[0].context

    @property
    def question(self) -> tuple[tuple[str, str], ...]:
        """What is asked, without who asks: equal questions may stand in documents that differ in a number or a name."""
        return tuple((request.context, request.continuation) for request in self.requests)

    def mark(self, replies: Sequence[Reply]) -> tuple[float, float | None]:
        """(value in [0, 1], loss or None) for the model's replies, in the order of the requests; NaN if one of them is no number.

        Raises UserError naming task and item when the task's own code fails, or when its metric gives anything else for one item.
        """
        if any(isinstance(reply, Unanswered) or (isinstance(reply, tuple) and reply[0] != reply[0]) for reply in replies):
            return math.nan, None
        return self.marker.mark(self, replies)
