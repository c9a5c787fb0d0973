"""One live model that checkpoints pass through."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from modelglue.checkpoint import Checkpoint, SideFile, file_bytes
from modelglue.checkpoint.engine.workers import keep_freed_memory
from modelglue.models import LiveTextModel, load_into, load_live, load_tokenizer, places_of

if TYPE_CHECKING:
    import torch

    from modelglue.models import TextModel


class Resident(Protocol):
    """Where the model is that checkpoints pass through: a module, or an engine."""

    def holding(self, checkpoint: Checkpoint, content: str) -> TextModel:
        """It, with the weights of `checkpoint`, which `content` names."""


class ResidentModel:
    """One live model that checkpoints pass through: equal shapes are loaded in place, others take its room.

    Of a checkpoint that takes the place of another only those tensors are computed whose values differ. Memory: one model in float32 and
    its inputs' mapped pages, however many candidates are scored. `device` is where the model is ("cuda:1"; default: the CPU).
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._shape: str | None = None
        self._content: str | None = None
        self._values: dict[str, Hashable] = {}
        self._model: LiveTextModel | None = None
        self._places: Mapping[str, torch.Tensor] = {}

    def holding(self, checkpoint: Checkpoint, content: str) -> LiveTextModel:
        """The live model with the weights of `checkpoint`; `content` names them, so that the same ones are not loaded twice."""
        if self._model is None or self._content != content:
            shape = shape_of(checkpoint)
            values = {name: checkpoint.values_of(name) for name in checkpoint.names()}
            held, self._values = self._values, {}
            self._content = None  # should loading fail half-way, nothing is held
            if self._model is None or shape != self._shape:
                self._model, self._places = None, {}  # the old one goes before the new one comes
                keep_freed_memory()
                live = load_live(checkpoint)
                self._model = LiveTextModel(live if self._device is None else live.to(self._device), load_tokenizer(checkpoint))
                self._shape, self._places = shape, places_of(self._model.model)
            else:
                same = {name for name, value in values.items() if name in held and held[name] == value}
                load_into(checkpoint, self._model.model, keep=same, places=self._places)
            self._content, self._values = content, values
        return self._model


def shape_of(checkpoint: Checkpoint) -> str:
    """All that a live model is built from besides the weights: config, tensor shapes, tokenizer."""
    shapes: list[Any] = [[name, list(checkpoint.info(name).shape)] for name in checkpoint.names()]
    files = {name: _file_digest(file) for name, file in sorted(checkpoint.files.items())}
    config = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "torch_dtype")}
    return hashlib.sha256(json.dumps([shapes, files, config], sort_keys=True).encode()).hexdigest()


def _file_digest(file: SideFile) -> str:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    try:
        status = file.stat()
    except OSError:
        return hashlib.sha256(file_bytes(file)).hexdigest()  # which says what is wrong with it
    return _digest_of(file, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(1024)
def _digest_of(file: Path, *status: int) -> str:
    """Candidates share their side files, and there may be thousands of candidates."""
    return hashlib.sha256(file_bytes(file)).hexdigest()
