"""Order statistics of scores over a tensor or a model: exact, without sorting a tensor, in bounded memory.

Scores are non-negative and compared as the integers that their float32 bits are (they order the same way). A sample brackets the k-th
largest; one pass counts what is above the bracket and keeps what is inside. Where the bracket missed, which is rare, a second pass looks on
the other side of it. Where more would be kept than memory should hold (some 500 million scores and more), the first pass counts what is
inside in bins, and the second keeps what is in the bin of the k-th.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods.registry import Round

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Bits = np.ndarray[Any, np.dtype[np.int32]]

#: a range of the sample, in elements, and how many tensor elements there are to one range
_SAMPLE_LENGTH = 2048
_SAMPLE_EVERY = 2**17
_SAMPLE_RANGES = 256
#: tensors up to here are counted without a bracket
_SMALL = 2**18
_LARGEST_BITS = 2**31 - 1
#: scores of one lane that may be kept until they are counted: where a bracket holds more, the first pass counts them in bins
_MOST_KEPT = 2**22
_BINS = 2**16


@dataclass(frozen=True)
class _Bracket:
    """Bits from `low` to `high`; `binned` if it holds too many to keep them."""

    low: int
    high: int
    binned: bool


@dataclass(frozen=True)
class Threshold:
    """The k-th largest score as bits; of its equals, all before the named chunk are among the k, `ties` in it, and none after it."""

    bits: int
    ties: int
    chunk: tuple[int, int]

    @property
    def value(self) -> float:
        return value_of(self.bits)


@dataclass(frozen=True)
class Thresholds:
    """Per lane the threshold, or a bracket to look for it in once more, or neither where none is sought."""

    found: tuple[Threshold | None, ...]
    brackets: tuple[_Bracket | None, ...]


@dataclass(frozen=True)
class Selection:
    """Lanes of scores, and which order statistic of each is sought.

    `scores(models, base, known, start, parameters)` gives one 1-D tensor of non-negative scores per lane for one chunk (the same
    tensor may stand for several lanes, None for one in which nothing is sought); they are rounded to float32. `ranks(known, numel,
    parameters)` gives per lane the k of the k-th largest (from 1), or None. `known` begins with the results of the rounds before these.
    """

    scores: Callable[[Sequence[Tensor], Any, Sequence[Any], int, Mapping[str, Any]], Sequence[Tensor | None]]
    ranks: Callable[[Sequence[Any], int, Mapping[str, Any]], Sequence[int | None]]

    def rounds(self, scope: Literal["tensor", "model"] = "tensor") -> tuple[Round, Round, Round]:
        """The rounds of which the last gives the `Thresholds`. Inputs are read about once."""
        return (
            Round(self._gather_sample, self._bracket, scope, self._sample_ranges),
            Round(self._gather_inside, self._count, scope, fold=_joined),
            Round(self._gather_inside, self._recount, scope, _recount_ranges, fold=_joined),
        )

    def bits(self, models: Any, base: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Bits | None]:
        """The scores of one chunk as integers. numpy, whose masks are much cheaper."""
        return [None if lane is None else bits_of(lane) for lane in self.scores(models, base, known, start, parameters)]

    def _sample_ranges(self, known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
        if numel <= _SMALL or all(rank is None for rank in self.ranks(known, numel, parameters)):
            return []
        count = min(max(numel // _SAMPLE_EVERY, 32), _SAMPLE_RANGES)
        step = numel // count
        return [(i * step, i * step + _SAMPLE_LENGTH) for i in range(count)]

    def _gather_sample(self, models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
        return self.bits(models, base, known, start, parameters)

    def _bracket(self, partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[_Bracket | None]:
        """Per lane, bits between which the k-th largest almost surely lies; everything when there was no sample."""
        import numpy as np

        brackets: list[_Bracket | None] = []
        for lane, rank in enumerate(self.ranks(known, numel, parameters)):
            if rank is None:
                brackets.append(None)
                continue
            low, high, inside = 0, _LARGEST_BITS, 1.0
            if partials:
                sample = np.concatenate([partial[lane] for partial in partials])
                share = rank / numel
                middle = (1 - share) * len(sample)
                # neighbours in a tensor are alike, so the sample is worth less than its length: six deviations, not two
                slack = 6 * math.sqrt(len(sample) * share * (1 - share)) + 16
                places = [place for place in (int(middle - slack), int(middle + slack)) if 0 < place < len(sample)]
                sample.partition(places)
                low = int(sample[places[0]]) if middle - slack >= 1 else low
                high = int(sample[places[-1]]) if middle + slack < len(sample) else high
                inside = float(np.count_nonzero((sample >= low) & (sample <= high))) / len(sample)
            brackets.append(_Bracket(low, high, inside * numel > _MOST_KEPT))
        return brackets

    def _gather_inside(self, models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
        brackets = known[-1].brackets if isinstance(known[-1], Thresholds) else known[-1]
        lanes = self.scores(models, base, known, start, parameters)
        return [
            None if lane is None or bracket is None else _binned(lane, bracket) if bracket.binned else [_inside(lane, bracket, start)]
            for lane, bracket in zip(lanes, brackets, strict=True)
        ]

    def _count(self, partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Thresholds:
        """Find every lane's threshold; a lane whose bracket missed it gets a bracket that cannot, a binned one the bin that it is in."""
        found: list[Threshold | None] = []
        brackets: list[_Bracket | None] = []
        for lane, rank in enumerate(self.ranks(known, numel, parameters)):
            threshold, bracket = None, None
            if rank is not None:
                low, high = known[-1][lane].low, known[-1][lane].high
                of_lane = partials[0][lane] if partials else []
                answer = _bin(of_lane, known[-1][lane], rank) if isinstance(of_lane, _Binned) else _threshold(of_lane, rank)
                missed = {"above": _Bracket(high + 1, _LARGEST_BITS, False), "below": _Bracket(0, low - 1, False)}
                threshold = answer if isinstance(answer, Threshold) else None
                bracket = missed[answer] if isinstance(answer, str) else answer if isinstance(answer, _Bracket) else None
            found.append(threshold)
            brackets.append(bracket)
        return Thresholds(tuple(found), tuple(brackets))

    def _recount(self, partials: Sequence[Any], known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Thresholds:
        found = list(known[-1].found)
        ranks = self.ranks(known, numel, parameters)
        for lane, bracket in enumerate(known[-1].brackets):
            rank = ranks[lane]
            if bracket is not None and rank is not None:
                threshold = _threshold(partials[0][lane], rank)
                assert isinstance(threshold, Threshold)
                found[lane] = threshold
        return Thresholds(tuple(found), (None,) * len(found))


def bits_of(scores: Tensor) -> Bits:
    """Non-negative numbers, rounded to float32, as int32 that order like them."""
    import torch

    bits: Bits = scores.to(torch.float32).view(torch.int32).cpu().numpy()
    return bits


def value_of(bits: int) -> float:
    """The float32 number with these bits."""
    import numpy as np

    return float(np.int32(bits).view(np.float32))


def _recount_ranges(known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    from modelglue.checkpoint.engine.arithmetic import SURVEY_ELEMENTS

    if all(bracket is None for bracket in known[-1].brackets):
        return []
    return [(start, min(start + SURVEY_ELEMENTS, numel)) for start in range(0, numel, SURVEY_ELEMENTS)]


@dataclass(frozen=True)
class _Inside:
    """A chunk's share of one lane: how many scores lie above the bracket, and the values inside.

    `counts` is None where every value stands for itself; where many would be kept, equal ones are counted (deltas of bfloat16 models
    repeat themselves), so memory stays small.
    """

    start: int
    stop: int
    above: int
    values: Any
    counts: Any


@dataclass
class _Binned:
    """One lane's scores that lie above the bracket, and those inside, counted in bins of equal width."""

    above: int
    counts: Any


def _width(bracket: _Bracket) -> int:
    return (bracket.high - bracket.low) // _BINS + 1


def _binned(scores: Tensor, bracket: _Bracket) -> _Binned:
    import numpy as np

    above, inside = _divided(scores, bracket)
    return _Binned(above, np.bincount((inside - bracket.low) // _width(bracket), minlength=_BINS))


def _bin(binned: _Binned, bracket: _Bracket, k: int) -> _Bracket | Literal["above", "below"]:
    """The bin of the k-th largest, or on which side of the bracket it lies."""
    import numpy as np

    rank = k - binned.above
    if rank <= 0:
        return "above"
    place = int(np.searchsorted(binned.counts[::-1].cumsum(), rank))
    if place >= _BINS:
        return "below"
    low = bracket.low + (_BINS - 1 - place) * _width(bracket)
    return _Bracket(low, min(low + _width(bracket) - 1, bracket.high), False)


def _joined(before: list[Any], after: list[Any]) -> list[Any]:
    """The shares of two stretches, one after the other, as one; the first is changed."""
    for lane, (one, other) in enumerate(zip(before, after, strict=True)):
        if isinstance(one, _Binned):
            before[lane] = _Binned(one.above + other.above, one.counts + other.counts)
        elif one is not None:
            one.extend(other)
    return before


def _inside(scores: Tensor, bracket: _Bracket, start: int) -> _Inside:
    import numpy as np

    above, values = _divided(scores, bracket)
    counts = None
    if len(values) > len(scores) // 64:
        values, counts = np.unique(values, return_counts=True)
    return _Inside(start, start + len(scores), above, values, counts)


def _divided(scores: Tensor, bracket: _Bracket) -> tuple[int, Bits]:
    """How many scores lie above the bracket, and the bits of those inside. From a device only these come; here masks of numpy are cheap."""
    import numpy as np

    low, high = bracket.low, bracket.high
    if scores.device.type != "cpu":
        return _divided_there(scores, bracket)
    bits = bits_of(scores)
    above = int(np.count_nonzero(bits > high)) if high < _LARGEST_BITS else 0
    # one unsigned comparison for low <= bits <= high
    return above, bits if low == 0 and high == _LARGEST_BITS else bits[(bits - low).view(np.uint32) <= np.uint32(high - low)]


def _divided_there(scores: Tensor, bracket: _Bracket) -> tuple[int, Bits]:
    import torch

    bits = scores.to(torch.float32).view(torch.int32)
    inside: Bits = bits[(bits >= bracket.low) & (bits <= bracket.high)].cpu().numpy()
    return int((bits > bracket.high).sum()), inside


def _threshold(chunks: Sequence[_Inside], k: int) -> Threshold | Literal["above", "below"]:
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
            return Threshold(bits, ties, (chunk.start, chunk.stop))
        ties -= here
    raise AssertionError("the chunks hold fewer ties than their counts say")
