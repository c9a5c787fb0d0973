"""What every floor above knows of weights: a `Checkpoint`, a lazily read, immutable mapping from tensor name to tensor.

Dtypes are written as safetensors writes them ("BF16", "F32", ...), so that planning a merge needs no torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from modelglue.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: bytes of one element of every dtype that the safetensors format knows and we store
ITEM_SIZE: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

#: bits of one element of the dtypes that share bytes between elements: headers that hold them are read, their values are not
PACKED_BITS: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

#: dtypes that a merge may compute with; everything else is copied or refused by name
FLOATING: frozenset[str] = frozenset({"F64", "F32", "F16", "BF16"})


#: a file beside the weights: where its bytes are, or the bytes themselves if it was made
SideFile: TypeAlias = Path | bytes


def file_bytes(file: SideFile) -> bytes:
    """The content of a side file; CheckpointError if it cannot be read."""
    if isinstance(file, bytes):
        return file
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Check its permissions.") from error


def file_place(name: str, file: SideFile) -> str:
    """What an error calls a side file: its path, or its name if it was made."""
    return f"the made {name}" if isinstance(file, bytes) else str(file)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        if self.dtype in PACKED_BITS:
            return self.numel * PACKED_BITS[self.dtype] // 8
        return self.numel * ITEM_SIZE[self.dtype]


class Checkpoint(ABC):
    """A model on disk or an expression over models; nothing is computed until somebody reads it.

    Implementations are immutable and picklable (a worker process gets the expression and maps the files itself).
    """

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor; CheckpointError names the checkpoint and the near names if it is unknown."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Elements start..stop of the flattened tensor, as a 1-D CPU tensor of the dtype of `info(name)`.

        With `out` (1-D, stop - start elements, of that dtype or another that the values are cast to) the values are written there and
        `out` is returned; without it the result may be a read-only view of a mapped file, so a caller never writes into it.
        """

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json; empty when there is none."""

    @property
    @abstractmethod
    def files(self) -> Mapping[str, SideFile]:
        """Side files of the output (tokenizer, generation config, ...): name in the folder -> where its bytes are, or the bytes."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """SHA-256 (hex) of the content: of every tensor's bytes for files, of the canonical recipe for expressions.

        May have to hash whole files the first time; a plain merge never asks for it.
        """

    @property
    @abstractmethod
    def stamp(self) -> str:
        """Cheap fingerprint for naming temporary siblings: recipe + (path, size, mtime_ns, inode) of every file."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The expression in our recipe dialect, JSON-ready: {"model": REF} for a model on disk, a recipe for a merge."""

    def sources(self) -> Sequence[Checkpoint]:
        """The models that the expression is made of, in order; a model on disk is made of itself."""
        return (self,)

    @property
    def places(self) -> Sequence[Path]:
        """Folders and files on disk that a model on disk is read from: the base, then its adapters. Who writes stays out of them."""
        return ()

    @property
    def hub_id(self) -> str | None:
        """`org/name` of a model that came out of the hub's cache."""
        return None

    @property
    def warnings(self) -> Sequence[str]:
        """What the user of this model should know, found when it was opened."""
        return ()

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        """What reading a tensor reads: checkpoints that are no expressions, and the tensor's name there."""
        return ((self, name),)

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        """Ranges of flat positions that together cover the tensor; reading one piece costs memory O(limit x inputs).

        An expression whose method needs whole rows or matrices returns ranges that respect them.
        """
        numel = self.info(name).numel
        return [(start, min(start + limit, numel)) for start in range(0, numel, limit)] or [(0, 0)]

    def splittable(self, name: str) -> bool:
        """Whether pieces of this tensor may be read by different workers without doing work twice."""
        return True

    def computed(self, name: str) -> bool:
        """Whether reading this tensor costs arithmetic; who reads it more than once then keeps what it read."""
        return False

    def reads_twice(self, name: str) -> bool:
        """Whether what this tensor is made of is read more than once: then pages of the inputs are worth keeping."""
        return False

    def working_bytes(self, name: str, elements: int) -> int:
        """About how much private memory reading `elements` of this tensor at a time takes, beside what comes out of it.

        Whoever computes says what for; whoever reads a file, the pages that it keeps mapped.
        """
        return 3 * 8 * elements if self.computed(name) else 0

    def prepare(self, names: Sequence[str] | None = None) -> None:  # noqa: B027 - most checkpoints have nothing to prepare
        """Gather what must be known of the whole model before any tensor can be read; called before workers start."""

    def together(self, names: Sequence[str]) -> torch.Tensor:
        """Whole tensors of one dtype, end to end (1-D): what many small ones cost least in. Treat it as read-only."""
        import torch

        return torch.cat([self.read(name) for name in names])

    def values_of(self, name: str) -> Hashable:
        """What a tensor's values are a function of: tensors for which it is equal hold equal values.

        As fine as the expression can tell: a merge answers with the inputs' answers and its parameters there, so a candidate that differs
        from another in one layer differs from it in that layer's tensors only. May hash files, like `identity`.
        """
        return self.identity, name

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in its own shape."""
        return self.read(name).view(self.info(name).shape)
