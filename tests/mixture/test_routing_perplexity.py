"""Routing by how well experts predict the prompt."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.mixture.routing import bits_per_character, perplexity_weights
from tests.mixture.making import alone, two_experts


def test_weights_by_hand() -> None:
    """Perplexities 4 and 8: softmax of 1/4 and 1/8 is nearly flat, that of -log 4 and -log 8 is 2 to 1."""
    assert perplexity_weights([2.0, 3.0], top_k=2) == pytest.approx((2 / 3, 1 / 3))
    flat = math.exp(1 / 4) / (math.exp(1 / 4) + math.exp(1 / 8))
    assert perplexity_weights([2.0, 3.0], top_k=2, sharpness="inverse_ppl") == pytest.approx((flat, 1 - flat))
    assert perplexity_weights([3.0, 2.0, 2.0]) == (0.0, 1.0, 0.0)
    assert perplexity_weights([math.nan, 2.0, math.inf], top_k=3) == (0.0, 1.0, 0.0)
    assert perplexity_weights([math.nan, math.nan]) == (0.5, 0.5)
    with pytest.raises(UserError, match="top_k is 3; allowed is 1 to 2"):
        perplexity_weights([1.0, 2.0], top_k=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 20), min_size=2, max_size=6, unique=True), st.data())
def test_weights_follow_their_experts(bits: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, len(bits)))
    order = data.draw(st.permutations(range(len(bits))))
    weights = perplexity_weights(bits, top_k=top_k)
    assert math.fsum(weights) == pytest.approx(1)
    assert sum(weight > 0 for weight in weights) <= top_k
    assert max(weights) == weights[bits.index(min(bits))]
    assert perplexity_weights([bits[place] for place in order], top_k=top_k) == pytest.approx([weights[place] for place in order])


def test_bits_of_a_text_are_its_log_likelihood_over_its_characters(tmp_path: Path) -> None:
    two_experts(tmp_path)
    model = alone(tmp_path, "llama")
    first, second, empty = bits_per_character(model, ["abc", "no 12", ""])
    ((value, _),) = model.loglikelihood([("", "no 12")])
    assert second == pytest.approx(-value / math.log(2) / 5)
    assert first > 0
    assert math.isnan(empty)
