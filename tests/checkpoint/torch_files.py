"""Files of torch.save made by hand: any pickle in a zip archive as torch lays it out, or in the stream of before torch 1.6."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

#: the pickle of {"w": a tensor of two float32 numbers on storage "0"}, up to where its STOP would be
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
WEIGHTS = b"\x80\x02}X\x01\x00\x00\x00w" + TENSOR + b"s."
TWO_FLOATS = b"\0\0\x80?\0\0\0@"


def pickle_of(name: str, tensor: bytes) -> bytes:
    """A state dict of one tensor, which the instructions in `tensor` make."""
    return b"\x80\x02}" + text(name) + tensor + b"s."


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    offset: int = 0,
    numel: int = 2,
    storage: str = "FloatStorage",
    key: str = "0",
) -> bytes:
    """The instructions that make a tensor of storage `key`, whatever its numbers are."""
    if stride is None:
        stride = torch.empty(shape, device="meta").stride()
    window = number(offset) + b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t"
    reference = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + window + b"\x89}tR"


def zip_file(
    data: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    root: str = "archive",
    records: Mapping[str, bytes] | None = None,
    **options: Any,
) -> bytes:
    """A zip archive as torch.save lays it out, of this pickle and these storages; `records` come on top."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        archive.writestr(f"{root}/byteorder", "little")
        for key, content in (storages if storages is not None else {"0": TWO_FLOATS}).items():
            archive.writestr(f"{root}/data/{key}", content)
        archive.writestr(f"{root}/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(name, content)
    return stream.getvalue()


def stream_file(data: bytes, storages: Mapping[str, bytes] | None = None, *, numel: int = 2, little_endian: bool = True) -> bytes:
    """The format of before torch 1.6: magic, protocol, system, pickle, keys, then each storage behind its number of elements."""
    storages = storages if storages is not None else {"0": TWO_FLOATS}
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [0x1950A86A20F9469CFC6C, 1001, system]
    text_ = b"".join(pickle.dumps(part, protocol=2) for part in head) + data + pickle.dumps(list(storages), protocol=2)
    return text_ + b"".join(numel.to_bytes(8, "little") + content for content in storages.values())


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
