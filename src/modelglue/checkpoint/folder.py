"""A model folder in safetensors: one file or shards, with or without an index, mapped and never copied."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.header import MAX_HEADER_BYTES, Entry, is_text, parse_object, read_header, shown
from modelglue.checkpoint.identity import content_identity
from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

#: side files that the output of a merge needs to load and to convert elsewhere
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt",
)  # fmt: skip

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
#: the list of shards, which the hub and transformers look for under this name
INDEX = "model.safetensors.index.json"
#: in the hub's cache a model is <repository>/snapshots/<revision>, and its files are links to <repository>/blobs
_SHARED_BLOBS = "blobs"
_LONGEST_NAME = 255
#: bytes that may be read from a shard before its pages are let go; they count as private memory while one process maps them
_MAPPED_BYTES = 2**25
#: what reading a few bytes may map: the kernel maps the whole block of the page cache that they stand in
_MAPPED_AT_ONCE = 2**21


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a folder (or of one .safetensors file). Opening reads headers only.

    Reading returns a view of the mapped file: no private memory, and the page cache is shared with every other process
    that maps the same file.
    """

    def __init__(self, path: Path, reference: str | None = None) -> None:
        self._path = path
        self._reference = reference or str(path)
        self._shards = _find_shards(path)
        self._where: dict[str, tuple[int, Entry]] = {}
        for number, shard in enumerate(self._shards):
            for name, entry in read_header(shard).items():
                if name in self._where:
                    other = self._shards[self._where[name][0]]
                    raise CheckpointError(f"{shard}: tensor {shown(name)} stands in {other.name} as well. Remove one of the shards.")
                self._where[name] = (number, entry)
        _check_index(path, self._shards, {name: self._shards[number].name for name, (number, _) in self._where.items()})
        self._names = tuple(sorted(self._where))
        self._maps: dict[int, mmap.mmap] = {}
        self._touched: dict[int, int] = {}  # bytes read since the map last let go of its pages

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_touched": {}}

    def __repr__(self) -> str:
        return f"SafetensorsCheckpoint({self._reference!r})"

    @property
    def path(self) -> Path:
        """The folder (or file) on disk."""
        return self._path

    @property
    def places(self) -> Sequence[Path]:
        return (self._path,)

    @property
    def hub_id(self) -> str | None:
        return hub_id_of(self._path)

    def names(self) -> Sequence[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self._find(name)[1].info

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        number, entry = self._find(name)
        item = entry.info.nbytes // entry.info.numel if entry.info.numel else 1
        stop = entry.info.numel if stop is None else stop
        dtype = torch_dtype(entry.info.dtype)
        if stop <= start:
            view = torch.empty(0, dtype=dtype)
        else:
            offset = entry.begin + start * item
            if offset % item:  # legal in foreign files; a view needs aligned elements
                data = bytearray(self._map(number)[offset : offset + (stop - start) * item])
                view = torch.frombuffer(data, dtype=dtype)
            else:
                view = torch.frombuffer(self._map(number), dtype=dtype, count=stop - start, offset=offset)
                self._unmap_now_and_then(number, (stop - start) * item)
        return view if out is None else out.copy_(view)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = self._path / "config.json"
        if not self._path.is_dir() or not path.is_file():
            return {}
        remedy = "Restore the model's config."
        value = _read_object(path, remedy, unique=False)
        if not is_text(json.dumps(value, ensure_ascii=False)):
            raise CheckpointError(f"{path}: holds an escape that is half a character, which cannot be written again. {remedy}")
        return value

    @cached_property
    def files(self) -> Mapping[str, SideFile]:
        if not self._path.is_dir():
            return {}
        return {name: self._path / name for name in SIDE_FILES if (self._path / name).is_file()}

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

    def describe(self) -> dict[str, Any]:
        return {"model": self._reference}

    def _find(self, name: str) -> tuple[int, Entry]:
        try:
            return self._where[name]
        except KeyError:
            raise CheckpointError(f"{self._path}: has no tensor '{name}'.{did_you_mean(name, self._names)}") from None

    def _unmap_now_and_then(self, number: int, size: int) -> None:
        """Let go of pages that were read, so that a streaming process does not seem to own all of its inputs.

        Views stay valid: a page that is touched again comes back from the page cache.
        """
        self._touched[number] = self._touched.get(number, 0) + max(size, _MAPPED_AT_ONCE)
        if self._touched[number] > _MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[number].madvise(mmap.MADV_DONTNEED)
            self._touched[number] = 0

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            shard = self._shards[number]
            with shard.open("rb") as stream:
                # A private mapping: torch wants a writable buffer, and a stray write could never reach the file.
                mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            needed = max(entry.end for where, entry in self._where.values() if where == number)
            if len(mapping) < needed:
                raise CheckpointError(f"{shard}: has become shorter since it was opened. Leave it alone until the run is over.")
            self._maps[number] = mapping
        return self._maps[number]


def hub_id_of(path: Path) -> str | None:
    """`org/name` of a folder that is a snapshot in the hub's cache."""
    snapshots = path.absolute().parent
    owner, _, name = snapshots.parent.name.removeprefix("models--").partition("--")
    return f"{owner}/{name}" if snapshots.name == "snapshots" and name else None


def _find_shards(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: is not a .safetensors file. Give a model folder or a .safetensors file.")
        return [path]
    index, single = path / INDEX, path / "model.safetensors"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        if single.name not in names and single.is_file():
            raise CheckpointError(f"{path}: holds {single.name} and an index of other shards: two models. Remove one of them.")
        shards = [_inside(path, name, index) for name in names]
        if fault := _gap(names):
            raise CheckpointError(f"{index}: does not list tensors of every shard: {fault}. Fetch the model again.")
        return shards
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_") and file.is_file())
    if single in found:
        return [single]
    if not found:
        raise _no_weights(path)
    if len(found) == 1 and _SHARD.fullmatch(found[0].name) is None:
        return found
    names = [file.name for file in found]
    fault = _gap(names)
    if fault is None:
        raise CheckpointError(
            f"{path}: holds several .safetensors files and no index: {', '.join(names)}. Keep one model per folder, or add {INDEX}."
        )
    if fault:
        raise CheckpointError(f"{path}: {fault}. Fetch the model again.")
    return found


def _gap(names: Sequence[str]) -> str | None:
    """What is wrong with numbered shards, "" if nothing is; None if these are not the numbered shards of one model."""
    numbered = [_SHARD.fullmatch(name) for name in names]
    if any(match is None for match in numbered) or len({(match["stem"], match["total"]) for match in numbered if match}) != 1:
        return None
    total = max(int(match["total"]) for match in numbered if match)
    present = {int(match["number"]) for match in numbered if match}
    missing = sorted(set(range(1, total + 1)) - present)
    if missing:
        few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return f"shard {few} of {total} is missing"
    return f"shard {max(present)} of {total} is one too many" if max(present) > total else ""


def _no_weights(path: Path) -> CheckpointError:
    legacy = sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt")])
    if legacy:
        return CheckpointError(
            f"{path}: holds {legacy[0]} and no .safetensors. Reading pickled weights is not supported yet; convert the model first."
        )
    if (path / "adapter_model.safetensors").is_file():
        return CheckpointError(f"{path}: is an adapter, not a model. Fold it into its base first.")
    return CheckpointError(f"{path}: holds no .safetensors file. Give the folder of a model.")


def _weight_map(index: Path) -> dict[str, str]:
    remedy = "Fetch the model again."
    weight_map = _read_object(index, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, or an empty or malformed one. {remedy}")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: tensor {shown(name)} points to {shown(file)}, allowed is a file name. {remedy}")
    return weight_map


def _read_object(path: Path, remedy: str, *, unique: bool = True) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: is {size:,} bytes long, allowed are {MAX_HEADER_BYTES:,}. {remedy}")
        return parse_object(path.read_bytes(), unique=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid: {error}. {remedy}") from error


def _inside(folder: Path, name: str, index: Path) -> Path:
    """The shard `name` of `folder`; no index may lead out of its folder (the hub cache's links to its blobs may)."""
    plain = PurePosixPath(name).name == name and "\\" not in name and "\0" not in name and is_text(name)
    if not plain or not name.endswith(".safetensors") or len(name.encode()) > _LONGEST_NAME:
        raise CheckpointError(f"{index}: names the shard {shown(name)}, which is not a .safetensors file of this folder.")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{index}: names the shard '{name}', which does not exist. Fetch the model again.")
    real, home = path.resolve(), folder.resolve()
    if not real.is_relative_to(home) and real.parent != (home.parent.parent / _SHARED_BLOBS).resolve():
        raise CheckpointError(f"{index}: the shard '{name}' is a link that leaves the folder, to {real}.")
    return path


def _check_index(path: Path, shards: Sequence[Path], found: Mapping[str, str]) -> None:
    index = path / INDEX
    if not path.is_dir() or not index.is_file():
        return
    claimed = _weight_map(index)
    for name, file in claimed.items():
        if found.get(name) != file:
            place = f"stands in {found[name]}" if name in found else "stands in no shard"
            raise CheckpointError(f"{index}: tensor {shown(name)} should stand in {file}, but {place}. Fetch the model again.")
    for name, file in found.items():
        if name not in claimed:
            raise CheckpointError(f"{index}: does not list tensor {shown(name)} of {file}. Fetch the model again.")
