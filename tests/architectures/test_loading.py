"""Merges of many architectures, none of which is listed anywhere, load in transformers and compute what a merge by hand does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from modelglue.checkpoint import open_checkpoint, save
from modelglue.models import load_into, load_live
from modelglue.recipe import merge
from tests.architectures.tiny import ARCHITECTURES, Architecture

WEIGHTS = (0.3, 0.7)


def header(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of a folder with one weight file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


def by_hand(architecture: Architecture, models: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighted sum of live models, parameter by parameter. Buffers are functions of the config."""
    merged = architecture.random(99)
    places = dict(merged.named_parameters())
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(sum(weight * dict(model.named_parameters())[name] for weight, model in zip(weights, models, strict=True)))
    return merged


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merge_loads_and_computes_what_a_merge_by_hand_does(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    parents = [architecture.saved(tmp_path / f"parent{seed}", seed) for seed in (1, 2)]
    models = [{"model": str(parent), "weight": weight} for parent, weight in zip(parents, WEIGHTS, strict=True)]
    merged = merge({"method": "linear", "models": models})
    out = tmp_path / "out"
    save(merged, out)

    assert header(out) == header(parents[0])
    loaded = architecture.loaded(out)
    logits = architecture.logits(loaded)
    hand = architecture.logits(by_hand(architecture, [architecture.loaded(parent) for parent in parents], WEIGHTS))
    torch.testing.assert_close(logits, hand, rtol=1e-4, atol=1e-4)
    for parent in parents:  # the comparison can fail: the parents are far from it
        assert float((architecture.logits(architecture.loaded(parent)) - logits).abs().max()) > 0.05

    live = architecture.random(7)
    load_into(merged, live)
    assert torch.equal(architecture.logits(live), logits)
    assert torch.equal(architecture.logits(load_live(merged)), logits)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5", "bert", "qwen3_moe", "llava"])
def test_half_precision_is_kept_and_rounded_once(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    parents = [architecture.saved(tmp_path / f"parent{seed}", seed, torch.bfloat16) for seed in (1, 2)]
    models = [{"model": str(parent), "weight": 0.5} for parent in parents]
    save(merge({"method": "linear", "models": models}), tmp_path / "out")
    a, b, out = (open_checkpoint(folder) for folder in (*parents, tmp_path / "out"))
    assert out.names() == a.names()
    for tensor in out.names():
        assert out.info(tensor) == a.info(tensor)
        if a.info(tensor).dtype == "BF16":
            mean = (a.tensor(tensor).float() * 0.5 + b.tensor(tensor).float() * 0.5).to(torch.bfloat16)
            assert torch.equal(out.tensor(tensor), mean), tensor
    architecture.loaded(tmp_path / "out")
