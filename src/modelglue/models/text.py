"""Text in, text or log probabilities out: what evaluation and mixtures know of a model.

`encoding` makes ids of texts, `likelihood` and `greedy` do the rest. A row's
answer does not depend (beyond rounding) on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from modelglue.errors import CheckpointError
from modelglue.models.cached import CachedModel
from modelglue.models.encoding import TextEncoder
from modelglue.models.forward import inference
from modelglue.models.greedy import Stops, continue_rows
from modelglue.models.likelihood import score_rows


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
        self.tokens: list[int] = []
        if model.config.is_encoder_decoder or not model.can_generate():
            raise CheckpointError(
                f"{type(model).__name__}: does not continue texts token by token, so it can be neither scored nor asked. "
                "Give a decoder with a language-model head."
            )
        config = model.config.get_text_config()
        limit = int(getattr(config, "max_position_embeddings", None) or 2**30)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None and pad < self._vocabulary else 0
        self._reader = CachedModel(model, self.pad)
        ends = [tokenizer.eos_token_id, config.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
        self._ends = {end for entry in ends for end in (entry if isinstance(entry, list) else [entry]) if end is not None}
        self._specials = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.encoder = TextEncoder(tokenizer, limit, self._vocabulary)

    @property
    def truncated(self) -> int:
        """Contexts that were cut so far."""
        return self.encoder.truncated

    def ends(self, until: Sequence[str]) -> set[int]:
        """The ids that end a text, with those of the stop strings that decoded text does not show."""
        return self._ends | {self._specials[stop] for stop in until if stop in self._specials}

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """What all contexts begin with is read once, then every distinct context once, then every continuation once.

        The suffix after the longest common prefix of the ids of `context` and of `context + continuation` is scored, so a token that spans
        the border counts to the continuation. Blanks at a context's end move to the continuation.
        """
        with inference(self.model):
            windows = self.encoder.rows(pairs)
            rows = [row for part in windows for row in part]
            self.tokens = [len(part[0].ids) if len(part) == 1 else sum(len(row.ids) for row in part) for part in windows]
            found = iter(score_rows(self._reader, rows, self._vocabulary))
            scored = [[next(found) for _ in part] for part in windows]
        return [part[0] if len(part) == 1 else (sum(value for value, _ in part), all(greedy for _, greedy in part)) for part in scored]

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy, with the model's cache; a row stops at an end-of-text id or when its decoded text holds a stop string.

        A context is cut (its end stays) to make room for `max_new_tokens`, but keeps half of the model's positions: where more are
        asked for than fit behind it, fewer are written.
        """
        texts = [""] * len(prompts)
        self.tokens = [0] * len(prompts)
        rows, steps = self.encoder.prompts(prompts, max_new_tokens)
        stops = Stops(self.tokenizer, until)
        with inference(self.model):
            for place, ids, sound in continue_rows(self._reader, rows, steps, self.ends(until), stops):
                texts[place] = stops.text(ids) if sound else Unanswered()
                self.tokens[place] = len(rows[place]) + len(ids)
        return texts
