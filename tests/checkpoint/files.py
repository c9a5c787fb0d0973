"""Weight files made by hand, byte by byte, so that every way to be wrong can be written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: the entry of a healthy tensor of two float32 numbers
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = bytes(range(8))


def weight_file(header: Any, data: bytes = b"") -> bytes:
    """8 bytes of length, the header (JSON, or the bytes given), the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_model(
    folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], index: Any = None, config: Mapping[str, Any] | None = None
) -> Path:
    """A model folder written by the safetensors library; `index` True makes the right one, anything else is dumped as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    if index is True:
        index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    if index is not None:
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        (folder / "model.safetensors.index.json").write_bytes(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_single(folder: Path, tensors: Mapping[str, torch.Tensor], **options: Any) -> Path:
    return write_model(folder, {"model.safetensors": tensors}, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too: relative path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
