"""Route a text by how well every expert predicts it: no router, no training, a pass of every expert (MergeME, arXiv 2502.00997)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from modelglue.errors import UserError
from modelglue.models import TextModel

Sharpness = Literal["inverse_ppl", "neg_log_ppl"]


def bits_per_character(model: TextModel, texts: Sequence[str]) -> list[float]:
    """What a text costs the model, over its characters, so that models with different tokenizers can be compared; NaN for no text."""
    found = model.loglikelihood([("", text) for text in texts])
    return [-value / math.log(2) / len(text) if text else math.nan for (value, _), text in zip(found, texts, strict=True)]


def perplexity_weights(bits: Sequence[float], *, top_k: int = 1, sharpness: Sharpness = "neg_log_ppl") -> tuple[float, ...]:
    """One weight per expert: softmax over the `top_k` best of the negative bits, in nats, or of the inverse perplexities 2^-bits (the
    paper's, which are nearly flat); the others 0, of equal ones the first.

    An expert whose bits are no number gets 0; if none has any, all get the same. UserError for a top_k that is not 1 to their number.
    """
    if not 1 <= top_k <= len(bits):
        raise UserError(f"top_k is {top_k}; allowed is 1 to {len(bits)}, the number of experts.")
    values = [(-value * math.log(2) if sharpness == "neg_log_ppl" else 2**-value) if math.isfinite(value) else -math.inf for value in bits]
    if max(values) == -math.inf:
        return (1 / len(bits),) * len(bits)
    best = sorted(range(len(bits)), key=lambda number: (-values[number], number))[:top_k]
    powers = {number: math.exp(values[number] - max(values)) for number in best}
    total = math.fsum(powers.values())
    return tuple(powers.get(number, 0.0) / total for number in range(len(bits)))
