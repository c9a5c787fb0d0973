"""The common part of views that change something about a checkpoint and serve the rest as it is."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo

if TYPE_CHECKING:
    import torch


class OverCheckpoint(Checkpoint):
    """Everything is the source's; a view says in `_changes` what it changes, which is part of its stamp and identity."""

    _source: Checkpoint

    @abstractmethod
    def _changes(self) -> Any:
        """JSON-ready: what this view changes."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._source!r})"

    def names(self) -> Sequence[str]:
        return self._source.names()

    def sources(self) -> Sequence[Checkpoint]:
        return self._source.sources()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._source.read(name, start, stop, out)

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        return self._source.origins(name)

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        return self._source.pieces(name, limit)

    def splittable(self, name: str) -> bool:
        return self._source.splittable(name)

    def computed(self, name: str) -> bool:
        return self._source.computed(name)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        self._source.prepare(names)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._source.config

    @property
    def files(self) -> Mapping[str, SideFile]:
        return self._source.files

    @property
    def hub_id(self) -> str | None:
        return self._source.hub_id

    @property
    def identity(self) -> str:
        return digest([self._source.identity, self._changes()])

    @property
    def stamp(self) -> str:
        return digest([self._source.stamp, self._changes()])

    def describe(self) -> dict[str, Any]:
        return self._source.describe()


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def updated(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `changes`, objects field by field; the order of fields is kept."""
    new = dict(config)
    for key, value in changes.items():
        old = new.get(key)
        new[key] = updated(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return new
