"""What a method must hold whole: the shapes of its chunks, in the merge and in the rounds before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, Round, TensorsCheckpoint
from modelglue.checkpoint.engine.merge_function import Unit, unit_shape

Ranges = Sequence[tuple[int, int]]


@dataclass
class Watcher:
    """Copies the first model, and remembers what it was shown."""

    of: Unit
    wanted: Ranges | None = None
    seen: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    id = "watcher"
    needs_base = False
    takes_base = False
    needs_uniform = True

    def unit(self, parameters: Mapping[str, Any]) -> Unit:
        return self.of

    def copies(self, parameters: Mapping[str, Any]) -> bool:
        return False

    def rounds(self, parameters: Mapping[str, Any]) -> list[Round]:
        ranges = None if self.wanted is None else self._ranges
        return [Round(self._gather, lambda *_: None, ranges=ranges, unit=self.of)]

    def _ranges(self, known: Sequence[Any], numel: int, parameters: Mapping[str, Any]) -> Ranges:
        return self.wanted or []

    def _gather(self, models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Any) -> None:
        assert uniform[0].shape == models[0].shape
        self.seen.append((start, models[0].clone()))

    def merge(self, models: Any, base: Any, uniform: Any, survey: Any, start: int, parameters: Any) -> Any:
        self.seen.append((start, models[0].clone()))
        return models[0]


def counting(shape: Sequence[int]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(tuple(shape))


@pytest.mark.parametrize(
    ("unit", "shape", "part"),
    [
        ("element", (4, 3, 2), ()), ("row", (4, 3, 2), (2,)), ("channel", (4, 3, 2), (3, 2)), ("matrix", (4, 3, 2), (4, 3, 2)),
        ("row", (4, 3), (3,)), ("channel", (4, 3), (3,)), ("row", (5,), (5,)), ("channel", (5,), (5,)),
        ("row", (), (1,)), ("channel", (), (1,)), ("matrix", (), ()), ("channel", (0, 4), (4,)),
    ],
)  # fmt: skip
def test_what_is_held_whole(unit: Unit, shape: tuple[int, ...], part: tuple[int, ...]) -> None:
    assert unit_shape(unit, shape) == part


@pytest.mark.parametrize("unit", ["element", "row", "channel", "matrix"])
@pytest.mark.parametrize("shape", [(6, 4, 3), (7, 5), (9,), ()])
def test_chunks_are_whole_parts_in_order(unit: Unit, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", 26)
    watcher = Watcher(unit)
    values = counting(shape)
    merged = MergedCheckpoint(watcher, [TensorsCheckpoint({"t": values})])
    assert torch.equal(merged.tensor("t"), values)
    part = unit_shape(unit, shape)
    *surveyed, (_, last) = watcher.seen
    assert torch.equal(torch.cat([chunk.reshape(-1) for _, chunk in surveyed]), values.reshape(-1))
    for start, chunk in [*surveyed, (0, last)]:
        assert start == int(chunk.reshape(-1)[0])
        assert chunk.shape == shape if unit == "matrix" else chunk.shape[1:] == part
    if unit == "channel" and len(shape) == 3:
        assert [len(chunk) for _, chunk in surveyed] == [2, 2, 2]
    if unit == "matrix":
        return
    watcher.seen.clear()
    numel = values.numel()
    merged.read("t", numel // 2, numel // 2 + 1)
    ((start, chunk),) = watcher.seen
    assert start <= numel // 2 < start + chunk.numel()
    assert chunk.numel() == math.prod(part)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6), st.sampled_from(["element", "row"]))
@settings(max_examples=30, deadline=None)
def test_wanted_ranges_are_widened_to_whole_rows_and_read_once(wanted: list[tuple[int, int]], unit: Unit) -> None:
    ranges = [(a, min(a + length, 42)) for a, length in wanted]
    watcher = Watcher(unit, ranges)
    MergedCheckpoint(watcher, [TensorsCheckpoint({"t": counting((6, 7))})]).tensor("t")
    found = [int(value) for _, chunk in watcher.seen[:-1] for value in chunk.reshape(-1)]
    positions = [position for a, b in sorted(ranges) for position in range(a, b)]
    if unit == "row":
        positions = [7 * row + column for row in sorted({position // 7 for position in positions}) for column in range(7)]
    assert found == positions
