"""A short run of what `make soak` does at length: damaged weight files are refused by name, or read; little is allocated for them."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import Checkpoint
from modelglue.checkpoint.protocol import PACKED_BITS
from tests.checkpoint.files import names_in, weight_file
from tests.checkpoint.mutations import (
    DATA,
    FLOATS,
    HEADER,
    PICKLE,
    SHARDS,
    STORAGES,
    hostile_file,
    hostile_index,
    hostile_torch_file,
    opened,
)
from tests.checkpoint.torch_files import zip_file

#: damaged files that one example writes
EACH = 15


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    for name, data in SHARDS.items():
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / name).write_bytes(data)
    tracemalloc.start()
    yield folder
    tracemalloc.stop()
    assert names_in(folder) == ["file.bin", "file.safetensors", "model"]


def read_all(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        if checkpoint.info(name).dtype not in PACKED_BITS:  # these are described, and refused when they are read
            assert checkpoint.tensor(name).shape == checkpoint.info(name).shape


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_safetensors_files(seed: int, place: Path) -> None:
    dice = random.Random(seed)
    path = place / "file.safetensors"
    for _ in range(EACH):
        data = hostile_file(dice)
        path.write_bytes(data)
        checkpoint = opened(path, lambda: repr(data[:2000]))  # noqa: B023 - called at once
        if checkpoint is not None:
            read_all(checkpoint)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_indexes(seed: int, place: Path) -> None:
    dice = random.Random(seed)
    for _ in range(EACH):
        index = hostile_index(dice)
        (place / "model" / "model.safetensors.index.json").write_bytes(index)
        checkpoint = opened(place / "model", lambda: repr(index[:2000]))  # noqa: B023 - called at once
        if checkpoint is not None:
            assert checkpoint.names() == ("a", "b")
            assert checkpoint.read("a").numpy().tobytes() == DATA[:4]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_torch_files(seed: int, place: Path) -> None:
    dice = random.Random(seed)
    path = place / "file.bin"
    for _ in range(EACH):
        data = hostile_torch_file(dice)
        path.write_bytes(data)
        checkpoint = opened(path, lambda: repr(data[:2000]))  # noqa: B023 - called at once
        if checkpoint is not None:
            read_all(checkpoint)


def test_what_is_damaged_was_healthy(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for name, data, count in (("m.safetensors", weight_file(HEADER, DATA), 5), ("m.bin", zip_file(PICKLE, STORAGES), 4)):
            (tmp_path / name).write_bytes(data)
            checkpoint = opened(tmp_path / name, lambda: name)  # noqa: B023 - called at once
            assert checkpoint is not None
            assert len(checkpoint.names()) == count
    finally:
        tracemalloc.stop()
    assert checkpoint is not None
    assert checkpoint.read("a.weight").numpy().tobytes() == FLOATS
    assert checkpoint.read("b.part").numpy().tobytes() == FLOATS[2:4] + FLOATS[6:8]
