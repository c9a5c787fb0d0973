"""Adapter folders written by hand, and what they should do to a weight, in plain words of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.checkpoint.files import randn

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], /, *, prefix: str = PREFIX, **config: Any) -> Path:
    """Weights under PEFT's prefix, and a config with r = 4 and lora_alpha = r unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: values.contiguous() for name, values in tensors.items()}, folder / "adapter_model.safetensors")
    write_config(folder, **config)
    return folder


def write_config(folder: Path, **config: Any) -> None:
    rank = config.get("r", 4)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}))


def linear(module: str, out: int, into: int, rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The factors of one linear layer."""
    A, B = randn(rank, into, seed=seed).to(dtype), randn(out, rank, seed=seed + 100).to(dtype)
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}


def update(tensors: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    """B A of one linear layer, in float64."""
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
