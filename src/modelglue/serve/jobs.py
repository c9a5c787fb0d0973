"""A prompt that waits for its answers, and what is told of them as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from modelglue.models.sampling import Sampling


@dataclass(frozen=True)
class Started:
    """The prompt was read: who answers, and its length in the answering model's tokens."""

    expert: str | None
    weight: float | None
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """More of one choice's text, which will not change any more."""

    choice: int
    text: str


@dataclass(frozen=True)
class Ended:
    """A choice is complete; `text` is all of it."""

    choice: int
    text: str
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Failed:
    """Nothing more will come of this job."""

    kind: Literal["request", "timeout", "model", "closed"]
    message: str
    code: str | None = None


Event: TypeAlias = Started | Piece | Ended | Failed


@dataclass(eq=False)
class Job:
    """One prompt: a text, or messages for the answering model's own chat template."""

    deliver: Callable[[Event], None]
    """Is called by the engine's thread with every event, and must not block."""
    prompt: str = ""
    messages: Sequence[Mapping[str, Any]] | None = None
    until: Sequence[str] = ()
    max_tokens: int | None = None
    """None: as many as the model has room for, up to the server's limit."""
    sampling: Sampling = field(default_factory=Sampling)
    choices: int = 1
    stream: bool = False
    """Whether pieces are wanted."""

    @property
    def routed_on(self) -> str:
        """What the router reads: the prompt, or the contents of the messages, without any template."""
        if self.messages is None:
            return self.prompt
        return "\n".join(str(message.get("content") or "") for message in self.messages)
