"""Tens of thousands of damaged weight files and indexes: each is refused as one, or read; nothing else comes out.

What is accepted must also be accepted by the safetensors library, with the same names and shapes, and every tensor must be readable.
"""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from modelglue.checkpoint import SafetensorsCheckpoint
from modelglue.errors import CheckpointError
from tests.checkpoint.files import weight_file

FILES = 30_000
INDEXES = 6_000
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


def opened(path: Path, describe: Callable[[], str]) -> SafetensorsCheckpoint | None:
    """The checkpoint, or None where it was refused as it should be."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        return SafetensorsCheckpoint(path)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < 1500 + len(str(path)), describe()
        message.encode()
        return None
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} for {describe()}") from error
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < ALLOWED_BYTES, f"{peak:,} bytes for {describe()}"


@pytest.fixture
def traced() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_damaged_files(seed: int, tmp_path: Path, traced: None) -> None:
    dice = random.Random(seed)
    path = tmp_path / "model.safetensors"
    accepted = 0
    for _ in range(FILES // 3):
        data = hostile_file(dice)
        path.write_bytes(data)
        checkpoint = opened(path, lambda: f"seed {seed}: {data[:2000]!r}")  # noqa: B023 - called at once
        if checkpoint is None:
            continue
        accepted += 1
        for name in checkpoint.names():
            assert checkpoint.tensor(name).shape == checkpoint.info(name).shape
        try:
            with safe_open(path, framework="pt") as library:
                theirs = {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise AssertionError(f"the library refuses what we accept: {data!r}") from error
        assert theirs == {name: checkpoint.info(name).shape for name in checkpoint.names()}
    print(f"seed {seed}: {accepted} of {FILES // 3} mutations were harmless", flush=True)
    assert 0 < accepted < FILES // 6, "mutations that are all refused, or all harmless, test nothing"


@pytest.mark.soak
def test_damaged_indexes(tmp_path: Path, traced: None) -> None:
    dice = random.Random(7)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in SHARDS.items():
        (folder / name).write_bytes(data)
    accepted = 0
    for _ in range(INDEXES):
        index = hostile_index(dice)
        (folder / "model.safetensors.index.json").write_bytes(index)
        checkpoint = opened(folder, lambda: repr(index[:2000]))  # noqa: B023 - called at once
        if checkpoint is not None:
            accepted += 1
            assert checkpoint.names() == ("a", "b")
            assert checkpoint.read("a").numpy().tobytes() == DATA[:4]
    print(f"{accepted} of {INDEXES} mutations of the index were harmless", flush=True)
    assert 0 < accepted < INDEXES // 2
