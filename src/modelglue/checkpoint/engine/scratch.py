"""Scratch space for what would be computed several times: one tensor of a nested merge, in an unlinked file."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import RunError
from modelglue.settings import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch


class ScratchTensor(Checkpoint):
    """One tensor in an unlinked file: gone with the process, whatever happens to it."""

    def __init__(self, name: str, info: TensorInfo, values: torch.Tensor) -> None:
        self._name, self._info, self._values = name, info, values

    def names(self) -> Sequence[str]:
        return (self._name,)

    def info(self, name: str) -> TensorInfo:
        return self._info

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        view = self._values[start:stop]
        return view if out is None else out.copy_(view)

    config: Mapping[str, Any] = {}
    files: Mapping[str, SideFile] = {}
    identity = stamp = ""

    def describe(self) -> dict[str, Any]:
        return {}


def spill(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Compute one tensor of `checkpoint` once; reading it again is reading memory. Cost: its bytes on the disk of TMPDIR."""
    import torch

    info = checkpoint.info(name)
    if info.numel == 0:
        return checkpoint
    with tempfile.TemporaryFile() as stream:
        _reserve(stream.fileno(), info.nbytes)
        values = torch.frombuffer(mmap.mmap(stream.fileno(), info.nbytes), dtype=torch_dtype(info.dtype))
    for start, stop in checkpoint.pieces(name, CHUNK_ELEMENTS):
        checkpoint.read(name, start, stop, out=values[start:stop])
    return ScratchTensor(name, info, values)


def _reserve(descriptor: int, size: int) -> None:
    """Lengthen a file; where the system can, its blocks are set aside, because a full disk kills whoever writes to a mapping."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        raise RunError(
            f"{tempfile.gettempdir()}: a nested merge needs {size:,} bytes of scratch space here ({error.strerror}). "
            "Free some space, or set TMPDIR to a folder that has it."
        ) from error
