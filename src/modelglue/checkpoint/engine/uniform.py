"""Uniform numbers that depend on nothing but (seed, output tensor name, stream, flat position).

A counter hash in 32-bit integer arithmetic: the key is mixed in before and between two rounds of a multiply-xorshift mixer. Equal on
every device, and independent of chunks, threads and order, because no state is carried from one position to the next.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from modelglue.checkpoint.engine.compiled import ChunkFunction
from modelglue.checkpoint.engine.device import current
from modelglue.settings import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch

# Odd multipliers of a well-known low-bias 32-bit mixer, written as signed numbers: torch has no full unsigned arithmetic.
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - 2**32
_GOLDEN = 0x9E3779B1 - 2**32
_SPAN = 2**31
#: elements at a time where nothing is compiled
_BUFFER = 2**16


class UniformSource(Protocol):
    """Where a random method's uniform numbers come from: float32 in [0, 1), shape [stop - start], a function of the arguments only."""

    def numbers(self, name: str, stream: int, start: int, stop: int) -> torch.Tensor: ...
    def describe(self) -> Any: ...


@dataclass(frozen=True)
class CounterHash:
    """The source of every merge: `uniforms` of one seed."""

    seed: int

    def numbers(self, name: str, stream: int, start: int, stop: int) -> torch.Tensor:
        return uniforms(self.seed, name, stream, start, stop)

    def describe(self) -> Any:
        return self.seed


def uniforms(seed: int, name: str, stream: int, start: int, stop: int) -> torch.Tensor:
    """Numbers in [0, 1), multiples of 2^-24, for the flat positions start..stop: float32 of shape [stop - start].

    Time: about 13 integer operations a number. Memory: three buffers of that length.
    """
    import torch

    if stop > start and start // _SPAN != (stop - 1) // _SPAN:  # a key covers 2^31 positions
        middle = (start // _SPAN + 1) * _SPAN
        return torch.cat([uniforms(seed, name, stream, start, middle), uniforms(seed, name, stream, middle, stop)])
    window = start // _SPAN
    digest = hashlib.sha256(f"{seed}\0{name}\0{stream}\0{window}".encode()).digest()
    before = int.from_bytes(digest[:4], "little", signed=True)
    between = int.from_bytes(digest[4:8], "little", signed=True)
    return _mixed(_multiples(stop - start), _wrapped(before + (start - window * _SPAN) * _GOLDEN), between)


def _multiples(length: int) -> torch.Tensor:
    """The first multiples of the golden constant in 32 bits; what a chunk needs is kept, because every chunk needs the same."""
    lane = current()
    place = "cpu" if lane is None else str(lane.device)
    return _made(CHUNK_ELEMENTS, place)[:length] if length <= CHUNK_ELEMENTS else _made.__wrapped__(length, place)


@functools.cache
def _made(length: int, place: str) -> torch.Tensor:
    import torch

    return torch.arange(length, dtype=torch.int32, device=place).mul_(_GOLDEN)


def _wrapped(value: int) -> int:
    """The signed 32-bit integer that integer arithmetic would have left."""
    return (value + 2**31) % 2**32 - 2**31


def _mix(multiples: torch.Tensor, before: int, between: int) -> torch.Tensor:
    """int32 multiples [length] of the golden constant to float32 numbers; the key and the first position are in signed 32-bit integers."""
    import torch

    x = multiples + before
    _xorshift(x, 16)
    _xorshift(x.mul_(_FIRST).add_(between), 15)
    _xorshift(x.mul_(_SECOND), 16)
    return _shifted(x, 8).to(torch.float32).mul_(2.0**-24)


def _mix_plainly(multiples: torch.Tensor, before: int, between: int) -> torch.Tensor:
    """The same bits. numpy shifts unsigned numbers, which saves a mask after every shift, in buffers that stay in the cache."""
    import numpy as np
    import torch

    if multiples.device.type != "cpu":
        return _mix(multiples, before, between)
    given = multiples.numpy().view(np.uint32)
    found = np.empty(len(given), np.float32)
    first, second, key, step = (np.uint32(value % 2**32) for value in (_FIRST, _SECOND, between, before))
    buffer, other = np.empty((2, min(_BUFFER, len(given))), np.uint32)
    for start in range(0, len(given), _BUFFER):
        part = given[start : start + _BUFFER]
        x, shifted = buffer[: len(part)], other[: len(part)]
        np.add(part, step, out=x)
        np.bitwise_xor(x, np.right_shift(x, 16, out=shifted), out=x)
        np.add(np.multiply(x, first, out=x), key, out=x)
        np.bitwise_xor(x, np.right_shift(x, 15, out=shifted), out=x)
        np.multiply(x, second, out=x)
        np.bitwise_xor(x, np.right_shift(x, 16, out=shifted), out=x)
        numbers = np.right_shift(x, 8, out=x).view(np.int32)
        np.multiply(numbers, np.float32(2.0**-24), out=found[start : start + _BUFFER], dtype=np.float32, casting="unsafe")
    return torch.from_numpy(found)


_mixed = ChunkFunction(_mix, plain=_mix_plainly)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits as if x were unsigned: int32 shifts drag the sign along."""
    import torch

    return torch.bitwise_right_shift(x, bits).bitwise_and_((1 << (32 - bits)) - 1)


def _xorshift(x: torch.Tensor, bits: int) -> None:
    """x ^= x >> bits as if x were unsigned, in place."""
    x.bitwise_xor_(_shifted(x, bits))
