"""Small merges of models on disk, with everything that a real folder has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from modelglue.checkpoint import Checkpoint, MergedCheckpoint, SafetensorsCheckpoint, open_checkpoint
from modelglue.methods import get
from tests.checkpoint.files import randn, write_single

#: in the order of nobody's sorting, with a field that no program knows, and a number that is written in more than one way
CONFIG = {
    "model_type": "nobody-knows", "architectures": ["NobodyKnows"], "zeta": {"b": [1, None, True], "a": 1e-05}, "größe": "ß",
    "torch_dtype": "bfloat16", "alpha": 0.1, "limit": float("inf"),
}  # fmt: skip
#: no program would write it like this, so that whoever parses and writes it again is found out
TOKENIZER = b'{"model" : {"vocab":\r\n\t{"\xc3\xa4" :1,"a":  0}}}\n\n'

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (61, 40),
    **{f"layers.{n}.proj.weight": (40, 37) for n in range(4)},
    **{f"layers.{n}.norm": (40,) for n in range(4)},
    "scale": (),
    "empty": (0, 3),
}


def write_model_folder(folder: Path, seed: int, *, dtype: torch.dtype = torch.bfloat16, scale: float = 0.1) -> Path:
    """A base plus a small step of its own; seed 0 is the base. The integer tensor is the same in all."""
    tensors = {name: randn(*shape, seed=number) for number, (name, shape) in enumerate(SHAPES.items(), 100)}
    if seed:
        tensors = {name: base + scale * randn(*base.shape, seed=1000 * seed + n) for n, (name, base) in enumerate(tensors.items())}
    stored: dict[str, Any] = {name: values.to(dtype) for name, values in tensors.items()}
    write_single(folder, {**stored, "position_ids": torch.arange(50)})
    (folder / "config.json").write_text(json.dumps(CONFIG, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / "notes.txt").write_text("not a file of the model")
    return folder


def write_zoo(folder: Path, models: int = 3, **options: Any) -> list[SafetensorsCheckpoint]:
    """[base, model 1, ..., model n], written and opened."""
    return [SafetensorsCheckpoint(write_model_folder(folder / f"m{seed}", seed, **options)) for seed in range(models + 1)]


def merge_of(
    zoo: list[Any], method_id: str = "ties", *, store: str | None = None, seed: int = 0, each: dict[str, float] | None = None, **shared: Any
) -> MergedCheckpoint:
    """`method_id` over all but the first of `zoo`, on the first where the method takes a base."""
    method = get(method_id)
    base, *models = zoo
    given = {"weight": 0.5, "density": 0.6, **(each or {})}
    known = {parameter.name for parameter in method.parameters}
    own: list[dict[str, Any]] = [{name: value for name, value in given.items() if name in known} for _ in models]
    parameters, faults = method.resolve(shared, own, [f"model{n}" for n in range(1, len(models) + 1)])
    assert faults == []
    labels = [f"model{n}" for n in range(1, len(models) + 1)]
    return MergedCheckpoint(method, models, base if method.needs_base else None, parameters, labels=labels, store=store, seed=seed)


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def reopened(zoo: list[SafetensorsCheckpoint]) -> list[Checkpoint]:
    """As another process sees it: nothing remembered."""
    return [open_checkpoint(checkpoint.path) for checkpoint in zoo]
