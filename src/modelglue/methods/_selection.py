"""The k largest magnitudes of each task vector, exactly, without sorting a tensor and in bounded memory.

Magnitudes are compared as the integers that their bits are (non-negative floats order the same way). A sample brackets the k-th largest;
one pass counts what is above the bracket and keeps the few distinct values inside; where entries tie at the k-th magnitude,
those with the lowest index stay, and one chunk is looked at again to find the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelglue.checkpoint import Round

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE_RANGES = 256
_SAMPLE_LENGTH = 1024
_LARGEST_BITS = 2**31 - 1


@dataclass(frozen=True)
class Cut:
    """Where one model's task vector is cut: magnitudes above `bits` stay; of those equal, positions below `end` do."""

    bits: int
    end: int


@dataclass(frozen=True)
class Cuts:
    """One cut per model; None keeps everything."""

    of: tuple[Cut | None, ...]
    majority: float = 1.0

    def shifted(self, offset: int) -> Cuts:
        """The same cuts in positions of a tensor that begins at `offset` of the laid-out model."""
        return Cuts(tuple(cut and Cut(cut.bits, cut.end - offset) for cut in self.of), self.majority)


def magnitude_bits(delta: Tensor) -> Tensor:
    """|delta| of float32 (or float64, rounded to float32) as int32 that orders like the magnitude."""
    import torch

    return delta.to(torch.float32).view(torch.int32).bitwise_and(0x7FFFFFFF)


def keep_largest(delta: Tensor, cut: Cut | None, start: int) -> Tensor:
    """`delta` (1-D, beginning at flat position `start`) with everything below the cut set to zero."""
    import torch

    if cut is None:
        return delta
    bits = magnitude_bits(delta)
    if start + delta.numel() <= cut.end:
        keep = bits >= cut.bits
    elif start >= cut.end:
        keep = bits > cut.bits
    else:
        keep = bits > cut.bits
        keep[: cut.end - start] |= bits[: cut.end - start] == cut.bits
    return delta * keep.to(delta.dtype) if delta.dtype == torch.float32 else torch.where(keep, delta, torch.zeros_like(delta))


def kept(density: float, numel: int) -> int:
    """How many entries stay: floor(density * numel), but at least one."""
    return max(1, min(numel, math.floor(density * numel)))


def magnitude_rounds(scope: Literal["tensor", "model"]) -> tuple[Round, ...]:
    """The rounds that end with a `Cuts`, for methods with a per-model `density`. Inputs are read about once."""
    return (
        Round(_gather_sample, _bracket, scope, _sample_ranges),
        Round(_gather_counts, _count, scope),
        Round(_gather_counts, _recount, scope, _recount_ranges),
        Round(_gather_ties, _cut, scope, _tie_ranges),
    )


