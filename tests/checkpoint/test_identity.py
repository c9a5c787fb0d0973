"""Identity is of the content, all of it; a stamp is of the files and cheap."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.formats.side_files import TEXT_FILES
from modelglue.checkpoint.identity import _STEP, tensor_digest
from modelglue.settings import cache_dir
from tests.checkpoint.files import randn, write_model, write_single

TENSORS = {"a": randn(50, 20), "b": randn(7, dtype=torch.bfloat16), "ids": torch.arange(9)}
CONFIG = {"model_type": "x", "size": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_single(tmp_path / "model", TENSORS, config=CONFIG)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def identity(path: Path) -> str:
    return SafetensorsCheckpoint(path).identity


def one_byte_in_the_middle(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def config_value(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "size": 4}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ }")


def tensor_name(folder: Path) -> None:
    write_single(folder, {("c" if name == "b" else name): value for name, value in TENSORS.items()})


def tensor_shape(folder: Path) -> None:
    write_single(folder, {**TENSORS, "a": TENSORS["a"].view(20, 50)})


def tensor_dtype(folder: Path) -> None:
    write_single(folder, {**TENSORS, "ids": TENSORS["ids"].view(torch.float64)})


def one_tensor_more(folder: Path) -> None:
    write_single(folder, {**TENSORS, "more": torch.empty(0)})


CHANGES: list[Callable[[Path], None]] = [
    one_byte_in_the_middle, config_value, no_config, tokenizer, tensor_name, tensor_shape, tensor_dtype, one_tensor_more,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_identity_and_stamp_change_with_the_content(change: Callable[[Path], None], folder: Path) -> None:
    before, stamp = identity(folder), SafetensorsCheckpoint(folder).stamp
    change(folder)
    assert identity(folder) != before
    assert SafetensorsCheckpoint(folder).stamp != stamp


READ_BY_TOKENIZERS = [name for name in TEXT_FILES if name != "generation_config.json"]


@pytest.mark.parametrize("name", READ_BY_TOKENIZERS)
def test_every_file_that_changes_how_text_is_read_counts(name: str, folder: Path) -> None:
    (folder / name).write_text("[1]")
    before = identity(folder)
    (folder / name).write_text("[2]")
    assert identity(folder) != before


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "training_args.bin"])
def test_other_files_do_not_count(name: str, folder: Path) -> None:
    before = identity(folder)
    (folder / name).write_text("x")
    assert identity(folder) == before


def test_identity_is_unaffected_by_path_shards_spacing_and_order(folder: Path, tmp_path: Path) -> None:
    before = identity(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert identity(moved) == before
    sharded = write_model(
        tmp_path / "sharded",
        {
            "model-00001-of-00002.safetensors": {"b": TENSORS["b"]},
            "model-00002-of-00002.safetensors": {k: TENSORS[k] for k in ("a", "ids")},
        },
        index=True,
    )
    (sharded / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items())), indent=7))
    shutil.copy(folder / "tokenizer.json", sharded)
    assert identity(sharded) == before
    assert TensorsCheckpoint(TENSORS, CONFIG, {"tokenizer.json": folder / "tokenizer.json"}).identity == before


def test_identity_is_remembered_by_stamp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(folder)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights are read again")

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "read", refuse)
        assert identity(folder) == before
        os.utime(folder / "model.safetensors", ns=(1, 1))
        with pytest.raises(AssertionError, match="read again"):
            identity(folder)
    assert identity(folder) == before


@pytest.mark.parametrize("text", ["", "short", "x" * 65, "\udcff" * 64])
def test_broken_memory_is_not_believed(text: str, folder: Path) -> None:
    before = identity(folder)
    (memory,) = (cache_dir() / "identities").rglob(SafetensorsCheckpoint(folder).stamp)
    assert memory.read_text() == before
    memory.write_text(text, errors="surrogateescape")
    assert identity(folder) == before
    assert memory.read_text() == before


def test_cache_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = identity(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "file" / "cache"))
    assert identity(folder) == expected


def test_stamp_changes_with_size_time_inode_and_path(folder: Path, tmp_path: Path) -> None:
    def stamp(path: Path = folder) -> str:
        return SafetensorsCheckpoint(path).stamp

    found = [stamp()]
    assert stamp() == found[0]
    status = (folder / "config.json").stat()
    os.utime(folder / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found.append(stamp())
    os.link(folder / "config.json", folder / "kept")  # its inode is not given away again
    (folder / "new").write_bytes((folder / "config.json").read_bytes())
    status = (folder / "config.json").stat()
    (folder / "new").replace(folder / "config.json")
    os.utime(folder / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    found.append(stamp())
    found.append(stamp(folder / "model.safetensors"))
    folder.rename(tmp_path / "renamed")
    found.append(stamp(tmp_path / "renamed"))
    assert len(set(found)) == 5


def test_stamp_is_of_the_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = SafetensorsCheckpoint(folder).stamp
    monkeypatch.chdir(folder.parent)
    assert SafetensorsCheckpoint(Path(folder.name)).stamp == absolute


def test_digest_of_a_tensor_is_of_its_bytes_whatever_the_steps() -> None:
    values = torch.arange(_STEP + 3, dtype=torch.int32)
    assert tensor_digest(TensorsCheckpoint({"t": values}), "t") == hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert tensor_digest(TensorsCheckpoint({"t": torch.empty(0)}), "t") == hashlib.sha256(b"").hexdigest()


def test_identity_of_a_known_model_is_frozen() -> None:
    """It names scores and statistics that were stored long ago."""
    checkpoint = TensorsCheckpoint({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3], dtype=torch.int8)}, {"model_type": "x"})
    assert checkpoint.identity == "c2ce29a14ef9bb7a25155f7cc5046378822ec1b496ccaee7fc87f4c25e2a3281"
