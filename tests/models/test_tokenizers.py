"""Tokenizers come from a checkpoint's own files, wherever they stand, and run no code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelglue.checkpoint import TensorsCheckpoint, open_checkpoint
from modelglue.errors import CheckpointError
from modelglue.models import has_tokenizer, load_tokenizer
from tests.models.tiny import config, letters, pieces, saved_model

_TEXT = "xabc.x\nq 12"


def test_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    found = load_tokenizer(open_checkpoint(saved_model(tmp_path / "model", "llama", tokenizer=pieces())))
    assert found(_TEXT)["input_ids"] == pieces()(_TEXT)["input_ids"]
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)


def test_the_tokenizer_of_an_expression(tmp_path: Path) -> None:
    """Its files may stand in a folder without a config, or in several."""
    saved_model(tmp_path / "a", "llama", tokenizer=pieces())
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "tokenizer_config.json").rename(tmp_path / "b" / "tokenizer_config.json")
    files = {"tokenizer.json": tmp_path / "a" / "tokenizer.json", "tokenizer_config.json": tmp_path / "b" / "tokenizer_config.json"}
    found = load_tokenizer(TensorsCheckpoint({}, config("llama"), files))
    assert found(_TEXT)["input_ids"] == pieces()(_TEXT)["input_ids"]
    assert found.eos_token == "</s>"


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    assert not has_tokenizer(open_checkpoint(folder))
    with pytest.raises(CheckpointError, match=r"model'\): has no tokenizer \(tokenizer.json or tokenizer.model\)"):
        load_tokenizer(open_checkpoint(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0", "model": {"type": "NoSuch"}}', "\0\0\0"])
def test_a_damaged_tokenizer_is_an_error(content: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama", tokenizer=letters())
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(open_checkpoint(folder))


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama", tokenizer=letters())
    trap = tmp_path / "sprung"
    (folder / "trap.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Trap: pass\n")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}}))
    try:
        found = load_tokenizer(open_checkpoint(folder))
    except CheckpointError:
        pass  # refused is as good as ignored
    else:
        assert found("abc")["input_ids"] == [1, 6, 7, 8]
    assert not trap.exists()
