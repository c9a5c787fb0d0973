"""Stacks of layers of real classes load: nothing missing, nothing left over, whatever the model calls its layers and their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import open_checkpoint, save
from modelglue.recipe import build_with_warnings, read_recipe
from modelglue.recipe.layers import towers_of
from tests.architectures.tiny import ARCHITECTURES


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt_neox", "gpt2", "mamba", "t5", "whisper", "bert", "llava", "qwen2_vl"])
def test_one_layer_more_in_every_tower(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    reference = str(architecture.saved(tmp_path / "model", 0))
    source = open_checkpoint(reference)
    towers = [tower for tower in towers_of(source.names(), source.config) if tower.count]

    def slices(count: int) -> list[dict[str, Any]]:
        return [{"models": [{"model": reference, "layers": layers}]} for layers in ([0, count], [count - 1, count])]

    value: dict[str, Any] = {"method": "passthrough"}
    if len(towers) == 1:
        value["slices"] = slices(towers[0].count)
    else:
        value["modules"] = {tower.name: {"slices": slices(tower.count)} for tower in towers}
    built = build_with_warnings(read_recipe(value), open_checkpoint)
    save(built.checkpoint, tmp_path / "out")
    assert [text for text in built.warnings if "projector" not in text] == []
    more = {name for tower in towers for name in built.checkpoint.names() if tower.number_of(name) == tower.count}
    assert len(built.checkpoint.names()) == len(source.names()) + len(more)
    assert len(more) == sum(len(tower.layers[-1]) for tower in towers)
    assert bool(torch.isfinite(architecture.logits(architecture.loaded(tmp_path / "out"))).all())
