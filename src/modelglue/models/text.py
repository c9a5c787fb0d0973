"""Text in, text or log probabilities out: what evaluation and mixtures know of a model.

The runner batches rows of similar length, pads on the left, and counts positions from the mask, so a row's answer does not
depend (beyond rounding) on what it is batched with. Decoding is greedy with the model's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: positions (rows x longest row) that one forward pass may hold
BATCH_POSITIONS = 8192
MAX_ROWS = 128


class TextModel(Protocol):
    """Anything that scores and continues text: a model, or a mixture of models."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(natural log probability, is it the greedy continuation) of each continuation given its context."""
        ...

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, cut before the first stop string."""
        ...


class LiveTextModel:
    """A transformers causal model with its tokenizer, on the CPU or wherever the model is.

    Log probabilities are NaN where the model's are; whoever scores decides what that means. Contexts longer than the model's limit
    keep their end; `truncated` counts them.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.truncated = 0
        config = model.config.get_text_config()
        self._limit = int(getattr(config, "max_position_embeddings", None) or 2**30)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ends = [tokenizer.eos_token_id, config.eos_token_id]
        if getattr(model, "generation_config", None) is not None:
            ends.append(model.generation_config.eos_token_id)
        flat = [end for entry in ends for end in (entry if isinstance(entry, list) else [entry]) if end is not None]
        self._ends = sorted(set(flat))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """One forward pass over every distinct row. The suffix after the longest common prefix of the ids of `context` and of
        `context + continuation` is scored, so a token that spans the border counts to the continuation."""
        import torch

        rows, starts = [], []
        for context, continuation in pairs:
            ids, start = self._split(context, continuation)
            if len(ids) > self._limit + 1:
                self.truncated += 1
                start = max(start - (len(ids) - self._limit - 1), 1)
                ids = ids[-(self._limit + 1) :]
            rows.append(ids)
            starts.append(start)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for places in batches([len(ids) for ids in rows]):
            inputs = [rows[place][:-1] for place in places]
            with torch.inference_mode():
                logits = self._forward(inputs)  # [B, T, V], left-padded
                width = logits.shape[1]
                for row, place in enumerate(places):
                    targets = torch.tensor(rows[place][starts[place] :], device=logits.device)
                    first = width - (len(rows[place]) - starts[place])
                    scored = logits[row, first:].float().log_softmax(dim=-1)  # [targets, V]
                    total = scored.gather(1, targets[:, None]).sum(dtype=torch.float64)
                    results[place] = (float(total), bool((scored.argmax(dim=-1) == targets).all()))
        return results

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy, with the model's cache; a row stops at an end-of-text id or when its decoded text holds a stop string."""
        import torch

        limit = max(self._limit - max_new_tokens, 1)
        rows = []
        for prompt in prompts:
            ids = self._encode(prompt) or [self._first()]
            self.truncated += len(ids) > limit
            rows.append(ids[-limit:])
        texts = [""] * len(rows)
        for places in batches([len(ids) + max_new_tokens for ids in rows]):
            with torch.inference_mode():
                found = self._continue([rows[place] for place in places], until, max_new_tokens)
            for place, text in zip(places, found, strict=True):
                texts[place] = text
        return texts

    def _continue(self, rows: Sequence[list[int]], until: Sequence[str], steps: int) -> list[str]:
        import torch

        ids, mask = self._padded(rows)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache, fresh = None, ids
        written: list[list[int]] = [[] for _ in rows]
        running = list(range(len(rows)))
        for _ in range(steps):
            output = self.model(
                input_ids=fresh, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            chosen = output.logits[:, -1].float().argmax(dim=-1)  # NaN wins every argmax: such rows end in nonsense, visibly
            still = []
            for row in running:
                token = int(chosen[row])
                if token in self._ends:
                    continue
                written[row].append(token)
                text = self.tokenizer.decode(written[row], skip_special_tokens=True)
                if not any(stop in text for stop in until):
                    still.append(row)
            running = still
            if not running:
                break
            fresh = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return [_cut(self.tokenizer.decode(row, skip_special_tokens=True), until) for row in written]

    def _forward(self, rows: Sequence[list[int]]) -> torch.Tensor:
        ids, mask = self._padded(rows)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return logits

    def _padded(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        width = max(len(row) for row in rows)
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        return ids, mask

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if len(ids) > 1 and ids[-1] in self._ends and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers close every text; a context is not closed
        return ids

    def _first(self) -> int:
        """What an empty context is: the beginning-of-sequence id, else the end-of-text id (the harness's convention)."""
        for candidate in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return int(self._pad)

    def _split(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(ids of both, where the continuation starts). Blanks at the context's end move to the continuation, as in the harness."""
        kept = context.rstrip()
        if kept:
            continuation = context[len(kept) :] + continuation
            both, alone = self._encode(kept + continuation), self._encode(kept)
            start = next((i for i, (a, b) in enumerate(zip(both, alone, strict=False)) if a != b), min(len(both), len(alone)))
        else:
            both, start = self._encode(context + continuation), 0
        if start == 0:
            if not both or both[0] != self._first():
                both = [self._first(), *both]
            start = 1
        return both, start


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of rows, long ones first, in batches of similar length; a function of the lengths alone."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    found: list[list[int]] = []
    for place in order:
        longest = lengths[found[-1][0]] if found else 0
        if not found or len(found[-1]) >= MAX_ROWS or (len(found[-1]) + 1) * longest > BATCH_POSITIONS:
            found.append([])
        found[-1].append(place)
    return found


def _cut(text: str, until: Sequence[str]) -> str:
    places = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else text
