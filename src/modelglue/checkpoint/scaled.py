"""Tensors times a number, computed when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from modelglue.checkpoint.protocol import FLOATING, Checkpoint
from modelglue.checkpoint.vocabulary.over import OverCheckpoint
from modelglue.errors import CheckpointError, did_you_mean
from modelglue.settings import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch


@final
class ScaledCheckpoint(OverCheckpoint):
    """Another checkpoint with some tensors multiplied by a factor each: in float32 (float64 tensors in float64), rounded once.

    CheckpointError for a tensor that is not there or not stored as floating-point numbers, and for a factor that is not finite.
    Reading costs one multiplication per element.
    """

    def __init__(self, source: Checkpoint, factors: Mapping[str, float]) -> None:
        known = set(source.names())
        for name, factor in factors.items():
            if name not in known:
                raise CheckpointError(f"'{name}' should be scaled, but the source does not have it.{did_you_mean(name, known)}")
            dtype = source.info(name).dtype
            if dtype not in FLOATING:
                raise CheckpointError(
                    f"'{name}' should be scaled, but is stored as {dtype}; allowed are {', '.join(sorted(FLOATING))}. "
                    "Dequantise the model first."
                )
            if not math.isfinite(factor):
                raise CheckpointError(f"'{name}' should be multiplied by {factor}; allowed is a finite factor.")
        self._source = source
        self._factors = {name: float(factors[name]) for name in sorted(factors) if factors[name] != 1}

    def _changes(self) -> Any:
        return {"scale": self._factors}

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        factor = self._factors.get(name)
        if factor is None:
            return self._source.read(name, start, stop, out)
        if out is not None:
            stop = self.info(name).numel if stop is None else stop
            for at in range(start, stop, CHUNK_ELEMENTS):  # what is in between stays in the cache
                end = min(at + CHUNK_ELEMENTS, stop)
                out[at - start : end - start].copy_(self.read(name, at, end))
            return out
        stored = self._source.read(name, start, stop)
        return (stored.to(torch.promote_types(stored.dtype, torch.float32)) * factor).to(stored.dtype)

    def computed(self, name: str) -> bool:
        return name in self._factors or self._source.computed(name)

    def working_bytes(self, name: str, elements: int) -> int:
        own = 2 * 8 * elements if name in self._factors else 0
        return own + self._source.working_bytes(name, elements)

    def describe(self) -> dict[str, Any]:
        return {"scale": dict(self._factors), "of": self._source.describe()}
