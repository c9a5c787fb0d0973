"""The k largest magnitudes of each task vector, exactly, without sorting a tensor and in bounded memory.

Magnitudes are compared as the integers that their bits are (non-negative floats order the same way). A sample brackets the k-th largest;
one pass counts what is above the bracket and keeps what is inside; where entries tie at the k-th magnitude, those with the
lowest index stay, and one chunk is looked at again to find the last of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._task_vectors import KEEP_ALL
from modelglue.methods.registry import Round

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: a range of the sample, in elements, and how many tensor elements there are to one range
_SAMPLE_LENGTH = 2048
_SAMPLE_EVERY = 2**17
_SAMPLE_RANGES = 256
#: tensors up to here are counted without a bracket
_SMALL = 2**18
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

    def shifted(self, offset: int) -> Cuts:
        """The same cuts in positions of a tensor that begins at `offset` of the laid-out model."""
        return Cuts(tuple(cut and Cut(cut.bits, cut.end - offset) for cut in self.of))

    def stretches(self, start: int, length: int) -> list[tuple[int, int]]:
        """A chunk divided (in its own positions) where some model's last tie stands: nearly always it is in another chunk."""
        ends = {cut.end - start for cut in self.of if cut is not None and 0 < cut.end - start < length}
        edges = [0, *sorted(ends), length]
        return list(itertools.pairwise(edges))

    def thresholds(self, position: int) -> list[float]:
        """Per model, the largest magnitude that is dropped from `position` to the end of the stretch that begins there."""
        return [KEEP_ALL if cut is None else _dropped(cut, position) for cut in self.of]


def _dropped(cut: Cut, position: int) -> float:
    import numpy as np

    bits = cut.bits - 1 if position < cut.end else cut.bits
    return float(np.int32(bits).view(np.float32)) if bits >= 0 else KEEP_ALL


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


def magnitude_rounds(scope: Literal["tensor", "model"]) -> tuple[Round, ...]:
    """The rounds that end with a `Cuts`, for methods with a per-model `density`. Inputs are read about once."""
    return (
        Round(_gather_sample, _bracket, scope, _sample_ranges),
        Round(_gather_inside, _count, scope),
        Round(_gather_inside, _recount, scope, _recount_ranges),
        Round(_gather_ties, _cut, scope, _tie_ranges),
    )


