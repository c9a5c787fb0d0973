"""What an expert's tensors go through on their way into a mixture: noise, a factor, another dtype. And tensors made of nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from modelglue.checkpoint import FLOATING, Checkpoint, TensorInfo, TensorsCheckpoint, torch_dtype
from modelglue.checkpoint.vocabulary.over import OverCheckpoint

if TYPE_CHECKING:
    import torch


@final
class FinishedCheckpoint(OverCheckpoint):
    """Another checkpoint's tensors plus normal noise, times a factor, in another dtype: computed in float32, rounded once.

    `noise` is the standard deviation of what is added to every element, a function of (seed, stream, tensor name, position); `factors`
    multiplies some tensors afterwards; `dtype` is what floating-point tensors are served in (None: as they are stored).
    """

    def __init__(
        self,
        source: Checkpoint,
        *,
        dtype: str | None = None,
        noise: float = 0.0,
        seed: int = 0,
        stream: int = 0,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._noise, self._seed, self._stream = noise, seed, stream
        self._factors = {name: factor for name, factor in sorted((factors or {}).items()) if factor != 1}

    def _changes(self) -> Any:
        return [self._dtype, self._noise and [self._noise, self._seed, self._stream], self._factors]

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        return TensorInfo(info.shape, self._dtype) if self._dtype is not None and info.dtype in FLOATING else info

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        if not self._changed(name):
            return self._source.read(name, start, stop, out)
        stored = self._source.read(name, start, stop)
        wanted = torch_dtype(self.info(name).dtype)
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        if self._noise:
            wide = wide + self._noise * normals(self._seed, name, self._stream, start, start + len(stored))
        if (factor := self._factors.get(name)) is not None:
            wide = wide * factor
        return wide.to(wanted) if out is None else out.copy_(wide)

    def computed(self, name: str) -> bool:
        return self._changed(name) or self._source.computed(name)

    def working_bytes(self, name: str, elements: int) -> int:
        return (6 if self._noise else 2) * 8 * elements * self._changed(name) + self._source.working_bytes(name, elements)

    def _changed(self, name: str) -> bool:
        info = self._source.info(name)
        return info.dtype in FLOATING and (bool(self._noise) or name in self._factors or self._dtype not in (None, info.dtype))


def normals(seed: int, name: str, stream: int, start: int, stop: int) -> torch.Tensor:
    """Standard normal numbers for the flat positions start..stop: float32 [stop - start], a function of the arguments (Box-Muller)."""
    from modelglue.checkpoint.engine.uniform import uniforms

    length = uniforms(seed, name, 2 * stream, start, stop)
    angle = uniforms(seed, name, 2 * stream + 1, start, stop)
    return (-2 * (1 - length).log()).sqrt() * (angle * (2 * math.pi)).cos()


@final
class MadeCheckpoint(TensorsCheckpoint):
    """Small tensors that come from no model (gates), and zeros of any size, which take no memory. No parents, so no sources."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], zeros: Mapping[str, TensorInfo] | None = None) -> None:
        super().__init__(tensors, label="made")
        self._zeros = dict(zeros or {})

    def names(self) -> Sequence[str]:
        return tuple(sorted([*super().names(), *self._zeros]))

    def info(self, name: str) -> TensorInfo:
        return self._zeros.get(name) or super().info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        if name not in self._zeros:
            return super().read(name, start, stop, out)
        if out is not None:
            return out.zero_()
        info = self._zeros[name]
        return torch.zeros((info.numel if stop is None else stop) - start, dtype=torch_dtype(info.dtype))

    def sources(self) -> Sequence[Checkpoint]:
        return ()

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        return ()

    @property
    def identity(self) -> str:
        """Of the made tensors' bytes, and of the zeros' names and shapes: zeros are not read for it."""
        import torch

        digest = hashlib.sha256(repr(sorted(self._zeros.items())).encode())
        for name in super().names():
            digest.update(f"\0{name}\0{self.info(name)}\0".encode() + self.read(name).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def stamp(self) -> str:
        return self.identity
