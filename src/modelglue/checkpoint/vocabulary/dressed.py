"""A checkpoint under another config and with other side files."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from modelglue.checkpoint.protocol import Checkpoint, SideFile
from modelglue.checkpoint.vocabulary.over import OverCheckpoint, updated

if TYPE_CHECKING:
    import torch


def dressed(
    checkpoint: Checkpoint,
    *,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, SideFile | None] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The same tensors with `config` fields updated (objects field by field), side files replaced (None removes one), and entries
    added to what the expression says of itself. Nothing to change gives the checkpoint itself.
    """
    if not config and not files and not description:
        return checkpoint
    return DressedCheckpoint(checkpoint, config or {}, files or {}, description or {})


@final
class DressedCheckpoint(OverCheckpoint):
    """See `dressed`. Reading costs what the source costs."""

    def __init__(
        self, source: Checkpoint, config: Mapping[str, Any], files: Mapping[str, SideFile | None], description: Mapping[str, Any]
    ) -> None:
        self._source = source
        self._config = dict(config)
        self._files = dict(files)
        self._description = dict(description)

    def together(self, names: Sequence[str]) -> torch.Tensor:
        return self._source.together(names)

    def values_of(self, name: str) -> Hashable:
        return self._source.values_of(name)

    @property
    def config(self) -> Mapping[str, Any]:
        return updated(self._source.config, self._config)

    @property
    def files(self) -> Mapping[str, SideFile]:
        return {name: file for name, file in {**self._source.files, **self._files}.items() if file is not None}

    def describe(self) -> dict[str, Any]:
        return {**self._source.describe(), **self._description}

    def _changes(self) -> Any:
        files = {name: hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else str(file) for name, file in self._files.items()}
        return [self._config, files]
