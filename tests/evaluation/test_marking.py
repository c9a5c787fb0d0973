"""Plain choices are marked without the harness's general code, and exactly as it marks them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.evaluation import TaskSet
from modelglue.evaluation.items import Item
from modelglue.evaluation.marking import HarnessMarker
from tests.evaluation.task_files import CHOICE, GENERATION, write_task

DOCUMENTS: list[dict[str, Any]] = [
    {"prompt": "ab?", "choices": ["a", "bcd", "ef"], "gold": 0},
    {"prompt": "cd?", "choices": ["one", "two"], "gold": 1},
    {"prompt": "ef?", "choices": ["x", "y", "zz", "www"], "gold": 2},
]


def items(folder: Path, name: str, metric: str) -> tuple[Item, ...]:
    (found,) = TaskSet.load([f"{name}:{metric}"], folder).skills.values()
    return tuple(found)


@pytest.fixture(scope="module", params=["acc", "acc_norm"])
def choices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Item, ...]:
    folder = tmp_path_factory.mktemp("choices")
    write_task(folder, "choice", CHOICE, DOCUMENTS)
    return items(folder, "choice", request.param)


@settings(max_examples=30, deadline=None)
@given(
    which=st.integers(0, 2),
    values=st.lists(st.sampled_from([-1.0, -1.5, -2.0, -3.0, -6.0, -1e4]) | st.floats(-30, 0), min_size=4, max_size=4),
)
def test_a_choice_is_marked_as_the_harness_marks_it(choices: tuple[Item, ...], which: int, values: list[float]) -> None:
    item = choices[which]
    replies = [(value, False) for value in values[: len(item.requests)]]
    assert isinstance(item.marker, HarnessMarker)
    assert item.marker.lengths is not None
    theirs = dataclasses.replace(item.marker, lengths=None)
    assert item.marker.mark(item, replies) == theirs.mark(item, replies)


def test_a_task_with_code_of_its_own_is_marked_by_that(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def results(document, replies):\n    return {'acc': 0.25}\n")
    path = write_task(tmp_path, "choice", CHOICE, DOCUMENTS)
    path.write_text(path.read_text() + "\nprocess_results: !function mine.results\n")
    found = items(tmp_path, "choice", "acc")
    assert {item.mark([(0.0, True)] * len(item.requests))[0] for item in found} == {0.25}


def test_an_answer_that_was_marked_is_not_marked_again_and_another_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path, "written", GENERATION, [{"prompt": "ab", "answer": "ba"}])
    (item,) = items(tmp_path, "written", "exact_match")
    asked: list[Any] = []
    original = HarnessMarker._results

    def watched(self: HarnessMarker, replies: list[Any]) -> Any:
        asked.append(list(replies))
        return original(self, replies)

    monkeypatch.setattr(HarnessMarker, "_results", watched)
    assert [item.mark([text])[0] for text in ("x", "x", "y", "x")] == [0.0] * 4
    assert asked == [["x"], ["y"]]
