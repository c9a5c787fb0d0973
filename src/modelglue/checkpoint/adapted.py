"""A base model with LoRA adapters laid on it, computed tensor by tensor, row by row, when somebody reads."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modelglue.checkpoint.adapter import Adapter, Factors, open_adapter
from modelglue.checkpoint.adapter import names as naming
from modelglue.checkpoint.adapter.arithmetic import Grid, Ready
from modelglue.checkpoint.adapter.changes import Change, LowRank
from modelglue.checkpoint.adapter.placing import place
from modelglue.checkpoint.engine.workers import single_thread
from modelglue.checkpoint.formats.side_files import TEXT_FILES, side_files
from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

#: a folder with one of these has a tokenizer; what else of the tokenizer stands beside it belongs to it
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def open_adapted(base: Checkpoint, adapters: Sequence[Path], reference: str, *, scales: Sequence[float] | None = None) -> AdaptedCheckpoint:
    """`base` with the updates of all `adapters` added, called `reference`; `scales` multiplies each adapter's low-rank updates.

    Reads configs and headers. CheckpointError names every module that the base lacks and every shape that does not fit.
    """
    opened = [open_adapter(path) for path in adapters]
    if not opened:
        raise CheckpointError(f"'{reference}': names no adapter. Give the base alone, or base+adapter.")
    return AdaptedCheckpoint(base, opened, reference, [1.0] * len(opened) if scales is None else scales)


class AdaptedCheckpoint(Checkpoint):
    """W' = W + sum of c B A, in float32, rounded once to the base's dtype; tensors that no adapter changes are the base's own.

    An update whose B is zero changes no bit. Reading rows costs O(rows x r x width) besides reading them. Memory: the factors of
    one tensor in float32, and three blocks of 65,536 elements. Values depend neither on pieces nor on workers: products are always taken
    of the same blocks of rows.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], reference: str, scales: Sequence[float]) -> None:
        self._base = base
        self._adapters = tuple(adapters)
        self._reference = reference
        self._scales = tuple(scales)
        self._placement = place(base, self._adapters, self._scales)
        self._changes = self._placement.changes
        self._names = tuple(sorted({*base.names(), *self._changes}))
        self._ready: tuple[str, Ready] | None = None
        self._norms: dict[str, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    def __repr__(self) -> str:
        return f"AdaptedCheckpoint({self._reference!r})"

    @property
    def warnings(self) -> Sequence[str]:
        """Other names in the base, tied tensors, another base than the adapters were trained on."""
        return (*self._base.warnings, *self._placement.warnings)

    def called(self, reference: str) -> Self:
        """The same model under another reference, which recipes and cards made from it then give."""
        other = copy.copy(self)
        other._reference = reference
        return other

    def factors(self, name: str) -> Sequence[Factors]:
        """The low-rank updates of a tensor, one per adapter that changes it, never multiplied out; empty if none does."""
        change = self._changes.get(name)
        if change is None:
            self._base.info(name)  # complains of an unknown name
            return []
        return [one.factors() for one in change.added if isinstance(one, LowRank)]

    # -- what it is -----------------------------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        if name in self._changes:
            return self._changes[name].info
        try:
            return self._base.info(name)
        except CheckpointError:
            raise CheckpointError(f"{self._reference}: has no tensor '{name}'.{did_you_mean(name, self._names)}") from None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The base's config; the number of tokens and the tie of the head are corrected where the adapters change them."""
        config = dict(self._base.config)
        if config and self._placement.vocabulary is not None:
            config = naming.resized(config, *self._placement.vocabulary)
        return naming.untied(config) if config and self._placement.untied else config

    @cached_property
    def files(self) -> Mapping[str, SideFile]:
        """The base's side files; the tokenizer is that of the first adapter that brings one."""
        for adapter in self._adapters:
            own = {name: file for name, file in side_files(adapter.path).items() if name in TEXT_FILES}
            if own.keys() & set(_TOKENIZERS):
                kept = {name: file for name, file in self._base.files.items() if name not in TEXT_FILES or name == "generation_config.json"}
                return {**kept, **own}
        return self._base.files

    @cached_property
    def identity(self) -> str:
        return self._digest(self._base.identity, [adapter.identity for adapter in self._adapters])

    @cached_property
    def stamp(self) -> str:
        return self._digest(self._base.stamp, [adapter.stamp for adapter in self._adapters])

    def _digest(self, base: str, adapters: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps(["adapted", base, list(adapters), list(self._scales)]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"model": self._reference}

    @property
    def places(self) -> Sequence[Path]:
        return (*self._base.places, *(adapter.path for adapter in self._adapters))

    @property
    def hub_id(self) -> str | None:
        return self._base.hub_id

    # -- reading --------------------------------------------------------------------------------------------------------

    def computed(self, name: str) -> bool:
        return name in self._changes and bool(self._changes[name].added or self._changes[name].rows)

    def splittable(self, name: str) -> bool:
        """A norm over whole columns is taken once, by one worker."""
        if name not in self._changes:
            return self._base.splittable(name)
        return not self._changes[name].norms_columns

    def prepare(self, names: Sequence[str] | None = None) -> None:
        wanted = self._names if names is None else names
        origins = [change.origin for name in wanted if (change := self._changes.get(name)) is not None and change.origin is not None]
        self._base.prepare(sorted({*origins, *(name for name in wanted if name not in self._changes)}))

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        if not self.computed(name):
            return super().pieces(name, limit) if name in self._changes else self._base.pieces(name, limit)
        grid = Grid.of(self._changes[name])
        found: list[tuple[int, int]] = []
        for first, last in grid.blocks(0, grid.rows):
            start, stop = first * grid.width, last * grid.width
            if found and stop - found[-1][0] <= limit:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((start, stop))
        return found or [(0, 0)]

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Elements start..stop. A range inside blocks of rows costs the blocks around it."""
        import torch

        change = self._changes.get(name)
        if change is None:
            self.info(name)
            return self._base.read(name, start, stop, out)
        stop = change.info.numel if stop is None else stop
        if out is None:
            out = torch.empty(max(stop - start, 0), dtype=torch_dtype(change.info.dtype))
        if stop <= start:
            return out
        if not change.added and not change.rows:
            return out.copy_(self._unchanged(name, change, start, stop))
        with single_thread():
            ready = self._prepared(name, change)
            if not ready.changes_anything:
                return out.copy_(self._unchanged(name, change, start, stop))
            grid = Grid.of(change)
            for first, last in grid.blocks(start // grid.width, -(-stop // grid.width)):
                begin = first * grid.width
                values = self._rounded(name, change, ready.block(self._start(change, begin, last * grid.width), first, last), begin)
                lower, upper = max(begin, start), min(last * grid.width, stop)
                out[lower - start : upper - start] = values[lower - begin : upper - begin]
        return out

    def _start(self, change: Change, start: int, stop: int) -> torch.Tensor:
        """What the updates are added to: the base's elements, or those that replace them."""
        if change.replaced is not None:
            adapter, key = change.replaced
            return adapter.read(key, start, stop)
        assert change.origin is not None
        return self._base.read(change.origin, start, stop)

    def _unchanged(self, name: str, change: Change, start: int, stop: int) -> torch.Tensor:
        """What nothing is added to: the base's elements, or those that replace them, rounded to the base's dtype."""
        values = self._start(change, start, stop)
        return values if values.dtype == torch_dtype(change.info.dtype) else self._rounded(name, change, values, start)

    def _rounded(self, name: str, change: Change, values: torch.Tensor, begin: int) -> torch.Tensor:
        import torch

        dtype = torch_dtype(change.info.dtype)
        stored = values.reshape(-1).to(dtype)
        total = stored.sum(dtype=torch.float32 if dtype == torch.float16 else None)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(stored).all()):
            position = begin + int((~torch.isfinite(stored)).nonzero()[0, 0])
            raise CheckpointError(
                f"{self._reference}: tensor '{name}' comes out with NaN or infinity near element {position:,}: the base holds it there, "
                f"or the result does not fit {str(dtype).removeprefix('torch.')}. Repair the base, or convert it to a wider dtype."
            )
        return stored

    def _prepared(self, name: str, change: Change) -> Ready:
        """The factors of the tensor that is being read, kept until another is."""
        if self._ready is None or self._ready[0] != name:
            ready = Ready.of(change)
            if change.norms_columns:
                if name not in self._norms:
                    self._norms[name] = self._column_norms(name, change, ready)
                ready.norms = self._norms[name]
            self._ready = (name, ready)
        return self._ready[1]

    def _column_norms(self, name: str, change: Change, ready: Ready) -> torch.Tensor:
        import torch

        grid = Grid.of(change)
        squares = torch.zeros(grid.width, dtype=torch.float64)
        for first, last in grid.blocks(0, grid.rows):
            squares += ready.sum(self._start(change, first * grid.width, last * grid.width), first, last).double().square().sum(0)
        norms = squares.sqrt()
        if not bool((norms > 0).all()):
            column = int((norms == 0).nonzero()[0, 0])
            raise CheckpointError(f"{self._reference}: column {column} of '{name}' is zero, so DoRA cannot set its norm. Use another base.")
        return norms.to(torch.float32)
