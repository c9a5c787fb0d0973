"""Damaged and hostile weight files, made from healthy ones by dice; the same dice give the same file."""

from __future__ import annotations

import copy
import json
import pickletools
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelglue.checkpoint import DiskCheckpoint
from modelglue.checkpoint.formats.opening import open_folder
from modelglue.errors import CheckpointError
from tests.checkpoint.files import weight_file
from tests.checkpoint.torch_files import stream_file, tensor, text, zip_file

#: what a file of a few kilobytes may make its reader allocate at once
ALLOWED_BYTES = 3_000_000

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c.scale": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
    "d.empty": {"dtype": "U8", "shape": [0, 5], "data_offsets": [34, 34]},
    "e.mask": {"dtype": "BOOL", "shape": [2], "data_offsets": [34, 36]},
}
DATA = bytes(random.Random(0).randrange(2) for _ in range(36))
SHARDS = {
    "model-00001-of-00002.safetensors": weight_file({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, DATA[:4]),
    "model-00002-of-00002.safetensors": weight_file({"b": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, DATA[:2]),
}
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 6},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}

#: values that a field might hold
NASTY: list[Any] = [
    -1, 0, 1, 2, 3, 4, 6, 24, 34, 36, 37, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**300, 0.0, 2.0, 1e308, float("nan"),
    float("inf"), True, False, None, "", "F32", "BF16", "U8", "F8_E8M0", "C64", "F4", "\ud800", "\0", "a" * 3000, "../x", "/etc/passwd",
    "..\\x.safetensors", "model-00001-of-00002.safetensors", "./model-00002-of-00002.safetensors", "x" * 300 + ".safetensors",
    "\ud800.safetensors", "\0.safetensors", "sub/model.safetensors", ".safetensors", [], {}, [0], [0, 0], [0, 24], [24, 0], [2, 3],
    [-1, -24], [0, 36, 36], [True], [None], [[2]], [2**62] * 300, [1] * 300, [0] + [2**62] * 300, {"dtype": "F32"}, {"__metadata__": {}},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, child in inside:
        found += [(value, key), *places(child)]
    return found


def mutate_tree(dice: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            break
        container, key = dice.choice(found)
        action = dice.randrange(5)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[str(dice.choice(NASTY))] = container.pop(key)
        elif action == 2:
            other, place = dice.choice(found)
            container[key] = copy.deepcopy(other[place])
        elif action == 3 and isinstance(container[key], int):
            container[key] += dice.choice((-1, 1, 2, 8, -8, 24))
        else:
            container[key] = copy.deepcopy(dice.choice(NASTY))
    return value


def mutate_bytes(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        place = dice.randrange(len(changed) + 1)
        action = dice.randrange(5)
        if action == 0 and place < len(changed):
            changed[place] = dice.randrange(256)
        elif action == 1 and place < len(changed):
            changed[place] ^= 1 << dice.randrange(8)
        elif action == 2:
            del changed[place : place + dice.choice((1, 2, 8, 60))]
        elif action == 3:
            changed[place:place] = dice.choice(
                (b"\0", b"[" * 3000, b'{"a":' * 3000, b"9" * 6000, b"\xff\xfe", b'"', b"\\ud800", b",", b"}")
            )
        else:
            start = dice.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + dice.randrange(80)]
    return bytes(changed)


def hostile_file(dice: random.Random) -> bytes:
    kind = dice.randrange(10)
    if kind < 5:
        text = json.dumps(mutate_tree(dice, HEADER), ensure_ascii=dice.random() < 0.9)
        return weight_file(text.encode("utf-8", "surrogatepass"), DATA)
    if kind < 7:
        return weight_file(mutate_bytes(dice, json.dumps(HEADER).encode()), DATA)
    data = weight_file(HEADER, DATA)
    if kind == 7:
        length = dice.choice((0, 1, 7, 8, len(data) - 8, len(data) - 7, len(data), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    if kind == 8:
        return data[: dice.randrange(len(data))]
    return mutate_bytes(dice, data)


def hostile_index(dice: random.Random) -> bytes:
    if dice.random() < 0.7:
        return json.dumps(mutate_tree(dice, INDEX), ensure_ascii=dice.random() < 0.9).encode("utf-8", "surrogatepass")
    return mutate_bytes(dice, json.dumps(INDEX).encode())


FLOATS = random.Random(1).randbytes(24)
STORAGES = {"0": FLOATS, "1": FLOATS[:8]}
PICKLE = (
    b"\x80\x02}(" + text("a.weight") + tensor((2, 3), numel=6) + text("a.turned") + tensor((3, 2), (1, 3), numel=6)
    + text("b") + tensor((4,), storage="HalfStorage", key="1", numel=4)
    + text("b.part") + tensor((2,), (2,), 1, 4, "HalfStorage", "1") + b"u."
)  # fmt: skip
NASTY_BYTES = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"R", b"(", b"t", b".", b"Q", b"\x81", b"\x93", b"\x82\x01", b"b", b"2", b"0", b"N", b"q\x01",
    b"h\x01", b"X\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"K\xff", b"PK\5\6", b"PK\1\2", b"\xff" * 8, b"\0" * 8, b"](" * 2000, b")\x85" * 2000,
]  # fmt: skip


def mutate_pickle(dice: random.Random, data: bytes) -> bytes:
    """Instructions are dropped, doubled, exchanged and replaced, so that most of what comes out is still a pickle."""
    places = [place for _, _, place in pickletools.genops(data) if place is not None]
    parts = [data[begin:end] for begin, end in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place, action = dice.randrange(len(parts)), dice.randrange(5)
        if action == 0:
            del parts[place]
        elif action == 1:
            parts.insert(place, parts[dice.randrange(len(parts))])
        elif action == 2:
            other = dice.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif action == 3:
            parts[place] = dice.choice(NASTY_BYTES)
        else:
            parts.insert(place, dice.choice(NASTY_BYTES))
        if not parts:
            break
    return b"".join(parts)


def hostile_torch_file(dice: random.Random) -> bytes:
    kind = dice.randrange(8)
    if kind < 3:
        return zip_file(mutate_pickle(dice, PICKLE), STORAGES)
    if kind == 3:
        return zip_file(mutate_bytes(dice, PICKLE), STORAGES)
    if kind == 4:
        return mutate_bytes(dice, zip_file(PICKLE, STORAGES))
    stream = stream_file(PICKLE, {"0": FLOATS}, numel=6) + (4).to_bytes(8, "little") + FLOATS[:8]
    stream = stream.replace(b"]q\x00X\x01\x00\x00\x000q\x01a.", b"](" + text("0") + text("1") + b"e.")
    if kind == 5:
        return mutate_bytes(dice, stream)
    place = stream.index(PICKLE)
    return stream[:place] + mutate_pickle(dice, PICKLE) + stream[place + len(PICKLE) :]


def opened(path: Path, describe: Callable[[], str]) -> DiskCheckpoint | None:
    """The checkpoint, or None where it was refused as it should be; memory is traced by the caller."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        checkpoint = open_folder(path)
    except CheckpointError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} for {describe()}") from error
    else:
        message = ""
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak < ALLOWED_BYTES, f"{peak:,} bytes for {describe()}"
    if not message:
        return checkpoint
    assert str(path) in message
    assert len(message) < 1500 + len(str(path)), describe()
    message.encode()
    return None
