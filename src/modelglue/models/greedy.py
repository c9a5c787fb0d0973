"""Greedy decoding of many rows at once, with stop strings that may end inside a token."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from modelglue.models.cached import CachedModel, Past

#: rows that have ended are taken out of a running batch when they are at least this share of it
_ENDED_SHARE = 0.25
#: ids of a text that is remembered, and how many such texts are
_SHORT = 32
_REMEMBERED = 2**15
_TEXTS: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], str]] = weakref.WeakKeyDictionary()


class Stops:
    """The stop strings of one call, for one tokenizer."""

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._until = [stop for stop in until if stop]
        self._ending: dict[int, bool] = {}  # ids in whose text a stop string may end
        self._stopped: dict[tuple[int, ...], str] = {}  # texts that hold a stop string, until they are asked for
        # Decoders make up blanks and join bytes to other than ASCII characters; all else in a text stands in the text of one of its ids.
        self._findable = all(stop[-1].isascii() and stop[-1] != " " for stop in self._until)
        self._findable &= not getattr(tokenizer, "clean_up_tokenization_spaces", False)

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids` holds a stop string; without the last id it is known to hold none.

        A stop string that has just been completed ends in what the last id added, so most ids are dismissed without decoding the row.
        """
        if not self._until or (self._findable and not self._may_end(ids[-1])):
            return False
        text = decode(self._tokenizer, ids)
        if not any(stop in text for stop in self._until):
            return False
        self._stopped[tuple(ids)] = text
        return True

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids` before the first stop string."""
        text = self._stopped.pop(tuple(ids), None)
        return self.cut(decode(self._tokenizer, ids) if text is None else text)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((text.index(stop) for stop in self._until if stop in text), default=len(text))]

    def _may_end(self, token: int) -> bool:
        if token not in self._ending:
            piece = decode(self._tokenizer, [token])
            self._ending[token] = any(stop[-1] in piece for stop in self._until)
        return self._ending[token]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens. Short texts are remembered: models that resemble each other mostly write the same."""
    known = _TEXTS.setdefault(tokenizer, {})
    key = tuple(ids)
    text = known.get(key)
    if text is None:
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if len(key) <= _SHORT:
            if len(known) >= _REMEMBERED:
                known.clear()
            known[key] = text
    return text


def continue_rows(
    reader: CachedModel, rows: Sequence[list[int]], steps: Sequence[int], ends: Collection[int], stops: Stops
) -> Iterator[tuple[int, list[int], bool]]:
    """(place, ids written after the row, whether the logits were numbers), in no particular order.

    A row ends before an end id or with a stop string, at most `steps` of it are written, and none where logits are no numbers.

    What all rows begin with is read once. Memory: one batch of at most BATCH_POSITIONS positions.
    """
    lengths = [len(row) + most for row, most in zip(rows, steps, strict=True)]
    shared, past = reader.shared([row[:-1] for row in rows], max(lengths, default=0))
    for places in reader.batches(lengths):
        before = None if past is None else past.rows([0] * len(places))
        pieces, most = [rows[place][shared:] for place in places], [steps[place] for place in places]
        written, sound = _continue(reader, pieces, before, most, ends, stops)
        yield from zip(places, written, sound, strict=True)


def _continue(
    reader: CachedModel, rows: Sequence[list[int]], past: Past | None, steps: Sequence[int], ends: Collection[int], stops: Stops
) -> tuple[list[list[int]], list[bool]]:
    """One batch. Rows that have ended run on until enough of them can be taken out together."""
    import torch

    written: list[list[int]] = [[] for _ in rows]
    sound = [True] * len(rows)
    batch = list(range(len(rows)))  # the row at each place of the batch
    running = set(batch)
    logits, past = reader.read(rows, past, keep=1)
    while True:
        best, chosen = logits[:, -1].float().max(dim=-1)  # NaN wins, so the largest logit is finite only where none is NaN
        for row, token, finite in zip(batch, chosen.tolist(), best.isfinite().tolist(), strict=True):
            if row in running:
                if not finite:
                    sound[row] = False
                elif token not in ends:
                    written[row].append(token)
                if not finite or token in ends or len(written[row]) == steps[row] or stops.reached(written[row]):
                    running.remove(row)
        if not running:
            return written, sound
        if reader.shareable and len(running) <= (1 - _ENDED_SHARE) * len(batch):
            kept = [place for place, row in enumerate(batch) if row in running]
            batch = [batch[place] for place in kept]
            past, chosen = past.rows(kept), chosen[torch.tensor(kept, device=chosen.device)]
        logits, past = reader.step(chosen, past)
