"""The counter hash: frozen numbers, uniform, and a function of (seed, name, stream, position) only."""

from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint.engine import uniform
from modelglue.checkpoint.engine.device import SIMULATED, Lane
from modelglue.checkpoint.engine.uniform import CounterHash, uniforms

_SPAN = 2**31
starts = st.integers(0, 2**33)


def test_numbers_are_frozen() -> None:
    """A merge of today gives its bytes again in every later version."""
    found = (uniforms(7, "layers.0.weight", 2, 1_000_000, 1_000_004).double() * 2**24).tolist()
    assert found == [4989790, 13451973, 1822528, 9889835]


def by_hand(seed: int, name: str, stream: int, position: int) -> int:
    """The same number times 2^24, in the unsigned arithmetic that torch does not have."""
    window, place = divmod(position, _SPAN)
    before, between = struct.unpack("<II", hashlib.sha256(f"{seed}\0{name}\0{stream}\0{window}".encode()).digest()[:8])
    x = (place * 0x9E3779B1 + before) % 2**32
    x ^= x >> 16
    x = (x * 0x7FEB352D + between) % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    x ^= x >> 16
    return x >> 8


@given(st.integers(0, 2**63), st.text(max_size=5), st.integers(0, 9), starts)
@settings(max_examples=40, deadline=None)
def test_numbers_are_those_of_unsigned_arithmetic(seed: int, name: str, stream: int, start: int) -> None:
    found = (uniforms(seed, name, stream, start, start + 20).double() * 2**24).tolist()
    assert found == [by_hand(seed, name, stream, position) for position in range(start, start + 20)]


@given(st.integers(0, 2**63), st.text(max_size=5), st.integers(0, 9), starts, st.lists(st.integers(0, 500), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_any_range_holds_the_same_numbers(seed: int, name: str, stream: int, start: int, cuts: list[int]) -> None:
    whole = uniforms(seed, name, stream, start, start + 500)
    assert whole.dtype == torch.float32
    assert bool(((whole >= 0) & (whole < 1)).all())
    assert torch.equal(whole * 2**24, (whole * 2**24).round())
    for cut in cuts:
        assert torch.equal(uniforms(seed, name, stream, start, start + cut), whole[:cut])
        assert torch.equal(CounterHash(seed).numbers(name, stream, start + cut, start + 500), whole[cut:])


@given(st.integers(0, 70), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_what_runs_where_nothing_is_compiled_gives_the_bits_of_what_is_compiled(length: int, before: int, between: int) -> None:
    """In buffers shorter than the chunk, the last of them not full."""
    multiples = uniform._multiples(length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "_BUFFER", 16)
        assert torch.equal(uniform._mix_plainly(multiples, before, between), uniform._mix(multiples, before, between))


def test_numbers_are_made_where_they_are_used_and_are_the_same() -> None:
    """On a device by torch, whatever was made for another place before; chunks there are longer than what is kept."""
    expected = uniforms(5, "w", 1, 10, 2**19)
    lane = Lane(SIMULATED)
    lane.device = torch.device("meta")
    with lane.active():
        assert {uniforms(5, "w", 1, 10, stop).device.type for stop in (20, 2**19)} == {"meta"}
    assert torch.equal(uniforms(5, "w", 1, 10, 2**19), expected)
    assert torch.equal(uniforms(5, "w", 1, 10, 20), expected[:10])


@pytest.mark.parametrize("edge", [_SPAN, 2 * _SPAN])
def test_ranges_across_the_span_of_a_key_are_whole(edge: int) -> None:
    """A key covers 2^31 positions; tensors may be longer."""
    across = uniforms(1, "w", 0, edge - 3, edge + 3)
    assert torch.equal(across, torch.cat([uniforms(1, "w", 0, edge - 3, edge), uniforms(1, "w", 0, edge, edge + 3)]))
    assert not torch.equal(uniforms(1, "w", 0, edge, edge + 100), uniforms(1, "w", 0, edge - _SPAN, edge - _SPAN + 100))


def test_every_part_of_the_key_changes_the_numbers() -> None:
    found = [uniforms(*key, 0, 200) for key in [(1, "w", 0), (2, "w", 0), (1, "v", 0), (1, "w", 1), (1, "w\0", 0)]]
    for number, one in enumerate(found):
        for other in found[:number]:
            agreement = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
            assert abs(agreement) < 5 / math.sqrt(200)


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    values = uniforms(3, "w", 0, 0, 200_000).double()
    deviations = math.sqrt(200_000 / 12)
    assert abs(float(values.sum()) - 100_000) < 4 * deviations
    counts = torch.histc(values, bins=64, min=0, max=1)
    expected = 200_000 / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    for distance in (1, 2, 64, 4096):
        pair = torch.stack([values[:-distance], values[distance:]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(200_000)
