"""Output folders with a record, made without us: weights by the safetensors library, hashes by hashlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modelglue.checkpoint.tensors import dtype_name

WEIGHTS: Mapping[str, torch.Tensor] = {
    "model.embed.weight": torch.arange(60, dtype=torch.float32).view(12, 5).bfloat16(),
    "model.layers.0.w": torch.arange(30, dtype=torch.float32).view(5, 6),
    "model.layers.1.w": torch.full((), 7, dtype=torch.int64),
    "model.norm": torch.zeros(0, 4),
}


def write_output(folder: Path, weights: Mapping[str, torch.Tensor] = WEIGHTS, *, recipe: str = "method: linear\n") -> Path:
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "README.md").write_text("# A model\n")
    (folder / "modelglue_recipe.yaml").write_text(recipe)
    tensors = {
        name: {
            "dtype": dtype_name(value.dtype), "shape": list(value.shape),
            "sha256": hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        }
        for name, value in weights.items()
    }  # fmt: skip
    write_record(folder, {"format": "modelglue-record/1", "recipe": hashlib.sha256(recipe.encode()).hexdigest(), "tensors": tensors})
    return folder


def write_record(folder: Path, value: Any) -> None:
    (folder / "modelglue_record.json").write_text(json.dumps(value))


def read_raw(folder: Path) -> Any:
    return json.loads((folder / "modelglue_record.json").read_text())
