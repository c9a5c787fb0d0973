"""One file written by torch.save, the zip of today or the stream of before 1.6: which tensors it holds and where their bytes stand.

The pickle in it is read as data (`unpickle`), the storages are left where they are.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelglue.checkpoint.formats.header import is_text, shown
from modelglue.checkpoint.formats.stored_zip import Record, read_directory
from modelglue.checkpoint.formats.unpickle import MAX_PICKLE_BYTES, NUMBERED, BoundedReader, PickleError, Storage, StoredTensor, read_pickle
from modelglue.checkpoint.protocol import ITEM_SIZE, TensorInfo
from modelglue.errors import CheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT = 8  # bytes that say how many elements follow, before each storage of the old format
_TRUST = "Where you trust the file, load it with torch and save the tensors alone, as safetensors."
#: how deep the weights may stand in a training checkpoint: {"checkpoint": {"model": {"state_dict": ...}}}
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and its window on the bytes of a storage: `begin` and `numel` are the storage's, offset and stride count elements."""

    info: TensorInfo
    begin: int
    numel: int
    offset: int
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.info.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.info.numel == 0
            expected *= size
        return True


def read_torch_file(path: Path) -> Mapping[str, Placed]:
    """Tensor name -> place. Reads the pickle and the zip directory, no weights. Raises CheckpointError naming file and tensor."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            if mapping[:4] == b"PK\3\4":
                value, place = _read_zip(path, mapping)
            elif mapping[:4] == b"PK\5\6" or mapping[257:262] == b"ustar":
                raise CheckpointError(f"{path}: is an archive of a torch older than 0.2, or an empty one. {_TRUST}")
            else:
                value, place = _read_stream(path, mapping)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    except ValueError as error:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: is empty. Fetch or write it again.") from error
        raise
    return {name: _placed(path, name, tensor, place) for name, tensor in _weights(path, value).items()}


# -- the two containers --------------------------------------------------------------------------------------------------------------


def _read_zip(path: Path, mapping: mmap.mmap) -> tuple[Any, Callable[[Storage], int]]:
    records = read_directory(path)
    roots = [name.removesuffix("data.pkl") for name in records if PurePosixPath(name).name == "data.pkl"]
    if len(roots) != 1 or roots[0].count("/") != 1:
        raise CheckpointError(f"{path}: is a zip archive, but not one of torch: it needs one data.pkl in one folder.")
    root = roots[0]
    if any(name.startswith(f"{root}code/") or name == f"{root}constants.pkl" for name in records):
        raise CheckpointError(f"{path}: is a TorchScript program, not a file of weights. {_TRUST}")
    order = records.get(f"{root}byteorder")
    if order is not None and mapping[order.begin : min(order.end, order.begin + 20)] != b"little":
        raise CheckpointError(f"{path}: was written big-endian. Load it with torch on this machine and save it again, as safetensors.")
    text = records[f"{root}data.pkl"]
    if text.end - text.begin > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: its pickle is longer than {MAX_PICKLE_BYTES:,} bytes. {_TRUST}")
    if zlib.crc32(mapping[text.begin : text.end]) != text.crc:
        raise CheckpointError(f"{path}: its pickle does not have the check sum that the archive says. Fetch the file again.")
    reader = BoundedReader(lambda begin, end: mapping[begin:end], text.begin, text.end)
    value = _pickle(path, reader)
    known: dict[str, Storage] = {}

    def place(storage: Storage) -> int:
        record: Record | None = records.get(f"{root}data/{storage.key}")
        if record is None:
            raise CheckpointError(f"{path}: refers to the storage {shown(storage.key)}, which it does not hold. Fetch the file again.")
        _check_same(path, known, storage)
        if record.end - record.begin != storage.numel * _item(storage):
            raise CheckpointError(
                f"{path}: the storage {shown(storage.key)} should have {storage.numel:,} elements of {_item(storage)} bytes, "
                f"but its record has {record.end - record.begin:,} bytes. Fetch the file again."
            )
        return record.begin

    return value, place


def _read_stream(path: Path, mapping: mmap.mmap) -> tuple[Any, Callable[[Storage], int]]:
    """Magic, protocol, the machine it was written on, the value, the keys of the storages, then each storage with its length."""
    reader = BoundedReader(lambda begin, end: mapping[begin:end], 0, len(mapping))
    try:
        magic = read_pickle(reader)
    except PickleError:
        magic = None
    if magic != _MAGIC:
        raise CheckpointError(f"{path}: is not a file of torch.save. Allowed are safetensors, and what torch.save wrote.")
    if (version := _pickle(path, reader)) != _PROTOCOL:
        raise CheckpointError(f"{path}: is written in version {shown(version)} of torch's old format, known is {_PROTOCOL}. {_TRUST}")
    system = _pickle(path, reader)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: was written big-endian. Load it with torch on this machine and save it again, as safetensors.")
    value = _pickle(path, reader)
    keys = _pickle(path, reader)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{path}: its list of storages is damaged. Fetch the file again.")
    storages = _storages_of(value)
    begins: dict[str, int] = {}
    position = reader.position
    known: dict[str, Storage] = {}
    for key in keys:
        if key not in storages:
            raise CheckpointError(f"{path}: holds the storage {shown(key)}, which no tensor uses. Fetch the file again.")
        claimed = int.from_bytes(mapping[position : position + _COUNT], "little")
        begins[key] = position + _COUNT
        position += _COUNT + storages[key].numel * _item(storages[key])
        if claimed != storages[key].numel or position > len(mapping):
            raise CheckpointError(
                f"{path}: the storage {shown(key)} of {storages[key].numel:,} elements has {claimed:,} elements in the file, "
                f"or ends behind its {len(mapping):,} bytes. Fetch the file again."
            )
    if position != len(mapping):
        raise CheckpointError(f"{path}: ends with {len(mapping) - position:,} bytes that belong to no storage. Fetch the file again.")

    def place(storage: Storage) -> int:
        if storage.key not in begins:
            raise CheckpointError(f"{path}: refers to the storage {shown(storage.key)}, which it does not hold. Fetch the file again.")
        _check_same(path, known, storage)
        return begins[storage.key]

    return value, place


def _pickle(path: Path, reader: BoundedReader) -> Any:
    try:
        return read_pickle(reader)
    except PickleError as error:
        raise CheckpointError(f"{path}: its pickle {error}. Nothing in it was run. {_TRUST}") from error


def _item(storage: Storage) -> int:
    return ITEM_SIZE[storage.dtype] if storage.dtype else 1


def _check_same(path: Path, known: dict[str, Storage], storage: Storage) -> None:
    if known.setdefault(storage.key, storage) != storage:
        raise CheckpointError(f"{path}: calls the storage {shown(storage.key)} by two dtypes or lengths. Fetch the file again.")


def _storages_of(value: Any) -> dict[str, Storage]:
    """Every storage in a value, by key; the first that a key stands for."""
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, StoredTensor):
            part = part.storage
        if isinstance(part, Storage):
            found.setdefault(part.key, part)
        elif isinstance(part, dict | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            waiting += part.values() if isinstance(part, dict) else part
    return found


# -- the weights among what was saved --------------------------------------------------------------------------------------------------


def _weights(path: Path, value: Any) -> Mapping[str, StoredTensor]:
    """The dict whose values are all tensors: the value itself, or the only such dict nearest to the top."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a dict of tensors. {_TRUST}")
    if not value:
        return {}
    if _is_weights(value):
        return value
    level: list[tuple[str, dict[str, Any]]] = [("", value)]
    seen = {id(value)}
    for _ in range(_DEPTH):
        level = [
            (f"{place}[{shown(key)}]", child)
            for place, parent in level
            for key, child in parent.items()
            if isinstance(child, dict) and id(child) not in seen and not seen.add(id(child))  # type: ignore[func-returns-value]
        ]
        found = [(place, child) for place, child in level if _is_weights(child)]
        if len(found) > 1:
            places = ", ".join(place for place, _ in found[:6])
            raise CheckpointError(f"{path}: holds several sets of weights: {places}. Save the one that you mean in a file of its own.")
        if found:
            _check_beside(path, value)
            return found[0][1]
    others = [f"{shown(key)} ({type(child).__name__})" for key, child in value.items() if not isinstance(child, StoredTensor)]
    raise CheckpointError(
        f"{path}: is no dict of tensors: it also holds {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}. "
        "Save the tensors alone, best as safetensors."
    )


