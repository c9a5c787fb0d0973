"""Which pages of mapped files this process keeps: a streaming process must not seem to own all of its inputs.

Mapped pages count as private memory while one process maps them, and mapping them again costs about as much as reading them. So those
that were read last are kept up to a limit, which is small unless a merge has memory to spare.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count, islice

#: bytes of each model's files that may stay mapped
MAPPED_BYTES = 2**23
#: what reading a few bytes may map: the kernel maps the whole block of the page cache that they stand in
BLOCK = 2**21
#: so many blocks are let go at a time at the least
_STEP = 4

#: numbers for models, never used twice
owners = count()
_lock = threading.Lock()
_kept: dict[tuple[int, int], memoryview] = {}  # (owner, address of a block) -> its mapping; what was read last is at the end
_owned: Counter[int] = Counter()  # blocks per owner
_gone: list[int] = []  # owners that are no more
_more = 0


@contextmanager
def keeping(more: int) -> Iterator[None]:
    """Within this block the process keeps `more` bytes mapped beyond MAPPED_BYTES for each model: enough for the tensors that a survey
    has read and the merge reads again.
    """
    global _more
    before, _more = _more, more
    try:
        yield
    finally:
        _more = before


def touch(owner: int, mapping: memoryview, offset: int, size: int) -> None:
    """Bytes `offset` to `offset + size` of a mapping are about to be read. Lets go of what was read longest ago if there is too much.

    Views stay valid: a page that is touched again comes back from the page cache.
    """
    begin = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    with _lock:
        if _gone:
            _forget()
        for block in range(offset // BLOCK, (offset + size - 1) // BLOCK + 1):
            key = (owner, begin + block * BLOCK)
            if _kept.pop(key, None) is None:
                _owned[owner] += 1
            _kept[key] = mapping
        over = len(_kept) - (len(_owned) * MAPPED_BYTES + _more) // BLOCK
        if over > 0:  # what is about to be read stays in the list, however much it is: letting go of it now would be too early
            before = len(_kept) - ((offset + size - 1) // BLOCK + 1 - offset // BLOCK)
            _let_go(list(islice(_kept, min(max(over, _STEP), before))))


def gone(owner: int) -> None:
    """The owner is no more, and its mappings with it. May be called from a finaliser."""
    _gone.append(owner)


def _forget() -> None:
    dead = set()
    while _gone:  # a finaliser may add to it at any moment
        dead.add(_gone.pop())
    for key in [key for key in _kept if key[0] in dead]:
        _drop(key)


def _unlocked() -> None:
    """In a forked process nobody is left who would release the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlocked)


def _let_go(keys: list[tuple[int, int]]) -> None:
    for key in sorted(keys):
        mapping = _drop(key)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        size = min(BLOCK, begin + len(mapping) - key[1])
        if hasattr(mmap, "MADV_DONTNEED"):
            _libc().madvise(ctypes.c_void_p(key[1]), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _drop(key: tuple[int, int]) -> memoryview:
    _owned[key[0]] -= 1
    if not _owned[key[0]]:
        del _owned[key[0]]
    return _kept.pop(key)


@cache
def _libc() -> ctypes.CDLL:
    """The C library, for the advice that torch's mappings cannot give."""
    return ctypes.CDLL(None)
