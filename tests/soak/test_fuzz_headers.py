"""Tens of thousands of damaged weight files and indexes: each is refused as one, or read; nothing else comes out.

What is accepted must also be accepted by the library that writes such files, with the same names and shapes, and every tensor must be
readable.
"""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from modelglue.checkpoint.protocol import PACKED_BITS
from tests.checkpoint.files import names_in
from tests.checkpoint.mutations import DATA, SHARDS, hostile_file, hostile_index, hostile_torch_file, opened

FILES = 30_000
INDEXES = 6_000
TORCH_FILES = 30_000


def bits(value: torch.Tensor) -> bytes:
    return value.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


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
            if checkpoint.info(name).dtype not in PACKED_BITS:  # these are described, and refused when they are read
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


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_damaged_torch_files(seed: int, tmp_path: Path, traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch itself reads the file as well, without running anything, it finds the same numbers."""
    monkeypatch.chdir(tmp_path)
    dice = random.Random(seed)
    path = tmp_path / "model.bin"
    accepted = agreed = 0
    for _ in range(TORCH_FILES // 3):
        data = hostile_torch_file(dice)
        path.write_bytes(data)
        checkpoint = opened(path, lambda: f"seed {seed}: {data[:2000]!r}")  # noqa: B023 - called at once
        if checkpoint is None:
            continue
        accepted += 1
        found = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        try:
            theirs = torch.load(path, weights_only=True)
        except Exception:  # it is stricter in places, and says so in many ways
            continue
        theirs = theirs if all(isinstance(value, torch.Tensor) for value in theirs.values()) else None
        if theirs is not None:
            agreed += 1
            assert found.keys() == theirs.keys(), repr(data)
            for name, value in theirs.items():
                assert found[name].shape == value.shape, repr(data)
                assert bits(found[name]) == bits(value), repr(data)
    print(f"seed {seed}: {accepted} of {TORCH_FILES // 3} mutations were harmless, {agreed} to torch as well", flush=True)
    assert 0 < agreed <= accepted < TORCH_FILES // 6
    assert names_in(tmp_path) == ["model.bin"]
