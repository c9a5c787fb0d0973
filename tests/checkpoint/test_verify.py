"""`verify`: every way in which a folder may no longer be what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelglue.checkpoint import TensorInfo
from modelglue.checkpoint.output.verify import read_record, verify
from modelglue.errors import CheckpointError, UserError
from tests.checkpoint.outputs import WEIGHTS, read_raw, write_output, write_record

NAMES = sorted(WEIGHTS)


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    weights = {**WEIGHTS, **changes}
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


def test_an_untouched_output(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out")
    seen: list[tuple[int, int]] = []
    found = verify(folder, progress=lambda done, total: seen.append((done, total)))
    size = sum(value.nbytes for value in WEIGHTS.values())
    assert (found.tensors, found.bytes, found.faults) == (4, size, ())
    assert seen[-1] == (size, size)
    assert verify(folder, quick=True).faults == ()


def test_the_record_that_is_read(tmp_path: Path) -> None:
    record = read_record(write_output(tmp_path / "out"))
    assert record.recipe == hashlib.sha256(b"method: linear\n").hexdigest()
    assert sorted(record.tensors) == NAMES
    digest = hashlib.sha256((7).to_bytes(8, "little")).hexdigest()
    assert record.tensors["model.layers.1.w"] == (TensorInfo((), "I64"), digest)


@given(position=st.integers(0, 60 * 2 + 30 * 4 + 8 - 1), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_any_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    folder = write_output(tmp_path_factory.mktemp("bits") / "out")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) - 248 + position] ^= 1 << bit
    path.write_bytes(bytes(data))
    assert [fault for _, fault in verify(folder).faults] == ["holds other numbers than were written"]
    assert verify(folder, quick=True).faults == ()


@pytest.mark.parametrize("workers", [1, 2])
def test_all_damaged_tensors_are_listed(tmp_path: Path, workers: int) -> None:
    folder = write_output(tmp_path / "out")
    rewrite(folder, {"model.embed.weight": WEIGHTS["model.embed.weight"] + 1, "model.layers.1.w": torch.full((), 8)})
    assert verify(folder, workers=workers).faults == (
        ("model.embed.weight", "holds other numbers than were written"),
        ("model.layers.1.w", "holds other numbers than were written"),
    )


@pytest.mark.parametrize("quick", [False, True])
def test_what_headers_tell(tmp_path: Path, quick: bool) -> None:
    folder = write_output(tmp_path / "out")
    rewrite(
        folder,
        {
            "model.layers.0.w": None, "extra": torch.zeros(1), "model.norm": torch.zeros(4, 0),
            "model.layers.1.w": torch.full((), 7, dtype=torch.int32),
        },
    )  # fmt: skip
    (folder / "modelglue_recipe.yaml").write_text("method: ties\n")
    found = verify(folder, quick=quick)
    assert found.faults == (
        ("modelglue_recipe.yaml", "is not the recipe that the output was made by"),
        ("model.layers.0.w", "is missing"),
        ("extra", "is not in the record"),
        ("model.layers.1.w", "is I32 of no dimensions, recorded as I64 of no dimensions"),
        ("model.norm", "is F32 of 4 x 0, recorded as F32 of 0 x 4"),
    )
    (folder / "modelglue_recipe.yaml").unlink()
    assert verify(folder, quick=quick).faults[0] == ("modelglue_recipe.yaml", "is missing")


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    ((name, fault),) = verify(folder).faults
    assert name == "out"
    assert "model.safetensors" in fault


def test_no_record(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out")
    (folder / "modelglue_record.json").unlink()
    with pytest.raises(UserError, match=r"holds no modelglue_record\.json.*write it again"):
        verify(folder)


def _without_format(value: dict[str, Any]) -> Any:
    del value["format"]
    return value


def _of_another_format(value: dict[str, Any]) -> Any:
    return {**value, "format": "modelglue-record/9"}


def _with_a_short_hash(value: dict[str, Any]) -> Any:
    value["tensors"]["model.norm"]["sha256"] = "abc"
    return value


def _with_a_number_for_a_hash(value: dict[str, Any]) -> Any:
    return {**value, "recipe": 7}


def _with_a_text_for_a_shape(value: dict[str, Any]) -> Any:
    value["tensors"]["model.norm"]["shape"] = ["x"]
    return value


@pytest.mark.parametrize(
    "change",
    [
        _without_format,
        _of_another_format,
        _with_a_short_hash,
        _with_a_number_for_a_hash,
        _with_a_text_for_a_shape,
        lambda _: [],
        lambda _: 3,
    ],
)
def test_records_that_are_none(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    folder = write_output(tmp_path / "out")
    write_record(folder, change(read_raw(folder)))
    with pytest.raises(CheckpointError, match=r"modelglue_record\.json: is no record of an output"):
        verify(folder)


def test_a_record_that_is_no_json(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out")
    (folder / "modelglue_record.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="is no record of an output"):
        verify(folder)
