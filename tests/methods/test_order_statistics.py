"""Order statistics in bounded memory: exact whatever a bracket holds, in as many passes as that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.methods import _order_statistics
from modelglue.methods._order_statistics import Selection, Threshold
from tests.checkpoint.files import randn
from tests.checkpoint.merges import merge_of, tensors_of

STEP = 1000


def scores(models: Any, base: Any, known: Any, start: int, parameters: Any) -> list[torch.Tensor]:
    return [model.abs() for model in models]


def threshold_of(values: torch.Tensor, rank: int) -> tuple[Threshold, int]:
    """The threshold that the rounds find, driven by hand in steps, and how many chunks the passes over everything visited."""
    selection = Selection(scores, lambda known, numel, parameters: [rank])
    known: list[Any] = []
    visited = 0
    for round_ in selection.rounds():
        everything = [(start, min(start + STEP, len(values))) for start in range(0, len(values), STEP)]
        ranges = everything if round_.ranges is None else round_.ranges(known, len(values), {})
        partials: list[Any] = []
        for start, stop in ranges:
            partial = round_.gather([values[start:stop]], None, None, known, start, {})
            assert round_.fold is None or not partials or partials[0] is not partial
            partials = [round_.fold(partials[0], partial)] if round_.fold is not None and partials else [*partials, partial]
        visited += len(ranges) if round_.fold is not None else 0
        known.append(round_.combine(partials, known, len(values), {}))
    return known[-1].found[0], visited


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is 50,000 long is too long: a sample brackets it, and the bracket holds too much to keep."""
    monkeypatch.setattr(_order_statistics, "_SMALL", 100)
    monkeypatch.setattr(_order_statistics, "_SAMPLE_LENGTH", 64)
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", STEP)


@pytest.mark.parametrize("most", [2**22, 0])
@pytest.mark.parametrize("bins", [2**16, 16, 1])
@pytest.mark.parametrize("kind", ["random", "repeated", "equal"])
@pytest.mark.parametrize("rank", [1, 2, 25_000, 49_999, 50_000])
def test_kth_largest_is_exact_whether_kept_or_binned(most: int, bins: int, kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_order_statistics, "_MOST_KEPT", most)
    monkeypatch.setattr(_order_statistics, "_BINS", bins)
    values = {"random": randn(50_000), "repeated": (randn(50_000) * 4).round() / 4, "equal": torch.ones(50_000)}[kind]
    found, visited = threshold_of(values, rank)
    expected = float(values.abs().sort(descending=True).values[rank - 1])
    assert found.value == expected
    assert visited == (100 if most == 0 else 50), "two passes only where the first kept nothing"
    start, stop = found.chunk
    before = int((values[:start].abs() >= expected).sum()) - int((values[:start].abs() > expected).sum())
    above = int((values.abs() > expected).sum())
    assert above + before + found.ties == rank, "the chunk of the last tie"
    assert 0 < found.ties <= int((values[start:stop].abs() == expected).sum())


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_merge_is_the_same_whether_kept_or_binned(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo: list[Any] = [TensorsCheckpoint({"a": randn(5000, seed=n), "b": randn(7000, seed=10 + n)}, label=f"m{n}") for n in range(3)]
    expected = tensors_of(merge_of(zoo, "ties", trim_scope=scope))
    monkeypatch.setattr(_order_statistics, "_MOST_KEPT", 0)
    found = tensors_of(merge_of(zoo, "ties", trim_scope=scope))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bracket", [(0, 2**31 - 1), (0, 1065353216), (1056964608, 1065353216), (1065353216, 2**31 - 1), (7, 7)])
def test_a_device_divides_as_the_processor_does(bracket: tuple[int, int]) -> None:
    values = torch.cat([randn(3000).abs(), torch.tensor([0.0, 0.5, 1.0, 1.0, 3e38])])
    given = _order_statistics._Bracket(*bracket, False)
    above, inside = _order_statistics._divided(values, given)
    there = _order_statistics._divided_there(values, given)
    assert (there[0], there[1].tolist()) == (above, inside.tolist())
    assert above + len(inside) + int((values.view(torch.int32) < bracket[0]).sum()) == len(values)
