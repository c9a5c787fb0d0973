"""`modelglue.evaluate`: references, paths and expressions; task names and task sets; with and without a store."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelglue
from modelglue.errors import CheckpointError, UserError
from modelglue.evaluation import ScoreStore, TaskSet, evaluate
from tests.small_zoo import TINY_ZOO, write_tasks

MODEL = TINY_ZOO / "models" / "stranger"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), items=8)


def test_all_ways_of_saying_it(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(str(MODEL), ["double_proxy", "larger_proxy"], include=tasks)
    assert list(expected.items) == ["double", "larger"]
    assert [len(values) for values in expected.items.values()] == [8, 8]
    assert evaluate(MODEL, TaskSet.load(["double_proxy", "larger_proxy"], tasks)) == expected
    assert modelglue.evaluate(modelglue.open(MODEL), ["double_proxy", "larger_proxy"], include=str(tasks)) == expected
    monkeypatch.chdir(MODEL.parent)
    assert evaluate("stranger", ["double_proxy", "larger_proxy"], include=tasks, store=tmp_path / "s") == expected
    half = modelglue.merge({"method": "linear", "models": [{"model": str(MODEL), "weight": weight} for weight in (0.5, 0.5)]})
    assert evaluate(half, ["double_proxy", "larger_proxy"], include=tasks) == expected


def test_a_store_answers_the_second_time(tasks: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    first = evaluate(MODEL, ["double_proxy"], include=tasks, store=tmp_path / "s", on_batch=lambda *batch: heard.append(batch))
    assert heard == [("double", 8)]
    again = evaluate(MODEL, ["double_proxy"], include=tasks, store=tmp_path / "s", on_batch=lambda *batch: heard.append(batch))
    assert again == first
    assert heard == [("double", 8)]
    with ScoreStore(tmp_path / "s") as store:
        more = evaluate(MODEL, ["double_proxy", "larger_proxy"], include=tasks, store=store)
        assert more.items["double"] == first.items["double"]
        assert store.counts() == (1, 16)


def test_errors(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder.*Did you mean 'stranger'\?"):
        evaluate(MODEL.with_name("strangr"), ["double_proxy"], include=tasks)
    with pytest.raises(UserError, match=r"task 'double_prox': .*Did you mean 'double_proxy'"):
        evaluate(MODEL, ["double_prox"], include=tasks, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
