"""Text files as a task: how many bits the model needs for a byte of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelglue.errors import UserError
from modelglue.evaluation.definitions import Definition
from modelglue.evaluation.items import Item, Reply, Request

_VERSION = 1
#: characters of a piece: a few hundred tokens, so that most of it has a context
_CHARACTERS = 1000


@dataclass(frozen=True)
class BitsPerByte:
    """Marks a piece of text: the loss is -log2 p(text) / bytes, the value 2^-loss, the geometric mean of a byte's probability."""

    gives_loss: bool = True
    concurrent: bool = False

    def mark(self, item: Item, replies: Sequence[Reply]) -> tuple[float, float | None]:
        (reply,), (request,) = replies, item.requests
        assert isinstance(reply, tuple)
        bits = -reply[0] / math.log(2) / len(request.continuation.encode())
        return min(2.0**-bits, 1.0), bits


def load_text(definition: Definition) -> list[Item]:
    """`files`: patterns relative to the YAML file; `characters`: the longest piece (1,000), which ends at a line's end where it can.

    Every piece is an item. A piece that the model cannot read at once is scored in parts, each after half of what it can read.
    """
    definition.only("files", "characters")
    patterns = definition.get("files", (list, str))
    characters = definition.get("characters", int, _CHARACTERS)
    if characters < 1:
        raise UserError(f"{definition.place}: characters is {characters}; allowed is a whole number from 1.")
    items = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [path for folder in definition.folders for path in sorted(folder.glob(str(pattern))) if path.is_file()]
        if not found:
            looked = " or ".join(str(folder) for folder in definition.folders) or "no folder (MODELGLUE_DATA is not set)"
            raise UserError(f"{definition.place}: its data is not there: nothing matches {pattern!r} in {looked}. Put it there.")
        for path in found:
            items += [_item(piece) for piece in pieces(_text(path), characters)]
    if not items:
        raise UserError(f"{definition.place}: its files hold no text.")
    return items


def pieces(text: str, characters: int) -> Iterator[str]:
    """The text in pieces of at most so many characters; together they are the text. Lines stay whole where they fit; blank pieces go."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > characters:
            yield from [piece] if piece.strip() else []
            piece = ""
        while len(line) > characters:
            yield from [line[:characters]] if line[:characters].strip() else []
            line = line[characters:]
        piece += line
    yield from [piece] if piece.strip() else []


def _item(piece: str) -> Item:
    digest = hashlib.sha256(piece.encode()).hexdigest()
    key = hashlib.sha256(json.dumps([_VERSION, "bits_per_byte", digest]).encode()).hexdigest()
    return Item(digest[:16], key, (Request("", piece),), BitsPerByte())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}). Give text files.") from error