def _bits(model: Tensor, base: Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    """|model - base| rounded to float32, as int32 that order like the magnitudes. numpy, whose masks are much cheaper."""
    import torch

    bits: np.ndarray[Any, np.dtype[np.int32]] = (model - base).to(torch.float32).view(torch.int32).bitwise_and_(0x7FFFFFFF).numpy()
    return bits


def _sample_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    if numel <= _SMALL or min(parameters["density"]) >= 1:
        return []
    count = min(max(numel // _SAMPLE_EVERY, 32), _SAMPLE_RANGES)
    step = numel // count
    return [(i * step, i * step + _SAMPLE_LENGTH) for i in range(count)]


def _gather_sample(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    return [_bits(model, base) for model in models]


def _bracket(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Per model, bits between which the k-th largest almost surely lies; everything when there was no sample."""
    import numpy as np

    brackets = []
    for model, density in enumerate(parameters["density"]):
        low, high = 0, _LARGEST_BITS
        if partials and density < 1:
            sample = np.concatenate([partial[model] for partial in partials])
            share = kept(density, numel) / numel
            middle = (1 - share) * len(sample)
            # neighbours in a tensor are alike, so the sample is worth less than its length: six deviations, not two
            slack = 6 * math.sqrt(len(sample) * share * (1 - share)) + 16
            places = [place for place in (int(middle - slack), int(middle + slack)) if 0 < place < len(sample)]
            sample.partition(places)
            low = int(sample[places[0]]) if middle - slack >= 1 else low
            high = int(sample[places[-1]]) if middle + slack < len(sample) else high
        brackets.append((low, high))
    return brackets


@dataclass(frozen=True)
class _Inside:
    """A chunk's share of one model: how many entries lie above the bracket, and the values inside.

    `counts` is None where every value stands for itself; where many would be kept, equal ones are counted (deltas of bfloat16 models
    repeat themselves), so memory stays small.
    """

    start: int
    stop: int
    above: int
    values: Any
    counts: Any


def _gather_inside(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    import numpy as np

    brackets = known[1].brackets if len(known) > 1 else known[0]
    found: list[_Inside | None] = []
    for model, bracket, density in zip(models, brackets, parameters["density"], strict=True):
        if density >= 1 or bracket is None:
            found.append(None)
            continue
        low, high = bracket
        bits = _bits(model, base)
        above = int(np.count_nonzero(bits > high)) if high < _LARGEST_BITS else 0
        # one unsigned comparison for low <= bits <= high
        values = bits if low == 0 and high == _LARGEST_BITS else bits[(bits - low).view(np.uint32) <= np.uint32(high - low)]
        counts = None
        if len(values) > len(bits) // 64:
            values, counts = np.unique(values, return_counts=True)
        found.append(_Inside(start, start + len(bits), above, values, counts))
    return found


@dataclass(frozen=True)
class _Threshold:
    """The k-th magnitude of one model, how many of its equals stay in the named chunk, and that chunk (none before, all after)."""

    bits: int
    ties: int
    chunk: tuple[int, int]


@dataclass(frozen=True)
class _Thresholds:
    """Per model the threshold, or a bracket to look for it in once more, or neither where everything stays."""

    found: tuple[_Threshold | None, ...]
    brackets: tuple[tuple[int, int] | None, ...]


def _count(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> _Thresholds:
    """Find every model's k-th magnitude; a model whose bracket missed it gets a bracket that cannot."""
    found: list[_Threshold | None] = []
    brackets: list[tuple[int, int] | None] = []
    for model, density in enumerate(parameters["density"]):
        threshold = None if density >= 1 else _threshold([partial[model] for partial in partials], kept(density, numel))
        found.append(threshold if isinstance(threshold, _Threshold) else None)
        low, high = known[0][model]
        missed = {"above": (high + 1, _LARGEST_BITS), "below": (0, low - 1)}
        brackets.append(missed[threshold] if isinstance(threshold, str) else None)
    return _Thresholds(tuple(found), tuple(brackets))


def _recount_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    from modelglue.checkpoint.engine import SURVEY_ELEMENTS

    if all(bracket is None for bracket in known[1].brackets):
        return []
    return [(start, min(start + SURVEY_ELEMENTS, numel)) for start in range(0, numel, SURVEY_ELEMENTS)]


def _recount(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> _Thresholds:
    found = list(known[1].found)
    for model, bracket in enumerate(known[1].brackets):
        if bracket is not None:
            threshold = _threshold([partial[model] for partial in partials], kept(parameters["density"][model], numel))
            assert isinstance(threshold, _Threshold)
            found[model] = threshold
    return _Thresholds(tuple(found), (None,) * len(found))


def _threshold(chunks: Sequence[_Inside], k: int) -> _Threshold | Literal["above", "below"]:
    """The k-th largest of all chunks, or on which side of the bracket it lies."""
    import numpy as np

    rank = k - sum(chunk.above for chunk in chunks)  # among the values inside
    if rank <= 0:
        return "above"
    values = np.concatenate([chunk.values for chunk in chunks])
    if all(chunk.counts is None for chunk in chunks):
        if rank > len(values):
            return "below"
        bits = int(np.partition(values, len(values) - rank)[len(values) - rank])
        ties = rank - int(np.count_nonzero(values > bits))
    else:
        counts = np.concatenate([np.ones(len(c.values), np.int64) if c.counts is None else c.counts for c in chunks])
        order = np.argsort(values)[::-1]
        place = int(np.searchsorted(counts[order].cumsum(), rank))
        if place >= len(values):
            return "below"
        bits = int(values[order[place]])
        ties = rank - int(counts[values > bits].sum())
    for chunk in chunks:
        equal = chunk.values == bits
        here = int(np.count_nonzero(equal) if chunk.counts is None else chunk.counts[equal].sum())
        if ties <= here:
            return _Threshold(bits, ties, (chunk.start, chunk.stop))
        ties -= here
    raise AssertionError("the chunks hold fewer ties than their counts say")


def _tie_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    return sorted({threshold.chunk for threshold in known[2].found if threshold is not None})


def _gather_ties(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
    """For the models whose last tie stands in this chunk: the position right after it."""
    import numpy as np

    ends: dict[int, int] = {}
    for position, (model, threshold) in enumerate(zip(models, known[2].found, strict=True)):
        if threshold is not None and threshold.chunk[0] == start:
            equal = np.flatnonzero(_bits(model, base) == threshold.bits)
            ends[position] = start + int(equal[threshold.ties - 1]) + 1
    return ends


def _cut(partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Cuts:
    ends = {model: end for partial in partials for model, end in partial.items()}
    return Cuts(tuple(None if one is None else Cut(one.bits, ends[model]) for model, one in enumerate(known[2].found)))
