"""A base model in which some entries are another model's: what a sparse difference, kept in a folder, makes of its base.

The folder holds `delta.json`, the config and tokenizer of the model that it restores, and `delta.safetensors`. Of a tensor that is kept
in part there are three: `NAME.mask`, one bit an entry (the lowest bit first) that says whether the entry is replaced; `NAME.values`, the
entries that replace, in order; `NAME.starts`, how many of them come before each block of 65,536 entries. What is kept whole stands under
its own name, and what is not mentioned is the base's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modelglue.checkpoint.formats.folder import SafetensorsCheckpoint, read_config
from modelglue.checkpoint.formats.shards import read_object
from modelglue.checkpoint.formats.side_files import side_files
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, SideFile, TensorInfo
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

DELTA_FILE: Final = "delta.json"
DELTA_WEIGHTS: Final = "delta.safetensors"
#: entries of which `starts` counts the replaced ones
BLOCK: Final = 65_536
_SUFFIXES = ("mask", "values", "starts")


class DeltaManifest(BaseModel):
    """delta.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["modelglue-sparse/1"] = "modelglue-sparse/1"
    base_identity: str
    """Of the model that the entries are laid into; another one is refused."""
    partly: tuple[str, ...]
    """Tensors of which some entries are kept."""
    whole: tuple[str, ...]
    """Tensors that are kept whole."""


def is_sparse_delta(folder: Path) -> bool:
    """Whether a folder holds a sparse difference; says nothing about whether it is a sound one."""
    return (folder / DELTA_FILE).is_file()


