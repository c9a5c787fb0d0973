"""Pages of mapped files: those that were read last stay, the others go."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import SafetensorsCheckpoint
from modelglue.checkpoint.formats import pages
from modelglue.checkpoint.formats.pages import BLOCK, MAPPED_BYTES, keeping, touch
from tests.checkpoint.files import write_single
from tests.checkpoint.killing import forked, run_in_child

LIMIT = MAPPED_BYTES // BLOCK


class Kernel:
    """Notes which blocks of a mapping are let go."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.went: list[int] = []

    def madvise(self, address: Any, size: Any, advice: int) -> None:
        assert address.value % BLOCK == self.begin % BLOCK
        self.went.append((address.value - self.begin) // BLOCK)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, memoryview]:
    """A mapping of 40 blocks of which nothing was read."""
    if not hasattr(pages.mmap, "MADV_DONTNEED"):
        pytest.skip("this system cannot let go of pages")
    room = torch.empty(40 * BLOCK, dtype=torch.uint8)  # its pages are never touched
    for name, empty in (("_kept", {}), ("_owned", Counter()), ("_gone", [])):
        monkeypatch.setattr(pages, name, empty)
    kernel = Kernel(room.data_ptr())
    monkeypatch.setattr(pages, "_libc", lambda: kernel)
    return kernel, room.numpy().data


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=st.lists(st.tuples(st.integers(0, 38 * BLOCK), st.integers(1, 2 * BLOCK)), max_size=40), more=st.integers(0, 8))
def test_what_was_read_last_is_kept(kernel: tuple[Kernel, memoryview], reads: list[tuple[int, int]], more: int) -> None:
    system, mapping = kernel
    pages._kept.clear()
    pages._owned.clear()
    order: list[int] = []
    with keeping(more * BLOCK):
        for offset, size in reads:
            system.went = []
            touch(7, mapping, offset, size)
            read = range(offset // BLOCK, (offset + size - 1) // BLOCK + 1)
            order = [block for block in order if block not in read] + list(read)
            gone, order = order[: len(system.went)], order[len(system.went) :]
            assert sorted(gone) == system.went
            assert len(order) <= LIMIT + more
            assert bool(gone) == (len(gone) + len(order) > LIMIT + more)


def test_a_read_beyond_the_limit_goes_with_the_next(kernel: tuple[Kernel, memoryview]) -> None:
    system, mapping = kernel
    touch(1, mapping, 0, 30 * BLOCK)
    assert system.went == [], "nothing of it is there yet"
    touch(1, mapping, 35 * BLOCK, BLOCK)
    assert system.went == list(range(31 - LIMIT))
    touch(1, mapping, 36 * BLOCK, BLOCK)
    assert system.went == [*range(30), 35]


def test_every_model_has_its_share_while_it_lives(kernel: tuple[Kernel, memoryview]) -> None:
    system, mapping = kernel
    for block in range(LIMIT):
        touch(1, mapping, block * BLOCK, BLOCK)
        touch(2, mapping, (20 + block) * BLOCK, BLOCK)
    assert system.went == []
    pages.gone(1)
    touch(2, mapping, 30 * BLOCK, 1)
    assert system.went == [20, 21, 22, 23], "and the pages of the first are no business of ours any more"


def test_a_model_that_is_closed_is_forgotten(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, {"w": torch.zeros(2_000_000)}))
    checkpoint.read("w", 0, 10)
    owner = checkpoint._files._owner
    assert any(key[0] == owner for key in pages._kept)
    del checkpoint
    gc.collect()
    other = SafetensorsCheckpoint(tmp_path)
    other.read("w", 0, 10)
    assert not any(key[0] == owner for key in pages._kept)


@forked
def test_a_process_forked_while_another_thread_holds_the_lock_can_read(kernel: tuple[Kernel, memoryview]) -> None:
    _, mapping = kernel

    def read() -> None:
        signal.alarm(10)  # it would wait for ever
        touch(1, mapping, 0, 1)
        os._exit(0)

    with pages._lock:
        assert run_in_child(read) == 0
