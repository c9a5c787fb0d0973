"""A batch that rows join when they are ready and leave when they have ended: continuous batching for one reader.

A row's text does not depend (beyond rounding) on who is beside it, when they joined, or whether they were dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelglue.models.cached import batches
from modelglue.models.greedy import Stops, decode
from modelglue.models.joining import JoiningReader
from modelglue.models.sampling import Draw, choose

_HALF = "\ufffd"  # what a decoder writes for bytes that make no character yet
_CLEANED = 4
#: `invalid`: the model's logits were no numbers
Finish = Literal["stop", "length", "invalid"]


@dataclass(eq=False)
class Row:
    """One text that is being written: `ids` were given, `written` is what follows, `finish` says why it has ended."""

    ids: list[int]
    steps: int
    """Ids that may be written at most."""
    ends: Collection[int]
    """A row ends before one of these ids,"""
    stops: Stops
    """or when its text holds one of these strings."""
    until: Sequence[str]
    tokenizer: Any
    draw: Draw | None = None
    """None is greedy."""
    reader: JoiningReader | None = None
    """Reads the ids in the place of the batch's own reader, where rows are mixed of several models by weights of their own."""
    written: list[int] = field(default_factory=list)
    finish: Finish | None = None
    _given: int = 0
    """Characters that `fresh` has given."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            self.finish = "length"

    def take(self, token: int, sound: bool) -> None:
        """The next id was chosen."""
        if not sound:
            self.finish = "invalid"
        elif token in self.ends:
            self.finish = "stop"
        else:
            self.written.append(token)
            if self.stops.reached(self.written):
                self.finish = "stop"
            elif len(self.written) == self.steps:
                self.finish = "length"

    def text(self) -> str:
        """What is written so far, cut before the first stop string."""
        return self.stops.cut(decode(self.tokenizer, self.written))

    def fresh(self) -> str:
        """What has been added to the text since the last call and will not change any more: all that is given makes the whole text."""
        text = self.text()
        settled = len(text) if self.finish else self._settled(text)
        new = text[self._given : settled]
        self._given = max(self._given, settled)
        return new

    def _settled(self, text: str) -> int:
        """Characters that no further id can change: a stop string may be half there, or a character half decoded."""
        # A decoder that cleans up takes back a blank before what belongs to the word before it: " n't".
        end = len(text) - (_CLEANED if getattr(self.tokenizer, "clean_up_tokenization_spaces", False) else 0)
        end = min(end, len(text.rstrip(_HALF)))
        for stop in self.until:
            begun = next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
            end = min(end, len(text) - begun)
        return max(end, 0)


@dataclass
class _Group:
    """Rows in one tensor: what they have read, and the ids that were chosen last."""

    rows: list[Row]
    past: Any
    chosen: list[int]


class RunningBatch:
    """The rows of one reader. Memory: the caches of all rows, padded to the longest of them.

    Rows that the reader cannot join to others (a state that pads would change, a window that is too narrow) run by themselves.
    """

    def __init__(self, reader: JoiningReader) -> None:
        self._reader = reader
        self._groups: list[_Group] = []

    @property
    def rows(self) -> list[Row]:
        return [row for group in self._groups for row in group.rows]

    def tick(self, new: Sequence[Row] = (), dropped: Iterable[Row] = ()) -> None:
        """One more id in every row that runs, and the first one in every row that is new; rows that end leave, as do `dropped` ones."""
        gone = set(dropped)
        self._groups = [left for group in self._groups if (left := self._left(group, gone)) is not None]
        for group in self._groups:
            self._step(group)
        self._groups += self._read([row for row in new if row.finish is None])
        self._groups = [left for group in self._groups if (left := self._left(group, set())) is not None]
        self._join()

    def _step(self, group: _Group) -> None:
        import torch

        logits, group.past = self._reader.step(torch.tensor(group.chosen, device=_device(group.past)), group.past)
        self._choose(group, logits)

    def _choose(self, group: _Group, logits: Any) -> None:
        group.chosen, sound = choose(logits[:, -1], [row.draw for row in group.rows])
        for row, token, good in zip(group.rows, group.chosen, sound, strict=True):
            row.take(token, good)

    def _read(self, new: Sequence[Row]) -> list[_Group]:
        """The first ids of new rows. Rows that begin alike (samples of one prompt) are read once."""
        found: list[_Group] = []
        joint: dict[int, dict[tuple[int, ...], list[Row]]] = {}
        for row in new:
            if self._joinable(row):
                joint.setdefault(id(row.reader), {}).setdefault(tuple(row.ids), []).append(row)
            else:
                found.append(self._begin([[row]]))
        for beginnings in map(list, (alike.values() for alike in joint.values())):
            for places in batches([len(rows[0].ids) for rows in beginnings]):
                found.append(self._begin([beginnings[place] for place in places]))
        return found

    def _begin(self, beginnings: Sequence[Sequence[Row]]) -> _Group:
        reader = beginnings[0][0].reader or self._reader
        logits, past = reader.read([rows[0].ids for rows in beginnings], keep=1)
        places = [place for place, rows in enumerate(beginnings) for _ in rows]
        group = _Group([row for rows in beginnings for row in rows], past, [])
        if len(places) > len(beginnings):
            logits, group.past = logits[places], self._reader.pick(past, places)
        self._choose(group, logits)
        return group

    def _joinable(self, row: Row) -> bool:
        return len(row.ids) + row.steps <= self._reader.shareable

    def _left(self, group: _Group, gone: set[Row]) -> _Group | None:
        """The group without rows that have ended or are dropped."""
        kept = [place for place, row in enumerate(group.rows) if row.finish is None and row not in gone]
        if len(kept) == len(group.rows):
            return group
        if not kept:
            return None
        rows, chosen = [group.rows[place] for place in kept], [group.chosen[place] for place in kept]
        return _Group(rows, self._reader.pick(group.past, kept), chosen)

    def _join(self) -> None:
        joint = [group for group in self._groups if self._joinable(group.rows[0])]
        if len(joint) > 1:
            rows, chosen = [row for group in joint for row in group.rows], [token for group in joint for token in group.chosen]
            others = [group for group in self._groups if not self._joinable(group.rows[0])]
            self._groups = [_Group(rows, self._reader.join([group.past for group in joint]), chosen), *others]


def _device(past: Any) -> Any:
    return past.mask.device
