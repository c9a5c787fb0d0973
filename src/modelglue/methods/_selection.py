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


def keep_largest(delta: Tensor, cut: Cut | None, start: int) -> Tensor:
    """`delta` (1-D, beginning at flat position `start`) with everything below the cut set to zero."""
    import torch

    if cut is None:
        return delta
    magnitude = delta.to(torch.float32).abs()
    cuts = Cuts((cut,))
    stretches = cuts.stretches(start, delta.numel())
    return torch.cat([torch.where(magnitude[a:b] > cuts.thresholds(start + a)[0], delta[a:b], 0.0) for a, b in stretches])


def kept(density: float, numel: int) -> int:
    """How many entries stay: floor(density * numel), but at least one."""
    return max(1, min(numel, math.floor(density * numel)))


def cut_rounds(selection: Selection, scope: Literal["tensor", "model"] = "tensor") -> tuple[Round, ...]:
    """The four rounds that end with the `Cuts` that leave every lane its k largest. Inputs are read about once."""

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

    return (*selection.rounds(scope), Round(gather_ties, _cuts, scope, _tie_ranges))


def _tie_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    return sorted({threshold.chunk for threshold in known[-1].found if threshold is not None})


def _cuts(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Cuts:
    ends = {lane: end for partial in partials for lane, end in partial.items()}
    return Cuts(tuple(None if one is None else Cut(one.bits, ends[lane]) for lane, one in enumerate(known[-1].found)))


def magnitude_rounds(scope: Literal["tensor", "model"]) -> tuple[Round, ...]:
    """The rounds that end with a `Cuts`, for methods with a per-model `density`: the largest magnitudes of every task vector stay."""
    return cut_rounds(Selection(_magnitudes, _kept_of_each), scope)


def _magnitudes(models: Any, base: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Tensor | None]:
    return [None if density >= 1 else (model - base).abs_() for model, density in zip(models, parameters["density"], strict=True)]


def _kept_of_each(known: Any, numel: int, parameters: Mapping[str, Any]) -> list[int | None]:
    return [None if density >= 1 else kept(density, numel) for density in parameters["density"]]
