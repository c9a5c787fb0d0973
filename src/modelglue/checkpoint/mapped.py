"""Weight files mapped into memory: reading returns views, copies nothing, and keeps no pages that were read."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
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
    """The files of one model, each mapped when it is first read. Picklable: another process maps them itself."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self.paths = tuple(paths)
        self._sizes = tuple(sizes)  # what the headers have promised, checked again when a file is mapped
        self._maps: dict[int, mmap.mmap] = {}
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
        self._touched.add(number)
        self._read += max(size, _MAPPED_AT_ONCE)
        if self._read > MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            for touched in self._touched:
                self._map(touched).madvise(mmap.MADV_DONTNEED)
            self._touched, self._read = set(), 0

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            path = self.paths[number]
            try:
                with path.open("rb") as stream:
                    # A private mapping: torch wants a writable buffer, and a stray write could never reach the file.
                    mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}), though it was there before.") from error
            except ValueError as error:  # an empty file cannot be mapped
                raise _shorter(path) from error
            if len(mapping) < self._sizes[number]:
                raise _shorter(path)
            self._maps[number] = mapping
        return self._maps[number]


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: has become shorter since it was opened. Leave it alone until the run is over.")