def _deltas(models: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    return [magnitude_bits(model - base) for model in models]


def _sample_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    if numel <= _SAMPLE_RANGES * _SAMPLE_LENGTH:
        return []  # small enough to be counted without a bracket
    step = numel // _SAMPLE_RANGES
    return [(i * step, i * step + _SAMPLE_LENGTH) for i in range(_SAMPLE_RANGES)]


def _gather_sample(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    return _deltas(models, base)


def _bracket(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Per model, bits between which the k-th largest almost surely lies; everything when there was no sample."""
    import torch

    brackets = []
    for model, density in enumerate(parameters["density"]):
        low, high = 0, _LARGEST_BITS
        if partials and density < 1:
            sample, _ = torch.cat([partial[model] for partial in partials]).sort(descending=True)
            share = kept(density, numel) / numel
            middle = share * len(sample)
            # neighbours in a tensor are alike, so the sample is worth less than its length: six deviations, not two
            slack = 6 * math.sqrt(len(sample) * share * (1 - share)) + 16
            if middle - slack > 0:
                high = int(sample[int(middle - slack)])
            if middle + slack < len(sample):
                low = int(sample[int(middle + slack)])
        brackets.append((low, high))
    return brackets


@dataclass(frozen=True)
class _Counted:
    """A chunk's share of one model: how many entries lie above the bracket, and the distinct values inside with their counts."""

    above: int
    values: Tensor
    counts: Tensor


def _gather_counts(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    import torch

    brackets = known[2].brackets if len(known) > 2 else (known[1].brackets if len(known) > 1 else known[0])
    found = []
    for bits, bracket, density in zip(_deltas(models, base), brackets, parameters["density"], strict=True):
        if density >= 1 or bracket is None:
            found.append(None)
            continue
        low, high = bracket
        above = int((bits > high).sum())
        values, counts = torch.unique(bits[(bits >= low) & (bits <= high)], return_counts=True)
        found.append(_Counted(above, values, counts))
    return start, start + models[0].numel(), found


@dataclass(frozen=True)
class _Thresholds:
    """Per model: the k-th magnitude, how many entries equal to it stay, and in which chunk the last of them stands."""

    found: tuple[Any, ...]
    brackets: tuple[Any, ...]


def _count(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> _Thresholds:
    """Find every model's k-th magnitude; a model whose bracket missed it gets a bracket that cannot."""
    found, brackets = [], []
    for model, density in enumerate(parameters["density"]):
        if density >= 1:
            found.append(None)
            brackets.append(None)
            continue
        low, high = known[0][model]
        threshold = _threshold([(a, b, counted[model]) for a, b, counted in partials], kept(density, numel))
        found.append(threshold if isinstance(threshold, tuple) else None)
        if isinstance(threshold, tuple):
            brackets.append(None)
        else:
            brackets.append((high + 1, _LARGEST_BITS) if threshold == "above" else (0, low - 1))
    return _Thresholds(tuple(found), tuple(brackets))


def _recount_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    from modelglue.checkpoint.merged import SURVEY_ELEMENTS

    if all(bracket is None for bracket in known[1].brackets):
        return []
    return [(start, min(start + SURVEY_ELEMENTS, numel)) for start in range(0, numel, SURVEY_ELEMENTS)]


def _recount(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> _Thresholds:
    found = list(known[1].found)
    for model, bracket in enumerate(known[1].brackets):
        if bracket is not None:
            found[model] = _threshold(
                [(a, b, counted[model]) for a, b, counted in partials], kept(parameters["density"][model], numel)
            )
    return _Thresholds(tuple(found), (None,) * len(found))


def _threshold(chunks: Sequence[tuple[int, int, _Counted]], k: int) -> tuple[int, int, tuple[int, int]] | str:
    """(bits of the k-th largest, ties to keep in the named chunk, that chunk), or on which side of the bracket it lies."""
    import torch

    above = sum(counted.above for _, _, counted in chunks)
    if above >= k:
        return "above"
    values, inverse = torch.unique(torch.cat([counted.values for _, _, counted in chunks]), return_inverse=True)
    counts = torch.zeros(len(values), dtype=torch.int64).index_add_(0, inverse, torch.cat([c.counts for _, _, c in chunks]))
    reached = above + counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, k))
    if place >= len(values):
        return "below"
    value = int(values.flip(0)[place])
    ties = k - (int(reached[place - 1]) if place else above)
    for start, stop, counted in chunks:
        here = int(counted.counts[counted.values == value].sum())
        if ties <= here:
            return value, ties, (start, stop)
        ties -= here
    raise AssertionError("the chunks hold fewer ties than their counts say")


def _tie_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    return sorted({chunk for _, _, chunk in (found for found in known[2].found if found is not None)})


def _gather_ties(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    """For the models whose last tie stands in this chunk: the position right after it."""
    ends: dict[int, int] = {}
    for model, (bits, found) in enumerate(zip(_deltas(models, base), known[2].found, strict=True)):
        if found is not None and found[2][0] == start:
            value, ties, _ = found
            ends[model] = start + int((bits == value).nonzero()[ties - 1, 0]) + 1
    return ends


def _cut(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Cuts:
    ends = {model: end for partial in partials for model, end in partial.items()}
    return Cuts(tuple(found and Cut(found[0], ends[model]) for model, found in enumerate(known[2].found)))
