"""Dtypes in torch's words, and checkpoints held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.identity import content_identity
from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
#: recipe spelling -> safetensors spelling of the dtypes that a merge may store
STORE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name ("BF16" -> torch.bfloat16)."""
    import torch

    if name not in _TORCH_NAMES:
        raise CheckpointError(f"dtype {name} packs several numbers into a byte and is not read. Dequantise the model first.")
    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    text = str(dtype).removeprefix("torch.")
    return next(name for name, known in _TORCH_NAMES.items() if known == text)


class TensorsCheckpoint(Checkpoint):
    """Tensors that are already in memory, as a checkpoint; they are not copied and must not be changed afterwards."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, SideFile] | None = None,
        label: str = "memory",
    ) -> None:
        self._tensors = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
        self._config = dict(config or {})
        self._files = dict(files or {})
        self._label = label

    def __repr__(self) -> str:
        return f"TensorsCheckpoint({self._label!r})"

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._find(name)
        return TensorInfo(tuple(tensor.shape), dtype_name(tensor.dtype))

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        view = self._find(name).view(-1)[start:stop]
        return view if out is None else out.copy_(view)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def files(self) -> Mapping[str, SideFile]:
        return self._files

    @cached_property
    def identity(self) -> str:
        return content_identity(self, None)

    @property
    def stamp(self) -> str:
        return hashlib.sha256(self.identity.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"model": self._label}

    def _find(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._label}: has no tensor '{name}'.{did_you_mean(name, self._tensors)}") from None
