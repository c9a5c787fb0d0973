"""A model with its tables rebuilt for another vocabulary, row by row, when they are read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

from modelglue.checkpoint.engine.workers import single_thread
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, TensorInfo
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.checkpoint.vocabulary.over import OverCheckpoint, digest, updated
from modelglue.checkpoint.vocabulary.tables import lies_flat

if TYPE_CHECKING:
    import torch

#: elements that are read at a time when rows are averaged
_STEP = 2**20
#: what stands in `RowPlan.rows` for a row that is not the model's own
MEAN, ZERO, FIRST_PART = -1, -2, -3


@dataclass(frozen=True)
class RowPlan:
    """Where every row of the output comes from, for one model.

    `rows[r]` is the model's own row, or MEAN (of the rows that belong to tokens), ZERO, or FIRST_PART - k for `parts[k]`: rows of
    other models, (position, row), averaged. `tokens` tells which rows belong to tokens.
    """

    rows: array[int]
    parts: tuple[tuple[tuple[int, int], ...], ...]
    tokens: bytearray

    def is_own(self, count: int) -> bool:
        """Whether nothing changes for a table of `count` rows."""
        return len(self.rows) == count and all(row == number for number, row in enumerate(self.rows))

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(first, stop, own row of the first) of every stretch that can be read at once; a row that is not own is a stretch of its own."""
        found: list[tuple[int, int, int]] = []
        for number, row in enumerate(self.rows):
            if found and row >= 0 and found[-1][2] >= 0 and row == found[-1][2] + number - found[-1][0]:
                found[-1] = (found[-1][0], number + 1, found[-1][2])
            else:
                found.append((number, number + 1, row))
        return found


