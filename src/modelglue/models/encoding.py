"""Texts become ids, by the conventions of lm-evaluation-harness, whoever reads the ids then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from modelglue.errors import CheckpointError
from modelglue.models.cached import common_length
from modelglue.models.likelihood import Row

#: texts whose ids are remembered
_REMEMBERED = 2**16


class TextEncoder:
    """A tokenizer for a model that reads `limit` ids and has embeddings for `vocabulary` of them; `truncated` counts what was cut."""

    def __init__(self, tokenizer: Any, limit: int, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.truncated = 0
        self.limit = limit
        self._vocabulary = vocabulary
        self._known: dict[str, list[int]] = {}
        self._rows: dict[tuple[str, str], tuple[list[Row], bool]] = {}
        # What an empty context is: the beginning-of-sequence id, else the end-of-text id, and (where there is neither) id 0.
        first = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        self.first = int(first[0]) if first else 0
        self._first_text = str(tokenizer.decode(first[:1])) if first else ""
        self._closes = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

    def prompts(self, prompts: Sequence[str], max_new_tokens: int) -> tuple[list[list[int]], list[int]]:
        """Ids of contexts that are to be continued, and how many may be written behind each.

        A context is cut (its end stays) to make room for `max_new_tokens`, but keeps half of the model's positions.
        """
        kept = max(self.limit - max_new_tokens, self.limit // 2, 1)
        encoded = self.encode(prompts) if max_new_tokens > 0 and self.limit > 1 else []
        self.truncated += sum(len(ids) > kept for ids in encoded)
        rows = [ids[-kept:] or [self.first] for ids in encoded]
        return rows, [min(max_new_tokens, self.limit - len(row)) for row in rows]

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[list[Row]]:
        """One row for each pair; of a text without a context that the model cannot read at once, several, each of which scores a part.

        Pairs are remembered as texts are.
        """
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in self._rows]:
            if len(self._rows) + len(new) > _REMEMBERED:
                self._rows.clear()
                new = list(dict.fromkeys(pairs))
            kept = [context.rstrip() for context, _ in new]
            whole = [context + continuation for context, continuation in new]
            texts = list(dict.fromkeys(kept + whole))
            encoded = dict(zip(texts, self.encode(texts), strict=True))
            self._rows |= {pair: self._row(encoded[text], encoded[left], left) for pair, left, text in zip(new, kept, whole, strict=True)}
        found = [self._rows[pair] for pair in pairs]
        self.truncated += sum(cut for _, cut in found)
        return [rows for rows, _ in found]

    def _row(self, ids: list[int], before: list[int], context: str) -> tuple[list[Row], bool]:
        """The rows of one pair, and whether its context was cut."""
        start = common_length(ids, before) if context else 0
        if start == 0:
            ids = ids if ids[:1] == [self.first] else [self.first, *ids]
            start = 1
        over = max(len(ids) - self.limit - 1, 0)  # the last id is only predicted
        if over and not context:
            return list(self._windows(ids)), False
        return [Row(ids[over:], max(start - over, 1))], over > 0

    def _windows(self, ids: list[int]) -> Iterator[Row]:
        """Parts of a text after its first id. From the second on each has half of the model's positions before it."""
        start, stop = 1, self.limit + 1
        while start < len(ids):
            begin = max(stop - self.limit - 1, 0)
            yield Row(ids[begin:stop], start - begin)
            start, stop = stop, min(stop + max(self.limit // 2, 1), len(ids))

    def _begins(self, text: str) -> bool:
        return bool(self._first_text) and text.startswith(self._first_text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with the tokenizer's own special tokens, but no text is closed, and none is begun that begins itself.

        Texts that were encoded before are remembered: candidates are asked the same questions again and again.
        """
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            if len(self._known) + len(new) > _REMEMBERED:
                self._known.clear()
            self._known |= zip(new, self._encoded(new), strict=True)
        return [self._known[text] for text in texts]

    def once(self, text: str) -> list[int]:
        """The ids of a text from outside, that nobody may ever ask again: it is not remembered. At least one id."""
        return self._encoded([text])[0] or [self.first]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in texts]
        for begun in (False, True):
            places = [place for place, text in enumerate(texts) if self._begins(text) == begun]
            if places:
                rows = self.tokenizer([texts[place] for place in places], add_special_tokens=not begun, verbose=False)["input_ids"]
                for place, ids in zip(places, rows, strict=True):
                    found[place] = ids[:-1] if self._closes and not begun else ids
        for text, ids in zip(texts, found, strict=True):
            if max(ids, default=0) >= self._vocabulary:
                raise CheckpointError(
                    f"the tokenizer makes id {max(ids)} of {text[:40]!r}, but the model has embeddings for {self._vocabulary} ids only. "
                    "Give the model the tokenizer that it was trained with."
                )
        return found
