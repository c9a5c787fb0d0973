"""The state of a run on disk: weights, moments and the number of steps, from which a killed run continues with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelglue.checkpoint import write_bytes_atomic

if TYPE_CHECKING:
    import torch

_FILE = "state.safetensors"


class RunState:
    """Of one output folder; states of another `key` (other inputs or settings) are not believed."""

    def __init__(self, out: Path, key: str) -> None:
        self._folder = out.with_name(f".{out.name}.training")
        self._key = key

    def write(self, step: int, losses: list[float], values: Mapping[str, torch.Tensor]) -> None:
        """Memory: one more copy of the values."""
        from safetensors.torch import save

        self._folder.mkdir(parents=True, exist_ok=True)
        about = {"key": self._key, "step": str(step), "losses": json.dumps(losses)}
        write_bytes_atomic(self._folder / _FILE, save({name: value.contiguous().cpu() for name, value in values.items()}, about))

    def read(self) -> tuple[int, list[float], dict[str, torch.Tensor]] | None:
        """What was written last for these inputs; None for nothing, or for what cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / _FILE, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self._key:
                    return None
                return int(about["step"]), json.loads(about["losses"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
