"""The k largest entries: a cut at the k-th largest score and, where entries tie there, after the last of those with the lowest index.

The threshold is an order statistic (`_order_statistics.py`); one chunk is looked at again to find the last tie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._order_statistics import Selection, value_of
from modelglue.methods._task_vectors import KEEP_ALL
from modelglue.methods.registry import Round

if TYPE_CHECKING:
    from torch import Tensor

Ties = Literal["first", "all"]


@dataclass(frozen=True)
class Cut:
    """Where one lane is cut (a model's task vector): scores above `bits` stay; of those equal, positions below `end` do."""

    bits: int
    end: int


@dataclass(frozen=True)
class Cuts:
    """One cut per lane; None keeps everything."""

    of: tuple[Cut | None, ...]

    def shifted(self, offset: int) -> Cuts:
        """The same cuts in positions of a tensor that begins at `offset` of the laid-out model."""
        return Cuts(tuple(cut and Cut(cut.bits, cut.end - offset) for cut in self.of))

    def stretches(self, start: int, length: int) -> list[tuple[int, int]]:
        """A chunk divided (in its own positions) where some lane's last tie stands: nearly always it is in another chunk."""
        ends = {cut.end - start for cut in self.of if cut is not None and 0 < cut.end - start < length}
        edges = [0, *sorted(ends), length]
        return list(itertools.pairwise(edges))

    def thresholds(self, position: int) -> list[float]:
        """Per lane, the largest score that is dropped from `position` to the end of the stretch that begins there."""
        return [KEEP_ALL if cut is None else _dropped(cut, position) for cut in self.of]


def _dropped(cut: Cut, position: int) -> float:
    bits = cut.bits - 1 if position < cut.end else cut.bits
    return value_of(bits) if bits >= 0 else KEEP_ALL


def keep_largest(values: Tensor, cut: Cut | None, start: int) -> Tensor:
    """`values` (1-D, beginning at flat position `start`) with everything whose magnitude is below the cut set to zero."""
    import torch

    if cut is None:
        return values
    magnitude = values.to(torch.float32).abs()
    cuts = Cuts((cut,))
    stretches = cuts.stretches(start, values.numel())
    return torch.cat([torch.where(magnitude[a:b] > cuts.thresholds(start + a)[0], values[a:b], 0.0) for a, b in stretches])


def kept(density: float, numel: int) -> int:
    """How many entries stay: floor(density * numel), but at least one."""
    return max(1, min(numel, math.floor(density * numel)))


def cut_rounds(selection: Selection, scope: Literal["tensor", "model"] = "tensor", ties: Ties = "first") -> tuple[Round, ...]:
    """The four rounds that end with the `Cuts` that leave every lane its k largest. Inputs are read about once.

    Of the entries that tie at the k-th place the "first" ones stay, those with the lowest index, until there are k; or "all" do.
    """

    def gather_ties(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> dict[int, int]:
        """For the lanes whose last tie stands in this chunk: the position right after it."""
        import numpy as np

        ends: dict[int, int] = {}
        lanes = selection.bits(models, base, known, start, parameters)
        for lane, (bits, threshold) in enumerate(zip(lanes, known[-1].found, strict=True)):
            if threshold is not None and threshold.chunk[0] == start:
                equal = np.flatnonzero(bits == threshold.bits)
                ends[lane] = start + int(equal[threshold.ties - 1]) + 1
        return ends

    last = Round(gather_ties, _cuts, scope, _tie_ranges) if ties == "first" else Round(gather_ties, _whole_cuts, scope, _nowhere)
    return (*selection.rounds(scope), last)


def _tie_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    return sorted({threshold.chunk for threshold in known[-1].found if threshold is not None})


def _cuts(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Cuts:
    ends = {lane: end for partial in partials for lane, end in partial.items()}
    return Cuts(tuple(None if one is None else Cut(one.bits, ends[lane]) for lane, one in enumerate(known[-1].found)))


def _nowhere(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    return []


def _whole_cuts(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Cuts:
    return Cuts(tuple(None if one is None else Cut(one.bits, numel) for one in known[-1].found))
