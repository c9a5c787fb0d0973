"""OpenAI's objects: completions, chunks of them, and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.serve.jobs import Ended, Started


@dataclass(frozen=True)
class Form:
    """One kind of completion: how its objects look."""

    identity: str
    model: str
    created: int
    chat: bool

    def whole(self, started: Sequence[Started], ended: Sequence[tuple[int, Ended]]) -> dict[str, Any]:
        """The complete answer; `ended` are (index of the choice, how it ended)."""
        choices = [
            {"index": index, "finish_reason": end.reason, "logprobs": None, **self._text("message", end.text)}
            for index, end in sorted(ended, key=lambda one: one[0])
        ]
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": choices,
            "usage": usage(started, [end for _, end in ended]),
            **_experts(started),
        }

    def opening(self, index: int, started: Started) -> dict[str, Any]:
        """The first chunk of a choice: who speaks, and no text yet."""
        text = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": ""}
        return {**self._chunk(index, None, text), **_experts([started])}

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, None, self._text("delta", text))

    def closing(self, index: int, end: Ended) -> dict[str, Any]:
        return self._chunk(index, end.reason, {"delta": {}} if self.chat else {"text": ""})

    def total(self, started: Sequence[Started], ended: Sequence[Ended]) -> dict[str, Any]:
        """The last chunk, where the client wants to know what was used."""
        return {**self._head(self._kind), "choices": [], "usage": usage(started, ended)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, reason: str | None, text: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self._kind), "choices": [{"index": index, "finish_reason": reason, "logprobs": None, **text}]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _text(self, place: str, text: str) -> dict[str, Any]:
        if not self.chat:
            return {"text": text}
        return {place: {"role": "assistant", "content": text} if place == "message" else {"content": text}}


def usage(started: Sequence[Started], ended: Sequence[Ended]) -> dict[str, int]:
    """Tokens by the answering models' own tokenizers; every prompt counts once, whatever the number of its choices."""
    prompt, completion = sum(start.prompt_tokens for start in started), sum(end.tokens for end in ended)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _experts(started: Sequence[Started]) -> dict[str, Any]:
    """Which expert answered each prompt, and with which weight: not in OpenAI's objects, and nothing for a single model."""
    if any(start.expert is None for start in started):
        return {}
    return {"modelglue": [{"expert": start.expert, "weight": start.weight} for start in started]}


def error_object(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
