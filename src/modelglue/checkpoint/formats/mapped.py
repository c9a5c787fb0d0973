"""Weight files mapped into memory: reading returns views, copies nothing, and keeps no pages that were read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.formats import pages
from modelglue.checkpoint.protocol import ITEM_SIZE
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class MappedFiles:
    """The files of one model, each mapped when it is first read. Picklable: another process maps them itself.

    No file stays open: a mapping outlives the descriptor that it was made through, and models may have more shards than a process may
    have open files. (`mmap.mmap` keeps a descriptor for each of its mappings; torch's own mapping does not.)
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self.paths = tuple(paths)
        self._sizes = tuple(sizes)  # what the headers have promised, checked again when a file is mapped
        self._maps: dict[int, memoryview] = {}
        self._owner = next(pages.owners)
        weakref.finalize(self, pages.gone, self._owner).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"], state["_sizes"])  # type: ignore[misc]

    def view(self, number: int, offset: int, count: int, dtype: str) -> torch.Tensor:
        """`count` elements from byte `offset` of file `number`: a view, or a copy of just these where the file has them unaligned.

        Views stay valid, though pages are let go now and then, so that a streaming process does not seem to own all of its inputs: a
        page that is touched again comes back from the page cache.
        """
        import torch

        kind, item = torch_dtype(dtype), ITEM_SIZE[dtype]
        if count <= 0:
            return torch.empty(0, dtype=kind)
        if sum(self._sizes) > pages.BLOCK:  # else all there is, is no more than one read may map
            pages.touch(self._owner, self._map(number), offset, count * item)
        if offset % item:  # legal in foreign files; a view needs aligned elements
            return torch.frombuffer(bytearray(self._map(number)[offset : offset + count * item]), dtype=kind)
        return torch.frombuffer(self._map(number), dtype=kind, count=count, offset=offset)

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


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: has become shorter since it was opened. Leave it alone until the run is over.")
