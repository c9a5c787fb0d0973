"""Text in, text or log probabilities out: what evaluation and mixtures know of a model.

Here text becomes ids and ids become text, by the conventions of lm-evaluation-harness; `likelihood` and `greedy` do the rest. A row's
answer does not depend (beyond rounding) on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from modelglue.errors import CheckpointError
from modelglue.models.cached import CachedModel, common_length
from modelglue.models.forward import inference
from modelglue.models.greedy import Stops, continue_rows, decode
from modelglue.models.likelihood import Row, score_rows


class Unanswered(str):
    """The text of a row whose logits were no numbers: empty."""

    __slots__ = ()


class TextModel(Protocol):
    """Anything that scores and continues text: a model, or a mixture of models."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(natural log probability, is it the greedy continuation) of each continuation given its context."""
        ...

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, cut before the first stop string; `Unanswered` where the model's logits are no numbers."""
        ...


class LiveTextModel:
    """A transformers causal model with its tokenizer, on the CPU or wherever the model is.

    Log probabilities are NaN where the model's are; whoever scores decides what that means. Contexts longer than the model's limit
    keep their end; `truncated` counts them. `tokens` are the ids read and written for each row of the last call, pads and what rows share
    counted as if every row were alone. Raises CheckpointError for an id that the model has no embedding for.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.truncated = 0
        self.tokens: list[int] = []
        if model.config.is_encoder_decoder or not model.can_generate():
            raise CheckpointError(
                f"{type(model).__name__}: does not continue texts token by token, so it can be neither scored nor asked. "
                "Give a decoder with a language-model head."
            )
        config = model.config.get_text_config()
        self._limit = int(getattr(config, "max_position_embeddings", None) or 2**30)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        pad = tokenizer.pad_token_id
        self._reader = CachedModel(model, pad if pad is not None and pad < self._vocabulary else 0)
        ends = [tokenizer.eos_token_id, config.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
        self._ends = {end for entry in ends for end in (entry if isinstance(entry, list) else [entry]) if end is not None}
        self._specials = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        # What an empty context is: the beginning-of-sequence id, else the end-of-text id, and (where there is neither) id 0.
        first = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        self._first = int(first[0]) if first else 0
        self._first_text = str(tokenizer.decode(first[:1])) if first else ""
        self._closes = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """What all contexts begin with is read once, then every distinct context once, then every continuation once.

        The suffix after the longest common prefix of the ids of `context` and of `context + continuation` is scored, so a token that spans
        the border counts to the continuation. Blanks at a context's end move to the continuation.
        """
        with inference(self.model):
            windows = self._rows(pairs)
            rows = [row for part in windows for row in part]
            self.tokens = [sum(len(row.ids) for row in part) for part in windows]
            found = iter(score_rows(self._reader, rows, self._vocabulary))
            scored = [[next(found) for _ in part] for part in windows]
        return [(sum(value for value, _ in part), all(greedy for _, greedy in part)) for part in scored]

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy, with the model's cache; a row stops at an end-of-text id or when its decoded text holds a stop string.

        A context is cut (its end stays) to make room for `max_new_tokens`, but keeps half of the model's positions: where more are
        asked for than fit behind it, fewer are written.
        """
        texts = [""] * len(prompts)
        self.tokens = [0] * len(prompts)
        kept = max(self._limit - max_new_tokens, self._limit // 2, 1)
        encoded = self._encode(prompts) if max_new_tokens > 0 and self._limit > 1 else []
        self.truncated += sum(len(ids) > kept for ids in encoded)
        rows = [ids[-kept:] or [self._first] for ids in encoded]
        steps = [min(max_new_tokens, self._limit - len(row)) for row in rows]
        stops = Stops(self.tokenizer, until)
        ends = self._ends | {self._specials[stop] for stop in until if stop in self._specials}  # decoded text does not show these
        with inference(self.model):
            for place, ids, sound in continue_rows(self._reader, rows, steps, ends, stops):
                texts[place] = stops.cut(decode(self.tokenizer, ids)) if sound else Unanswered()
                self.tokens[place] = len(rows[place]) + len(ids)
        return texts

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> list[list[Row]]:
        """One row for each pair; of a text without a context that the model cannot read at once, several, each of which scores a part."""
        kept = [context.rstrip() for context, _ in pairs]
        whole = [context + continuation for context, continuation in pairs]
        texts = list(dict.fromkeys(kept + whole))
        encoded = dict(zip(texts, self._encode(texts), strict=True))
        rows = []
        for context, text in zip(kept, whole, strict=True):
            ids = encoded[text]
            start = common_length(ids, encoded[context]) if context else 0
            if start == 0:
                ids = ids if ids[:1] == [self._first] else [self._first, *ids]
                start = 1
            over = max(len(ids) - self._limit - 1, 0)  # the last id is only predicted
            if over and not context:
                rows.append(list(self._windows(ids)))
                continue
            self.truncated += over > 0
            rows.append([Row(ids[over:], max(start - over, 1))])
        return rows

    def _windows(self, ids: list[int]) -> Iterator[Row]:
        """Parts of a text after its first id. From the second on each has half of the model's positions before it."""
        start, stop = 1, self._limit + 1
        while start < len(ids):
            begin = max(stop - self._limit - 1, 0)
            yield Row(ids[begin:stop], start - begin)
            start, stop = stop, min(stop + max(self._limit // 2, 1), len(ids))

    def _begins(self, text: str) -> bool:
        return bool(self._first_text) and text.startswith(self._first_text)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with the tokenizer's own special tokens, but no text is closed, and none is begun that begins itself."""
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