class SparseDelta:
    """The folder, checked against itself: every name, shape and dtype that can be known from headers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        place = path / DELTA_FILE
        try:
            self.manifest = DeltaManifest.model_validate(read_object(place, "Make the mixture again."))
        except ValidationError as error:
            raise CheckpointError(f"{place}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}. Make the mixture again.") from error
        self.weights = SafetensorsCheckpoint(path / DELTA_WEIGHTS)
        parts = [f"{name}.{suffix}" for name in self.manifest.partly for suffix in _SUFFIXES]
        expected = [*parts, *self.manifest.whole]
        if sorted(expected) != sorted(self.weights.names()):
            odd = sorted(set(expected) ^ set(self.weights.names())) or ["a name that is given twice"]
            raise CheckpointError(
                f"{path}: {DELTA_FILE} and {DELTA_WEIGHTS} do not hold the same tensors ({odd[0]}). Make the mixture again."
            )

    @cached_property
    def stamp(self) -> str:
        status = (self.path / DELTA_FILE).stat()
        return f"{self.weights.stamp}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256((self.weights.identity + self.manifest.model_dump_json()).encode()).hexdigest()


class SparseCheckpoint(Checkpoint):
    """The base with a sparse difference laid into it. Reading a range costs reading the base's, the mask's and the values' there.

    CheckpointError for another base than the difference was taken from, and for a tensor whose parts do not fit the base's.
    """

    def __init__(self, base: Checkpoint, delta: SparseDelta, reference: str) -> None:
        self._base = base
        self._delta = delta
        self._reference = reference
        manifest = delta.manifest
        if manifest.base_identity != base.identity:
            raise CheckpointError(
                f"'{reference}': {delta.path} was taken from another base ({manifest.base_identity[:12]}, this is {base.identity[:12]}). "
                "Give the base that lies with it."
            )
        self._partly, self._whole = frozenset(manifest.partly), frozenset(manifest.whole)
        self._names = tuple(sorted({*base.names(), *self._whole}))
        if faults := [fault for name in manifest.partly if (fault := self._fault(name)) is not None]:
            raise CheckpointError("\n".join(f"{delta.path}: {fault} Make the mixture again." for fault in faults))

    def __repr__(self) -> str:
        return f"SparseCheckpoint({self._reference!r})"

    def _fault(self, name: str) -> str | None:
        """What is wrong with the parts of one tensor."""
        if name not in self._base.names():
            return f"'{name}' is kept in part, but the base does not have it."
        numel = self._base.info(name).numel
        mask, values, starts = (self._delta.weights.info(f"{name}.{suffix}") for suffix in _SUFFIXES)
        wanted = {"mask": (mask, ((-(-numel // 8),), "U8")), "starts": (starts, ((-(-numel // BLOCK) + 1,), "I64"))}
        for suffix, (found, (shape, dtype)) in wanted.items():
            if (found.shape, found.dtype) != (shape, dtype):
                return f"'{name}.{suffix}' is {found.dtype} {list(found.shape)}, allowed is {dtype} {list(shape)}."
        if values.dtype not in FLOATING or len(values.shape) != 1 or values.numel > numel:
            return f"'{name}.values' is {values.dtype} {list(values.shape)}, allowed is a list of at most {numel} floating-point numbers."
        return None

    def names(self) -> Sequence[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        if name in self._whole:
            return self._delta.weights.info(name)
        if name in self._partly:
            return TensorInfo(self._base.info(name).shape, self._delta.weights.info(f"{name}.values").dtype)
        if name not in self._names:
            raise CheckpointError(f"{self._reference}: has no tensor '{name}'.{did_you_mean(name, self._names)}")
        return self._base.info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        info = self.info(name)
        if name in self._whole:
            return self._delta.weights.read(name, start, stop, out)
        if name not in self._partly:
            return self._base.read(name, start, stop, out)
        stop = info.numel if stop is None else stop
        if out is None:
            out = torch.empty(max(stop - start, 0), dtype=torch_dtype(info.dtype))
        starts = self._starts(name)
        at = start
        while at < stop:
            block = at // BLOCK
            end = min((block + 1) * BLOCK, info.numel)
            replaced = self._bits(name, block * BLOCK, end)
            first, last = int(starts[block]), int(starts[block + 1])
            if int(replaced.sum()) != last - first:
                raise CheckpointError(f"{self._delta.path}: '{name}.mask' does not say what '{name}.starts' says. Make the mixture again.")
            values = self._base.read(name, block * BLOCK, end).to(out.dtype, copy=True)
            values[replaced] = self._delta.weights.read(f"{name}.values", first, last)
            upper = min(end, stop)
            out[at - start : upper - start] = values[at - block * BLOCK : upper - block * BLOCK]
            at = upper
        return out

    def _starts(self, name: str) -> torch.Tensor:
        starts = self._delta.weights.read(f"{name}.starts")
        steps = starts.diff()
        total = self._delta.weights.info(f"{name}.values").numel
        if int(starts[0]) != 0 or int(starts[-1]) != total or bool((steps < 0).any()) or bool((steps > BLOCK).any()):
            raise CheckpointError(f"{self._delta.path}: '{name}.starts' does not count '{name}.values'. Make the mixture again.")
        return starts

    def _bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The mask of entries start..stop, both whole bytes or the end."""
        import torch

        packed = self._delta.weights.read(f"{name}.mask", start // 8, -(-stop // 8))
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: stop - start].bool()

    def computed(self, name: str) -> bool:
        return name in self._partly or (name not in self._whole and self._base.computed(name))

    def splittable(self, name: str) -> bool:
        return name in self._whole or self._base.splittable(name)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        wanted = self._names if names is None else names
        self._base.prepare([name for name in wanted if name not in self._whole])

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self._delta.path)

    @cached_property
    def files(self) -> Mapping[str, SideFile]:
        return side_files(self._delta.path)

    @cached_property
    def identity(self) -> str:
        return self._digest(self._base.identity, self._delta.identity)

    @cached_property
    def stamp(self) -> str:
        return self._digest(self._base.stamp, self._delta.stamp)

    def _digest(self, base: str, delta: str) -> str:
        files = {name: hashlib.sha256(Path(str(file)).read_bytes()).hexdigest() for name, file in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(["sparse", base, delta, dict(self.config), files]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"model": self._reference}

    @property
    def places(self) -> Sequence[Path]:
        return (*self._base.places, self._delta.path)

    @property
    def warnings(self) -> Sequence[str]:
        return self._base.warnings


def open_sparse(base: Checkpoint, folder: Path, reference: str) -> SparseCheckpoint:
    """`base` with the sparse difference in `folder` laid into it. Reads headers, and hashes the base once (remembered)."""
    return SparseCheckpoint(base, SparseDelta(folder), reference)
