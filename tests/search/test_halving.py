"""Successive halving: candidates that are asked for together share a budget of items, and the better ones get the most of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelglue.search import SearchReport, SearchSettings, SyntheticEvaluator, run_study
from modelglue.search.fitness import Halving
from tests.search.doubles import Counting


def search(evaluator: Any, folder: Path | None = None, kind: str = "halving", seed: int = 0, **fields: Any) -> SearchReport:
    settings = SearchSettings(
        members=tuple(f"m{number}" for number in range(4)), searcher={"name": "random", "trials": 18}, batch=9, seed=seed,  # type: ignore[arg-type]
        fitness={"kind": kind, "chunk": 20, "eta": 3}, **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    return run_study(settings, evaluator, folder)


def test_rungs_grow_by_eta_to_everything() -> None:
    fitness = Halving(True, 20, None, 3)
    parts = fitness.parts(SyntheticEvaluator(4, 2, 100))
    assert [sum(map(len, part.values())) for part in parts] == [20, 40, 120, 20]
    assert [len(ids) for ids in parts[0].values()] == [10, 10]
    small = Halving(True, 1, None, 2).parts(SyntheticEvaluator(4, 5, 3))
    assert [sum(map(len, part.values())) for part in small] == [5, 5, 5], "rungs that add nothing are none"
    assert [fitness.kept(count) for count in (9, 8, 3, 1)] == [3, 3, 1, 1]


def test_nine_candidates_are_three_and_then_one() -> None:
    """20 items for nine, 40 more for three, the other 140 for one: 440 of the 1,800 that all would have cost."""
    evaluator = SyntheticEvaluator(4, 2, 100, seed=1)
    report = search(evaluator)
    for start in (0, 9):
        batch = report.outcomes[start : start + 9]
        scored = sorted(sum(map(len, one.scores.items.values())) for one in batch)
        assert scored == [20] * 6 + [60] * 2 + [200]
        (winner,) = [one for one in batch if one.whole]
        assert all(one.status == "pruned" and one.value <= winner.value for one in batch if one is not winner)
        first = {one.id: sum(list(values.values())[n] for values in one.scores.items.values() for n in range(10)) for one in batch}
        assert first[winner.id] >= sorted(first.values())[6], "the last one was among the best three of the first rung"
    assert report.spent["items"] == 2 * (9 * 20 + 3 * 40 + 140)


def test_what_wins_is_nearly_as_good_for_a_quarter_of_the_items() -> None:
    gaps = []
    for seed in range(8):
        evaluator = SyntheticEvaluator(4, 2, 100, seed=seed)
        halved, whole = search(evaluator, seed=seed), search(evaluator, kind="everything", seed=seed)
        assert halved.best is not None
        assert whole.best is not None
        assert whole.best.value >= halved.best.value
        gaps.append(evaluator.truth(whole.best.proposal.candidate) - evaluator.truth(halved.best.proposal.candidate))  # type: ignore[arg-type]
        assert halved.spent["items"] <= 0.25 * whole.spent["items"]
    assert sum(gaps) / len(gaps) < 0.03


@pytest.mark.parametrize("point", [0, 7, 13, 20])
def test_a_search_that_ends_anywhere_goes_on_and_finds_the_same(tmp_path: Path, point: int) -> None:
    class Killed(BaseException):
        pass

    def die(_: Any, number: int) -> None:
        if number == point:
            raise Killed

    expected = search(SyntheticEvaluator(4, 2, 100))
    first, second = Counting(SyntheticEvaluator(4, 2, 100)), Counting(SyntheticEvaluator(4, 2, 100))
    first.before = die
    with pytest.raises(Killed):
        search(first, tmp_path)
    again = search(second, tmp_path)
    assert [(one.status, one.value, one.bound) for one in again.outcomes] == [
        (one.status, one.value, one.bound) for one in expected.outcomes
    ]


def test_workers_change_nothing() -> None:
    one = search(Counting(SyntheticEvaluator(4, 2, 100)))
    several = search(Counting(SyntheticEvaluator(4, 2, 100), workers=4))
    assert [(found.status, found.value) for found in several.outcomes] == [(found.status, found.value) for found in one.outcomes]
