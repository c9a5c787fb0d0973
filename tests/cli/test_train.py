"""`modelglue train` after `modelglue stack`: what it trains where nothing is said, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from modelglue.checkpoint import SafetensorsCheckpoint
from tests.cli.conftest import Run
from tests.models.tiny import letters, saved_model


def test_an_expanded_model_is_trained(run: Run, tmp_path: Path) -> None:
    saved_model(tmp_path / "a", "llama", tokenizer=letters(), initializer_range=0.1)
    (tmp_path / "text.txt").write_text("to be or not to be. " * 30)
    assert run("stack", tmp_path / "a", "--new-layers", "1", "--out", tmp_path / "deep", "--quiet").code == 0
    tokens = ("train", tmp_path / "deep", tmp_path / "text.txt", "--context", "32", "--rate", "0.01", "--steps", "20", "--out")
    found = run(*tokens, tmp_path / "trained", "--json")
    summary = json.loads(found.out)
    assert (found.code, found.err, summary["rows"], summary["resumed_steps"]) == (0, "", 19, 0)
    assert summary["losses"][-1] < summary["losses"][0] - 0.5
    named = json.loads((tmp_path / "deep" / "trainable_tensors.json").read_text())["tensors"]
    deep, trained = (SafetensorsCheckpoint(tmp_path / name) for name in ("deep", "trained"))
    different = [name for name in deep.names() if not torch.equal(deep.tensor(name), trained.tensor(name))]
    assert different == named == summary["trained"]
    assert run("verify", tmp_path / "trained").code == 0
    assert run(*tokens, tmp_path / "trained").code == 2
    again = run(*tokens, tmp_path / "again", "--tensors", "lm_head.weight", "model.norm.weight")
    assert again.err.startswith(f"{tmp_path}/again: 2 tensors trained in 20 steps, loss ")
