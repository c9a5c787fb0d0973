"""Expressions that move names around and compute nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo, file_bytes
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch


class RenamedCheckpoint(Checkpoint):
    """Serves another checkpoint's tensors under new names: `names` maps new -> old.

    A tensor may be served twice (layer stacks) or not at all (a part of a model). Reading costs what the source costs.
    """

    def __init__(self, source: Checkpoint, names: Mapping[str, str], config: Mapping[str, Any] | None = None) -> None:
        known = set(source.names())
        for new, old in names.items():
            if old not in known:
                raise CheckpointError(f"'{new}' should be '{old}', which the source does not have.{did_you_mean(old, known)}")
        self._source = source
        self._old = {new: names[new] for new in sorted(names)}
        self._config = source.config if config is None else config

    def names(self) -> Sequence[str]:
        return tuple(self._old)

    def sources(self) -> Sequence[Checkpoint]:
        return self._source.sources()

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        return self._source.origins(self._find(name))

    def info(self, name: str) -> TensorInfo:
        return self._source.info(self._find(name))

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._source.read(self._find(name), start, stop, out)

    def together(self, names: Sequence[str]) -> torch.Tensor:
        return self._source.together([self._find(name) for name in names])

    def values_of(self, name: str) -> Hashable:
        return self._source.values_of(self._find(name))

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        return self._source.pieces(self._find(name), limit)

    def splittable(self, name: str) -> bool:
        return self._source.splittable(self._find(name))

    def computed(self, name: str) -> bool:
        return self._source.computed(self._find(name))

    def reads_twice(self, name: str) -> bool:
        return self._source.reads_twice(self._find(name))

    def working_bytes(self, name: str, elements: int) -> int:
        return self._source.working_bytes(self._find(name), elements)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        wanted = self._old if names is None else names
        self._source.prepare(sorted({self._find(name) for name in wanted}))

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def files(self) -> Mapping[str, SideFile]:
        return self._source.files

    @property
    def identity(self) -> str:
        return _digest([self._source.identity, self._old, dict(self._config)])

    @property
    def stamp(self) -> str:
        return _digest([self._source.stamp, self._old, dict(self._config)])

    def describe(self) -> dict[str, Any]:
        return {"rename": dict(self._old), "of": self._source.describe()}

    def _find(self, name: str) -> str:
        try:
            return self._old[name]
        except KeyError:
            raise CheckpointError(f"no tensor '{name}' here.{did_you_mean(name, self._old)}") from None


class JoinedCheckpoint(Checkpoint):
    """Several checkpoints side by side, each under its prefix ("" for none). Config and files come from the first unless they are given.

    `description` is the recipe that `describe` answers with, where the parts come from one; `donors` are what config and files were taken
    from, and are sources like the parts.
    """

    def __init__(
        self,
        parts: Mapping[str, Checkpoint] | Sequence[tuple[str, Checkpoint]],
        config: Mapping[str, Any] | None = None,
        description: Mapping[str, Any] | None = None,
        *,
        files: Mapping[str, SideFile] | None = None,
        donors: Sequence[Checkpoint] = (),
    ) -> None:
        if not parts:
            raise CheckpointError("nothing to join: at least one checkpoint is needed.")
        self._parts = tuple(parts.items() if isinstance(parts, Mapping) else parts)
        self._description = description
        self._files = files
        self._donors = tuple(donors)
        where: dict[str, tuple[Checkpoint, str]] = {}
        for prefix, part in self._parts:
            for name in part.names():
                if prefix + name in where:
                    raise CheckpointError(f"joining under '{prefix}' would make a second tensor '{prefix + name}'.")
                where[prefix + name] = (part, name)
        self._where = {name: where[name] for name in sorted(where)}
        self._first = self._parts[0][1]
        self._config = self._first.config if config is None else config

    def names(self) -> Sequence[str]:
        return tuple(self._where)

    def sources(self) -> Sequence[Checkpoint]:
        return [source for one in (*self._donors, *(part for _, part in self._parts)) for source in one.sources()]

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        part, old = self._find(name)
        return part.origins(old)

    def info(self, name: str) -> TensorInfo:
        part, old = self._find(name)
        return part.info(old)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        part, old = self._find(name)
        return part.read(old, start, stop, out)

    def together(self, names: Sequence[str]) -> torch.Tensor:
        found = [self._find(name) for name in names]
        part = found[0][0]
        return part.together([old for _, old in found]) if all(one is part for one, _ in found) else super().together(names)

    def values_of(self, name: str) -> Hashable:
        part, old = self._find(name)
        return part.values_of(old)

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        part, old = self._find(name)
        return part.pieces(old, limit)

    def splittable(self, name: str) -> bool:
        part, old = self._find(name)
        return part.splittable(old)

    def computed(self, name: str) -> bool:
        part, old = self._find(name)
        return part.computed(old)

    def reads_twice(self, name: str) -> bool:
        part, old = self._find(name)
        return part.reads_twice(old)

    def working_bytes(self, name: str, elements: int) -> int:
        part, old = self._find(name)
        return part.working_bytes(old, elements)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        asked = self._where.keys() if names is None else set(names)
        for prefix, part in self._parts:
            if wanted := [old for old in part.names() if prefix + old in asked]:
                part.prepare(wanted)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def files(self) -> Mapping[str, SideFile]:
        return self._first.files if self._files is None else self._files

    @property
    def identity(self) -> str:
        return _digest([[(prefix, part.identity) for prefix, part in self._parts], dict(self._config), self._side_files()])

    @property
    def stamp(self) -> str:
        parts = [(prefix, part.stamp) for prefix, part in self._parts]
        return _digest([parts, dict(self._config), self._side_files(), [donor.stamp for donor in self._donors]])

    def describe(self) -> dict[str, Any]:
        if self._description is not None:
            return dict(self._description)
        return {"join": [{"prefix": prefix, "of": part.describe()} for prefix, part in self._parts]}

    def _side_files(self) -> Any:
        """The content of the files that were given."""
        return {name: hashlib.sha256(file_bytes(file)).hexdigest() for name, file in sorted((self._files or {}).items())}

    def _find(self, name: str) -> tuple[Checkpoint, str]:
        try:
            return self._where[name]
        except KeyError:
            raise CheckpointError(f"no tensor '{name}' here.{did_you_mean(name, self._where)}") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
