"""Inner products of chunks: quick ones and exact ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.methods._sums import block_grams, pairs, total
from modelglue.settings import BLOCK_ELEMENTS


def inner(models: list[torch.Tensor], base: torch.Tensor | None) -> list[float]:
    """The same in float64, whole tensors at once."""
    vectors = [model.double() - (0.0 if base is None else base.double()) for model in models]
    return [float(vectors[i].dot(vectors[j])) for i, j in pairs(len(vectors))]


def lengths(models: list[torch.Tensor], base: torch.Tensor | None) -> list[float]:
    vectors = [model.double() - (0.0 if base is None else base.double()) for model in models]
    return [float(vectors[i].norm() * vectors[j].norm()) for i, j in pairs(len(vectors))]


@given(
    length=st.sampled_from([1, 4095, 4096, 5000, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 4097]),
    scale=st.sampled_from([1e-30, 1e-18, 1e-6, 1.0, 1e16, 1e25]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    with_base=st.booleans(),
    quick=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_grams_are_those_of_float64(length: int, scale: float, dtype: torch.dtype, with_base: bool, quick: bool) -> None:
    scale = 1.0 if dtype == torch.float16 else scale
    generator = torch.Generator().manual_seed(length)
    tensors = [(torch.randn(length, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(4)]
    models, base = tensors[:3], tensors[3] if with_base else None
    found = [total([blocks]) for blocks in block_grams(models, base, quick=quick)]
    bound = 1e-6 if quick and dtype != torch.float64 else 1e-12
    for value, expected, length_ in zip(found, inner(models, base), lengths(models, base), strict=True):
        assert abs(value - expected) <= bound * length_


def test_quick_grams_of_equal_and_of_opposite_vectors() -> None:
    vector = torch.randn(BLOCK_ELEMENTS + 7, generator=torch.Generator().manual_seed(0))
    same, opposite, _ = (total([blocks]) for blocks in block_grams([vector, -vector], None, quick=True))
    assert opposite == -same
    assert block_grams([vector, vector], vector, quick=True) == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, BLOCK_ELEMENTS + 4500])
def test_what_is_no_number_shows(bad: float, at: int) -> None:
    good = torch.ones(BLOCK_ELEMENTS + 5000, dtype=torch.bfloat16)
    spoilt = good.clone()
    spoilt[at] = bad
    block = at // BLOCK_ELEMENTS
    for models, base, row in (([good, spoilt], None, 2), ([spoilt, good], None, 0), ([good, good], spoilt, 0), ([spoilt, good], spoilt, 0)):
        diagonal = torch.tensor(block_grams(models, base, quick=True)[row])
        assert not torch.isfinite(diagonal[block])
        assert torch.isfinite(diagonal[1 - block])
