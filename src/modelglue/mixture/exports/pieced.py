"""Tensors put together from ranges of other tensors: rows cut out, rows in another order, several tensors in one."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import Checkpoint, SideFile, TensorInfo
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """Flat positions start..stop of one tensor."""

    source: Checkpoint
    name: str
    start: int
    stop: int


def rows_of(source: Checkpoint, name: str, start: int, stop: int) -> Piece:
    """Rows start..stop of a tensor (stop is not among them)."""
    shape = source.info(name).shape
    width = source.info(name).numel // shape[0]
    return Piece(source, name, start * width, stop * width)


def whole(source: Checkpoint, name: str) -> Piece:
    return Piece(source, name, 0, source.info(name).numel)


class PiecedCheckpoint(Checkpoint):
    """Each tensor is a shape and the pieces that, end to end, fill it. Reading costs what the pieces cost and copies nothing that is one.

    CheckpointError for pieces that do not fill their shape, or differ in dtype.
    """

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], Sequence[Piece]]]) -> None:
        self._pieces = {name: tuple(tensors[name][1]) for name in sorted(tensors)}
        self._infos: dict[str, TensorInfo] = {}
        self._ends: dict[str, list[int]] = {}
        for name, pieces in self._pieces.items():
            dtypes = sorted({piece.source.info(piece.name).dtype for piece in pieces})
            self._ends[name] = list(accumulate(piece.stop - piece.start for piece in pieces))
            info = TensorInfo(tensors[name][0], dtypes[0])
            if len(dtypes) > 1 or self._ends[name][-1] != info.numel:
                raise CheckpointError(
                    f"'{name}' {list(info.shape)} cannot be put together: its parts hold {self._ends[name][-1]:,} values of {dtypes}."
                )
            self._infos[name] = info

    def __repr__(self) -> str:
        return f"PiecedCheckpoint({len(self._pieces)} tensors)"

    def names(self) -> Sequence[str]:
        return tuple(self._pieces)

    def sources(self) -> Sequence[Checkpoint]:
        return [source for one in self._all() for source in one.sources()]

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        found = {(id(piece.source), piece.name): piece for piece in self._find(name)}
        return [origin for piece in found.values() for origin in piece.source.origins(piece.name)]

    def info(self, name: str) -> TensorInfo:
        self._find(name)
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        pieces, ends = self._find(name), self._ends[name]
        stop = ends[-1] if stop is None else stop
        found = []
        at = bisect_right(ends, start)
        while start < stop:
            piece, begin = pieces[at], ends[at - 1] if at else 0
            last = min(stop, ends[at])
            found.append(piece.source.read(piece.name, piece.start + start - begin, piece.start + last - begin))
            start, at = last, at + 1
        if out is not None:
            return torch.cat(found, out=out) if found else out
        return found[0] if len(found) == 1 else torch.cat(found) if found else pieces[0].source.read(pieces[0].name, 0, 0)

    def splittable(self, name: str) -> bool:
        return all(piece.source.splittable(piece.name) for piece in self._distinct(name))

    def computed(self, name: str) -> bool:
        return any(piece.source.computed(piece.name) for piece in self._distinct(name))

    def working_bytes(self, name: str, elements: int) -> int:
        return 8 * elements + max(piece.source.working_bytes(piece.name, elements) for piece in self._distinct(name))

    def prepare(self, names: Sequence[str] | None = None) -> None:
        for source in self._all():
            wanted = {piece.name for name in self._pieces if names is None or name in names for piece in self._distinct(name)}
            if held := sorted(wanted & set(source.names())):
                source.prepare(held)

    @property
    def config(self) -> Mapping[str, Any]:
        return {}

    @property
    def files(self) -> Mapping[str, SideFile]:
        return {}

    @property
    def identity(self) -> str:
        return self._digest([source.identity for source in self._all()])

    @property
    def stamp(self) -> str:
        return self._digest([source.stamp for source in self._all()])

    def describe(self) -> dict[str, Any]:
        return {"pieces": [source.describe() for source in self._all()]}

    def _digest(self, sources: Sequence[str]) -> str:
        number = {id(source): place for place, source in enumerate(self._all())}
        digest = hashlib.sha256(json.dumps(list(sources)).encode())
        for name, pieces in self._pieces.items():
            digest.update(f"\0{name}\0{self._infos[name].shape}".encode())
            for piece in pieces:
                digest.update(f"\0{number[id(piece.source)]}\0{piece.name}\0{piece.start}\0{piece.stop}".encode())
        return digest.hexdigest()

    def _all(self) -> list[Checkpoint]:
        return list({id(piece.source): piece.source for pieces in self._pieces.values() for piece in pieces}.values())

    def _distinct(self, name: str) -> list[Piece]:
        return list({(id(piece.source), piece.name): piece for piece in self._find(name)}.values())

    def _find(self, name: str) -> tuple[Piece, ...]:
        try:
            return self._pieces[name]
        except KeyError:
            raise CheckpointError(f"no tensor '{name}' here.{did_you_mean(name, self._pieces)}") from None
