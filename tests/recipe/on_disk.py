"""Tiny model folders on disk, written by the safetensors library and not by us."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.zoo.models import CONFIG, tensors

WORDS = ("<s>", "</s>", "a", "b", "c", "d", "e", "f")


def write_model(
    folder: Path,
    seed: int = 0,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    words: Sequence[str] | None = WORDS,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A model folder: some 400 numbers that depend on `seed` only, a config, and a tokenizer that numbers `words`."""
    folder.mkdir(parents=True)
    found = dict(weights) if weights is not None else tensors(seed, dtype=dtype)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "dtype": str(dtype).removeprefix("torch."), **config}))
    if words is not None:
        write_tokenizer(folder, {word: number for number, word in enumerate(words)})
    return folder


def write_tokenizer(folder: Path, vocab: Any, added: Sequence[Mapping[str, Any]] = ()) -> None:
    value = {"version": "1.0", "added_tokens": list(added), "model": {"type": "WordLevel", "vocab": vocab}}
    (folder / "tokenizer.json").write_text(json.dumps(value))


def write_recipe(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