def _is_weights(value: dict[str, Any]) -> bool:
    return bool(value) and all(isinstance(part, StoredTensor) for part in value.values())


def _check_beside(path: Path, value: dict[str, Any]) -> None:
    """Numbers, settings and the state of an optimiser beside the weights are left out; tensors that lie loose might be weights."""
    loose = [key for key, child in value.items() if isinstance(child, StoredTensor) and "rng" not in key]
    if loose:
        listed = ", ".join(map(shown, loose[:6]))
        raise CheckpointError(f"{path}: has tensors beside its dict of weights: {listed}. Save all weights in one dict.")


def _placed(path: Path, name: str, tensor: StoredTensor, place: Callable[[Storage], int]) -> Placed:
    if name.startswith(NUMBERED) or not is_text(name):
        raise CheckpointError(f"{path}: has a tensor under {shown(name.removeprefix(NUMBERED))}, which is not a name.")
    item = ITEM_SIZE[tensor.dtype]
    available = tensor.storage.numel * _item(tensor.storage) // item
    if len(tensor.shape) > 64 or math.prod(min(size, 2**63) or 1 for size in tensor.shape) >= 2**63:
        raise CheckpointError(f"{path}: tensor {shown(name)} has shape {shown(tensor.shape)}, more than can be counted.")
    info = TensorInfo(tensor.shape, tensor.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    if info.numel and last >= available:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} reaches to element {last:,} of its storage, which has {available:,}. "
            "The file is damaged or hostile; fetch it again."
        )
    if info.numel > available:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {shown(tensor.shape)} repeats its {available:,} stored elements (it was expanded). "
            "Call .contiguous() on it and save the file again."
        )
    return Placed(info, place(tensor.storage), available, tensor.offset, tensor.stride)
