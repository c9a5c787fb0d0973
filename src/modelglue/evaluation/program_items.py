"""Tasks whose answers are programs: what the model writes is run with the document's tests, in the sandbox."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.errors import UserError
from modelglue.evaluation.definitions import Definition
from modelglue.evaluation.documents import Document
from modelglue.evaluation.items import Generation, Item, Reply, Request
from modelglue.evaluation.sandbox import Language, Limits, run_program

_VERSION = 1
_LANGUAGES = ("python", "javascript")


@dataclass(frozen=True)
class ProgramMarker:
    """1 for a program that passes its tests, else 0. Takes the time of the program: items are marked several at once."""

    before: str
    after: str
    language: Language
    limits: Limits
    gives_loss: bool = False
    concurrent: bool = True

    def mark(self, item: Item, replies: Sequence[Reply]) -> tuple[float, float | None]:
        (completion,) = replies
        return float(run_program(f"{self.before}{completion}{self.after}", self.language, self.limits).passed), None


def load_programs(definition: Definition) -> list[Item]:
    """Keys: `prompt`, `before` and `after` (templates over a document's fields: what the model reads, and what stands before and behind
    its answer in the program), `until` (stop strings), `max_new_tokens`, `language`, `seconds`, `memory_mb`, `sample` (so many of the
    items, chosen by their ids).
    """
    definition.only("data", "prompt", "before", "after", "until", "max_new_tokens", "language", "seconds", "memory_mb", "sample")
    language = definition.get("language", str, "python")
    if language not in _LANGUAGES:
        raise UserError(f"{definition.place}: language is {language!r}; allowed are {', '.join(_LANGUAGES)}.")
    seconds, memory = definition.get("seconds", (int, float), 10), definition.get("memory_mb", int, 512)
    limits = Limits(seconds=float(seconds), memory_bytes=memory * 2**20)
    generation = Generation(tuple(definition.get("until", list, [])), definition.get("max_new_tokens", int, 512))
    templates = {key: definition.get(key, str, "") for key in ("prompt", "before", "after")}
    (documents,) = definition.documents().values() if len(definition.get("data", dict)) == 1 else (None,)
    if documents is None:
        raise UserError(f"{definition.place}: data names several splits; a task of programs has one.")
    items = []
    for number, document in enumerate(documents):
        texts = {key: _render(definition, key, text, document, number) for key, text in templates.items()}
        marking = [_VERSION, "program", language, seconds, memory, generation.until, generation.max_new_tokens, texts]
        marker = ProgramMarker(texts["before"], texts["after"], language, limits)
        items.append(Item(_digest([document])[:16], _digest(marking), (Request(texts["prompt"], generation=generation),), marker))
    return sampled(definition, items)


def sampled(definition: Definition, items: Sequence[Item]) -> list[Item]:
    """As many of the items as `sample` says, chosen by a hash of their ids, in their order; all where it says nothing."""
    count = definition.get("sample", int, len(items))
    chosen = sorted(items, key=lambda item: hashlib.sha256(f"sample {item.id}".encode()).digest())[:count]
    kept = {id(item) for item in chosen}
    return [item for item in items if id(item) in kept]


def _render(definition: Definition, key: str, text: str, document: Document, number: int) -> str:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    try:
        return environment.from_string(text).render(**_named(document))
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"{definition.place}: {key} cannot be made of document {number}: {error}. Correct the template.") from error


def _named(document: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in document.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()
