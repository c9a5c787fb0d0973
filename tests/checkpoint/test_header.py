"""One hostile file for every way in which a safetensors file can be wrong."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import SafetensorsCheckpoint
from modelglue.checkpoint.formats.header import MAX_HEADER_BYTES, read_header
from modelglue.errors import CheckpointError
from tests.checkpoint.files import EIGHT, TWO, weight_file

#: far above what a small file may cost, far below what any of the headers claims
_ALLOWED_BYTES = 1_000_000
_HUGE = 2**62


def one(**changes: Any) -> bytes:
    """A file with one tensor 'w' of eight bytes, its entry changed; a change to None takes the key away."""
    entry = {key: value for key, value in {**TWO, **changes}.items() if value is not None}
    return weight_file({"w": entry}, EIGHT)


def two(first: list[int], second: list[int], size: int) -> bytes:
    """Tensors 'a' and 'b' at these offsets, in `size` bytes of data."""
    entries = {name: {"dtype": "U8", "shape": [at[1] - at[0]], "data_offsets": at} for name, at in (("a", first), ("b", second))}
    return weight_file(entries, bytes(size))


HEALTHY = json.dumps(TWO)

#: name -> (bytes of the file, the tensor at fault, words that the message must hold)
HOSTILE: dict[str, tuple[bytes, str | None, str]] = {
    "empty": (b"", None, "0 bytes long"),
    "too-short-for-a-length": (b"\x02\0\0\0\0\0\0", None, "7 bytes long"),
    "length-without-header": (weight_file(b""), None, "does not start with '{'"),
    "header-longer-than-file": ((99).to_bytes(8, "little") + b"{}", None, "header of 99 bytes, but the whole file has 10"),
    "header-as-long-as-allowed": (
        MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}", None, "100,000,000 bytes, but the whole file has 10",
    ),
    "header-above-100-MB": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", None, "format allows 100,000,000"),
    "length-of-all-ones": (b"\xff" * 8 + b"{}", None, "format allows 100,000,000"),
    "not-utf-8": (weight_file(b'{"w\xff": 1}'), None, "can't decode byte 0xff"),
    "not-json": (weight_file(b"{'w': 1}"), None, "not valid"),
    "two-objects": (weight_file(b"{}{}"), None, "Extra data"),
    "cut-off-json": (weight_file(b'{"w": {"dtype"'), None, "not valid"),
    "a-list": (weight_file(b"[]"), None, "does not start with '{'"),
    "a-blank-before": (weight_file(b" {}"), None, "does not start with '{'"),
    "deep-nesting": (weight_file(b'{"w":' * 50_000 + b"1" + b"}" * 50_000), None, "nested too deeply"),
    "deep-list": (weight_file(b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), None, "nested too deeply"),
    "number-of-many-digits": (weight_file(b'{"w":' + b"9" * 5000 + b"}"), None, "not valid"),
    "tensor-twice": (weight_file(f'{{"w": {HEALTHY}, "w": {HEALTHY}}}'.encode(), EIGHT), None, "'w' twice"),
    "key-twice-in-entry": (
        weight_file(b'{"w": {"dtype": "F32", "shape": [2], "shape": [1], "data_offsets": [0, 8]}}', EIGHT), None, "'shape' twice",
    ),
    "name-of-half-characters": (weight_file(f'{{"w\\ud800": {HEALTHY}}}'.encode(), EIGHT), "'w\\ud800'", "not Unicode"),
    "metadata-a-list": (weight_file({"__metadata__": [], "w": TWO}, EIGHT), None, "__metadata__"),
    "metadata-with-a-number": (weight_file({"__metadata__": {"format": 1}, "w": TWO}, EIGHT), None, "__metadata__"),
    "metadata-of-half-characters": (weight_file({"__metadata__": {"x": "\ud800"}, "w": TWO}, EIGHT), None, "__metadata__"),
    "metadata-key-of-half-characters": (weight_file({"__metadata__": {"\ud800": "x"}, "w": TWO}, EIGHT), None, "__metadata__"),
    "entry-a-number": (weight_file({"w": 8}, EIGHT), "'w'", "exactly dtype, shape and data_offsets"),
    "entry-a-list": (weight_file({"w": ["F32", [2], [0, 8]]}, EIGHT), "'w'", "exactly dtype, shape and data_offsets"),
    "no-dtype": (one(dtype=None), "'w'", "exactly dtype, shape and data_offsets"),
    "no-shape": (one(shape=None), "'w'", "exactly dtype, shape and data_offsets"),
    "no-offsets": (one(data_offsets=None), "'w'", "exactly dtype, shape and data_offsets"),
    "one-key-too-many": (one(strides=[1]), "'w'", "exactly dtype, shape and data_offsets"),
    "dtype-unknown": (one(dtype="F31"), "'w'", "dtype 'F31'; known are F64"),
    "dtype-not-ours": (one(dtype="C128", shape=[1]), "'w'", "dtype 'C128'; known are F64"),
    "half-a-byte": (one(dtype="F4", shape=[15]), "'w'", "shape [15] in F4, which does not fill whole bytes"),
    "packed-too-long": (one(dtype="F4", shape=[18]), "'w'", "in F4, that is 9 bytes, but its offsets span 8"),
    "dtype-in-lower-case": (one(dtype="f32"), "'w'", "dtype 'f32'"),
    "dtype-a-number": (one(dtype=32), "'w'", "dtype 32"),
    "dtype-a-list": (one(dtype=["F32"]), "'w'", "dtype ['F32']"),
    "shape-a-number": (one(shape=2), "'w'", "shape 2"),
    "shape-an-object": (one(shape={"0": 2}), "'w'", "shape {'0': 2}"),
    "shape-negative": (one(shape=[-2]), "'w'", "shape [-2]"),
    "shape-twice-negative": (one(shape=[-2, -1]), "'w'", "shape [-2, -1]"),
    "shape-true": (one(shape=[True, 2]), "'w'", "shape [True, 2]"),
    "shape-float": (one(shape=[2.0]), "'w'", "shape [2.0]"),
    "shape-text": (one(shape=["2"]), "'w'", "shape ['2']"),
    "shape-null": (weight_file(b'{"w":{"dtype":"F32","shape":[null],"data_offsets":[0,8]}}', EIGHT), "'w'", "shape [None]"),
    "shape-nan": (weight_file(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT), "'w'", "shape [nan]"),
    "shape-nested": (one(shape=[[2]]), "'w'", "shape [[2]]"),
    "shape-above-63-bits": (one(shape=[2**63]), "'w'", "shape [9223372036854775808]"),
    "shape-huge": (one(shape=[2**61]), "'w'", "9,223,372,036,854,775,808 bytes"),
    "product-overflows": (one(shape=[_HUGE, 4]), "'w'", "more elements than can be counted"),
    "product-overflows-to-the-right-size": (one(shape=[2**32, 2**32, 2]), "'w'", "more elements than can be counted"),
    "product-of-a-long-list": (one(shape=[_HUGE] * 500), "'w'", "more elements than can be counted"),
    "product-overflows-beside-a-zero": (
        weight_file({"w": {"dtype": "F32", "shape": [_HUGE, _HUGE, 0], "data_offsets": [0, 0]}}), "'w'", "more elements",
    ),
    "offsets-a-number": (one(data_offsets=8), "'w'", "data_offsets 8"),
    "offsets-three": (one(data_offsets=[0, 4, 8]), "'w'", "data_offsets [0, 4, 8]"),
    "offsets-negative": (one(data_offsets=[-8, 0]), "'w'", "data_offsets [-8, 0]"),
    "offsets-float": (one(data_offsets=[0, 8.0]), "'w'", "data_offsets [0, 8.0]"),
    "offsets-true": (one(data_offsets=[False, 8]), "'w'", "data_offsets [False, 8]"),
    "offsets-huge": (one(data_offsets=[0, 2**70]), "'w'", "data_offsets [0, 1180591620717411303424]"),
    "offsets-reversed": (one(data_offsets=[8, 0]), "'w'", "bytes 8 to 0"),
    "offsets-beyond-the-file": (one(data_offsets=[8, 16]), "'w'", "bytes 8 to 16, but the file holds 8"),
    "offsets-far-beyond-the-file": (one(shape=[_HUGE >> 2], data_offsets=[0, _HUGE]), "'w'", "but the file holds 8"),
    "size-too-small-for-the-shape": (one(shape=[3]), "'w'", "12 bytes, but its offsets span 8"),
    "size-too-large-for-the-shape": (one(shape=[1]), "'w'", "4 bytes, but its offsets span 8"),
    "size-of-a-scalar": (one(shape=[]), "'w'", "4 bytes, but its offsets span 8"),
    "overlap": (two([0, 5], [4, 8], 8), "'b'", "overlaps"),
    "same-bytes-twice": (two([0, 8], [0, 8], 8), "'b'", "overlaps"),
    "one-inside-the-other": (two([0, 8], [2, 4], 8), "'b'", "overlaps"),
    "hole-between": (two([0, 3], [5, 8], 8), "'b'", "hole of 2 bytes"),
    "hole-at-the-start": (two([1, 3], [3, 8], 8), "'a'", "hole of 1 bytes"),
    "bytes-at-the-end": (two([0, 3], [3, 6], 8), None, "2 bytes that belong to no tensor"),
    "data-without-tensors": (weight_file({}, b"x"), None, "1 bytes that belong to no tensor"),
    "data-cut-off": (one()[:-1], "'w'", "bytes 0 to 8, but the file holds 7"),
    "data-missing": (one()[:-8], "'w'", "bytes 0 to 8, but the file holds 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, tensor, words = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            SafetensorsCheckpoint(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith(f"{path}: ")
    assert words in message
    assert re.findall(r"tensor ('[^']*')", message) == ([tensor] if tensor else [])
    assert len(message) < len(str(path)) + 600, "a hostile file does not fill the terminal"
    assert peak < _ALLOWED_BYTES + 60 * len(data), "a header allocates what it is, not what it claims"
    message.encode()


def test_healthy_twin_of_the_hostile_files_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one())
    header = read_header(path)
    assert {name: (entry.info.shape, entry.info.dtype, entry.end - entry.begin) for name, entry in header.items()} == {
        "w": ((2,), "F32", 8)
    }
    assert path.read_bytes()[header["w"].begin : header["w"].end] == EIGHT


def test_file_that_is_as_large_as_it_claims_is_still_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:  # sparse: it has the size and takes no room
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(2 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="claims a header of 100,000,001 bytes"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < _ALLOWED_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [[_HUGE] * 100_000, [2] * 100_000, [0] + [_HUGE] * 100_000], ids=["large", "small", "zero"])
def test_long_shape_is_not_multiplied_to_its_end(shape: list[int], tmp_path: Path) -> None:
    """The product of so many numbers has millions of bits."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(shape=shape))
    with pytest.raises(CheckpointError, match=r"tensor 'w' has shape .* more elements than can be counted"):
        read_header(path)


def test_last_of_many_names_twice_is_found(tmp_path: Path) -> None:
    entries = [f'"w{number}": 1' for number in range(100_000)]
    path = tmp_path / "model.safetensors"
    path.write_bytes(weight_file(("{" + ", ".join([*entries, entries[-1]]) + "}").encode()))
    with pytest.raises(CheckpointError, match="names 'w99999' twice"):
        read_header(path)


def test_directory_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "model.safetensors")


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        read_header(path)
    assert str(path) in str(caught.value)
