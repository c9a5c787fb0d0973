"""A model on disk: a folder of one file or shards, with or without an index, mapped and never copied; here in safetensors."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modelglue.checkpoint.formats.header import Entry, is_text, read_header, shown
from modelglue.checkpoint.formats.mapped import MappedFiles
from modelglue.checkpoint.formats.pages import MAPPED_BYTES
from modelglue.checkpoint.formats.shards import SAFETENSORS, WeightFormat, check_index, find_shards, read_object
from modelglue.checkpoint.formats.side_files import side_files
from modelglue.checkpoint.identity import content_identity
from modelglue.checkpoint.protocol import ITEM_SIZE, Checkpoint, SideFile, TensorInfo
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

#: the list of shards, which the hub and transformers look for under this name
INDEX = SAFETENSORS.indexes[0]


class DiskCheckpoint(Checkpoint):
    """A model on disk, whatever the format of its weights: a folder with config and side files, or one file of weights."""

    def __init__(self, path: Path, reference: str | None, form: WeightFormat) -> None:
        self._path = path
        self._reference = reference or str(path)
        self._shards = find_shards(path, form)
        self._infos: dict[str, TensorInfo] = {}
        home: dict[str, str] = {}
        for number, shard in enumerate(self._shards):
            for name, info in self._headers(number, shard).items():
                if name in home:
                    raise CheckpointError(f"{shard}: tensor {shown(name)} stands in {home[name]} as well. Remove one of the shards.")
                home[name], self._infos[name] = shard.name, info
        check_index(path, form, home)
        self._names = tuple(sorted(self._infos))

    @abstractmethod
    def _headers(self, number: int, shard: Path) -> Mapping[str, TensorInfo]:
        """What shard `number` says it holds, checked against the file."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._reference!r})"

    @property
    def path(self) -> Path:
        """The folder (or file) on disk."""
        return self._path

    @property
    def shards(self) -> Sequence[Path]:
        """The files of its weights, in order."""
        return tuple(self._shards)

    @property
    def places(self) -> Sequence[Path]:
        return (self._path,)

    @property
    def hub_id(self) -> str | None:
        return hub_id_of(self._path)

    def called(self, reference: str) -> Self:
        """The same model under another reference, which recipes and cards made from it then give."""
        return type(self)(self._path, reference)  # type: ignore[call-arg]

    def names(self) -> Sequence[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self._path}: has no tensor '{name}'.{did_you_mean(name, self._names)}") from None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self._path)

    @cached_property
    def files(self) -> Mapping[str, SideFile]:
        return side_files(self._path) if self._path.is_dir() else {}

    @cached_property
    def identity(self) -> str:
        return content_identity(self, self.stamp)

    @cached_property
    def stamp(self) -> str:
        paths = [*self._shards, *(file for file in self.files.values() if isinstance(file, Path))]
        if (self._path / "config.json").is_file():
            paths.append(self._path / "config.json")
        lines = []
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}), though it was there before.") from error
            lines.append(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def working_bytes(self, name: str, elements: int) -> int:
        return MAPPED_BYTES

    def describe(self) -> dict[str, Any]:
        return {"model": self._reference}


class SafetensorsCheckpoint(DiskCheckpoint):
    """The tensors of a folder (or of one .safetensors file). Opening reads headers only.

    Reading returns a view of the mapped file: no private memory, and the page cache is shared with every other process
    that maps the same file.
    """

    def __init__(self, path: Path, reference: str | None = None) -> None:
        if path.is_file() and path.suffix not in SAFETENSORS.suffixes:
            raise CheckpointError(f"{path}: is not a .safetensors file. Give a model folder or a .safetensors file.")
        self._where: dict[str, tuple[int, Entry]] = {}
        super().__init__(path, reference, SAFETENSORS)
        sizes = [0] * len(self._shards)
        for number, entry in self._where.values():
            sizes[number] = max(sizes[number], entry.end)
        self._files = MappedFiles(self._shards, sizes)

    def _headers(self, number: int, shard: Path) -> Mapping[str, TensorInfo]:
        entries = read_header(shard)
        for name, entry in entries.items():
            self._where.setdefault(name, (number, entry))
        return {name: entry.info for name, entry in entries.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        info = self.info(name)
        number, entry = self._where[name]
        item = ITEM_SIZE.get(info.dtype, 1)
        count = (info.numel if stop is None else stop) - start
        view = self._files.view(number, entry.begin + start * item, count, info.dtype)
        if out is not None:
            view = out.copy_(view)
        return view

    def together(self, names: Sequence[str]) -> torch.Tensor:
        """A view where the tensors lie one behind the other in a file, as they do where a file is in the order of the names."""
        places = [self._where[name] for name in names if name in self._where]
        joined = len(places) == len(names) > 0 and all(
            one[0] == two[0] and one[1].end == two[1].begin and one[1].info.dtype == two[1].info.dtype for one, two in pairwise(places)
        )
        if not joined or places[0][1].info.dtype not in ITEM_SIZE:
            return super().together(names)
        number, first = places[0]
        size = places[-1][1].end - first.begin
        return self._files.view(number, first.begin, size // ITEM_SIZE[first.info.dtype], first.info.dtype)


def hub_id_of(path: Path) -> str | None:
    """`org/name` of a folder that is a snapshot in the hub's cache."""
    snapshots = path.absolute().parent
    kind, _, repository = snapshots.parent.name.partition("--")
    owner, _, name = repository.partition("--")
    return f"{owner}/{name}" if snapshots.name == "snapshots" and kind == "models" and name else None


def read_config(path: Path) -> Mapping[str, Any]:
    """The config.json of a model folder, {} where there is none."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    remedy = "Restore the model's config."
    value = read_object(file, remedy, unique=False)
    if not is_text(json.dumps(value, ensure_ascii=False)):
        raise CheckpointError(f"{file}: holds an escape that is half a character, which cannot be written again. {remedy}")
    return value
