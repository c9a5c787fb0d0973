"""Weight files mapped into memory: reading returns views, copies nothing, and keeps no pages that were read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.protocol import ITEM_SIZE
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: bytes that may be read from a model's files before their pages are let go; they count as private memory while one process maps them
MAPPED_BYTES = 2**23
#: what reading a few bytes may map: the kernel maps the whole block of the page cache that they stand in
_MAPPED_AT_ONCE = 2**21


class MappedFiles:
    """The files of one model, each mapped when it is first read. Picklable: another process maps them itself.

    No file stays open: a mapping outlives the descriptor that it was made through, and models may have more shards than a process may
    have open files. (`mmap.mmap` keeps a descriptor for each of its mappings; torch's own mapping does not.)
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self.paths = tuple(paths)
        self._sizes = tuple(sizes)  # what the headers have promised, checked again when a file is mapped
        self._maps: dict[int, memoryview] = {}
        self._touched: set[int] = set()  # files read since pages were last let go
        self._read = 0  # bytes of them

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_touched": set(), "_read": 0}

    def view(self, number: int, offset: int, count: int, dtype: str) -> torch.Tensor:
        """`count` elements from byte `offset` of file `number`: a view, or a copy of just these where the file has them unaligned."""
        import torch

        kind, item = torch_dtype(dtype), ITEM_SIZE[dtype]
        if count <= 0:
            return torch.empty(0, dtype=kind)
        if offset % item:  # legal in foreign files; a view needs aligned elements
            return torch.frombuffer(bytearray(self._map(number)[offset : offset + count * item]), dtype=kind)
        return torch.frombuffer(self._map(number), dtype=kind, count=count, offset=offset)

    def let_go(self, number: int, size: int) -> None:
        """`size` bytes were read: let go of pages now and then, so that a streaming process does not seem to own all of its inputs.

        Views stay valid: a page that is touched again comes back from the page cache.
        """
        if sum(self._sizes) <= _MAPPED_AT_ONCE:
            return  # all there is, is no more than one read may map
        self._touched.add(number)
        self._read += max(size, _MAPPED_AT_ONCE)
        if self._read > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            for touched in self._touched:
                mapping = self._map(touched)
                begin = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(len(mapping)), mmap.MADV_DONTNEED)
            self._touched, self._read = set(), 0

    def _map(self, number: int) -> memoryview:
        import torch

        if number not in self._maps:
            path = self.paths[number]
            try:
                with path.open("rb"):  # says why, where it cannot be read
                    size = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}), though it was there before.") from error
            if size < max(self._sizes[number], 1):  # an empty file cannot be mapped
                raise _shorter(path)
            try:
                # A private mapping: torch wants a writable buffer, and a stray write could never reach the file.
                self._maps[number] = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().data
            except (RuntimeError, UnicodeEncodeError) as error:
                raise CheckpointError(f"{path}: cannot be mapped into memory ({error}).") from error
        return self._maps[number]


@cache
def _libc() -> ctypes.CDLL:
    """The C library, for the advice that torch's mappings cannot give."""
    return ctypes.CDLL(None)


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: has become shorter since it was opened. Leave it alone until the run is over.")