@final
class RevocabularyCheckpoint(OverCheckpoint):
    """`source` with the rows of `tables` in the order of another vocabulary.

    A table keeps its dtype (float32 if `widen`), its number of rows becomes the plan's. `others` are the models that rows may come from;
    a table has the same name there. Memory: the rows asked for, plus one row per table for the mean, which is taken once, in float64, by
    reading the table. Time: a call of the source per stretch of rows that stay together.
    """

    def __init__(self, source: Checkpoint, tables: Sequence[str], plan: RowPlan, others: Sequence[Checkpoint], *, config: Mapping[str, Any],
                 widen: bool = False) -> None:  # fmt: skip
        self._source = source
        self._tables = frozenset(tables)
        self._plan = plan
        self._others = tuple(others)
        self._vocabulary_config = dict(config)
        self._widen = widen
        self._means: dict[str, torch.Tensor] = {}

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        if name not in self._tables:
            return info
        count = len(self._plan.rows)
        shape = (1, count) if lies_flat(name) else (count, *info.shape[1:])
        return TensorInfo(shape, "F32" if self._widen and info.dtype in FLOATING and info.dtype != "F64" else info.dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        if name not in self._tables:
            return self._source.read(name, start, stop, out)
        import torch

        info = self.info(name)
        stop = info.numel if stop is None else stop
        width = self._width(name)
        dtype = torch_dtype(info.dtype)
        if stop <= start:
            return torch.empty(0, dtype=dtype) if out is None else out
        first, last = start // width, -(-stop // width)
        begin, run_stop, own = self._plan.runs[self._run_of(first)]
        if last <= run_stop and own >= 0 and info.dtype == self._source.info(name).dtype:
            shift = (own - begin) * width
            return self._source.read(name, start + shift, stop + shift, out)
        block = torch.empty((last - first) * width, dtype=dtype)
        self._fill(name, first, last, block)
        values = block[start - first * width : stop - first * width]
        return values if out is None else out.copy_(values)

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        others = self._used if name in self._tables else []
        return [origin for checkpoint in (self._source, *others) for origin in checkpoint.origins(name)]

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        if name not in self._tables:
            return self._source.pieces(name, limit)
        width = self._width(name)
        return super(OverCheckpoint, self).pieces(name, max(limit // width, 1) * width)

    def splittable(self, name: str) -> bool:
        return name in self._tables or self._source.splittable(name)

    def computed(self, name: str) -> bool:
        return self._averages if name in self._tables else self._source.computed(name)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        """Take the means, which every worker needs."""
        self._source.prepare(names)
        for name in sorted(self._tables) if names is None else names:
            if name in self._tables and MEAN in self._plan.rows:
                self._mean(name)

    @property
    def config(self) -> Mapping[str, Any]:
        return updated(self._source.config, self._vocabulary_config)

    def sources(self) -> Sequence[Checkpoint]:
        return [*self._source.sources(), *(source for other in self._used for source in other.sources())]

    @property
    def identity(self) -> str:
        return digest([self._source.identity, [other.identity for other in self._used], self._changes()])

    @property
    def stamp(self) -> str:
        return digest([self._source.stamp, [other.stamp for other in self._used], self._changes()])

    def _changes(self) -> Any:
        rows = hashlib.sha256(self._plan.rows.tobytes() + bytes(self._plan.tokens)).hexdigest()
        return [sorted(self._tables), rows, self._plan.parts, self._vocabulary_config, self._widen]

    @cached_property
    def _used(self) -> list[Checkpoint]:
        """The other models whose rows are read."""
        positions = sorted({position for part in self._plan.parts for position, _ in part})
        return [self._others[position] for position in positions if self._others[position] is not self._source]

    @cached_property
    def _averages(self) -> bool:
        return MEAN in self._plan.rows or any(len(part) > 1 for part in self._plan.parts)

    def _width(self, name: str) -> int:
        """Elements of one row: 1 for a bias."""
        info = self.info(name)
        return info.numel // len(self._plan.rows)

    def _run_of(self, row: int) -> int:
        """The stretch that a row of the output lies in."""
        low, high = 0, len(self._plan.runs) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._plan.runs[middle][0] <= row else (low, middle - 1)
        return low

    def _fill(self, name: str, first: int, last: int, block: torch.Tensor) -> None:
        """Rows first..last of a table, into `block`."""
        width = self._width(name)
        run = self._run_of(first)
        while first < last:
            begin, stop, own = self._plan.runs[run]
            stop = min(stop, last)
            place = block[(first - last) * width :][: (stop - first) * width]
            if own >= 0:
                row = own + first - begin
                place.copy_(self._source.read(name, row * width, (row + stop - first) * width))
            elif own == ZERO:
                place.zero_()
            elif own == MEAN:
                place.copy_(self._mean(name))
            else:
                place.copy_(self._part(name, self._plan.parts[FIRST_PART - own], width))
            first, run = stop, run + 1

    def _part(self, name: str, part: Sequence[tuple[int, int]], width: int) -> torch.Tensor:
        """The mean of rows of other models."""
        rows = [self._others[position].read(name, row * width, (row + 1) * width) for position, row in part]
        if len(rows) == 1:
            return rows[0]
        total = rows[0].double()
        for row in rows[1:]:
            total = total + row.double()
        return total / len(rows)

    def _mean(self, name: str) -> torch.Tensor:
        """The mean of the rows that belong to tokens, in float64."""
        import torch

        if name not in self._means:
            width, count = self._width(name), len(self._plan.tokens)
            step = max(_STEP // width, 1)
            total = torch.zeros(width, dtype=torch.float64)
            with single_thread():
                for first in range(0, count, step):
                    last = min(first + step, count)
                    kept = [number for number in range(first, last) if self._plan.tokens[number]]
                    if kept:
                        block = torch.empty((last - first) * width, dtype=torch_dtype(self.info(name).dtype))
                        if len(kept) == last - first:
                            self._fill(name, first, last, block)
                        else:
                            for number in kept:
                                self._fill(name, number, number + 1, block[(number - first) * width :][:width])
                            block = block.view(-1, width)[[number - first for number in kept]].reshape(-1)
                        total += block.view(-1, width).double().sum(0)
            self._means[name] = total / max(sum(self._plan.tokens), 1)
        return self._means[name]
