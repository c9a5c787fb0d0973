"""Searches for a front through search files: NSGA-II and III, and MAP with its variants, over real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelglue.studies import Finished, run_search
from tests.small_zoo import TINY_ZOO, write_tasks, write_yaml

SKILLS = ("reverse", "sort", "larger")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    write_tasks(folder / "tasks", list(SKILLS), items=6)
    return folder


def searched(home: Path, name: str, count: int, searcher: dict[str, Any], **more: Any) -> Finished:
    file = {
        "zoo": {"base": str(TINY_ZOO / "models" / "base"), "models": [str(TINY_ZOO / "models" / one) for one in SKILLS[:count]]},
        "tasks": {"include": "tasks", "proxy": [f"{skill}_proxy" for skill in SKILLS[:count]]}, "searcher": searcher,
        "space": {"method": "task_arithmetic"}, **more,
    }  # fmt: skip
    return run_search(write_yaml(home / f"{name}.yaml", file), home / name, store=home / "scores.sqlite")


def check_front(found: Finished, count: int) -> None:
    """Members of the front are scored candidates that nothing scored beats in every task."""
    whole = [one for one in found.report.outcomes if one.whole]
    front = [np.array(list(one.tasks.values())) for one in found.report.front]
    assert front
    assert all(len(point) == count for point in front)
    for point in front:
        assert not any((np.array(list(one.tasks.values())) > point).all() for one in whole)


@pytest.mark.parametrize("count", [2, 3], ids=["NSGA-II", "NSGA-III"])
def test_every_task_is_an_objective(home: Path, count: int) -> None:
    searcher = {"name": "evolution", "objectives": "all", "population": 4, "generations": 2}
    found = searched(home, f"evolution{count}", count, searcher)
    check_front(found, count)
    assert found.report.searcher["tasks"] == list(SKILLS[:count])
    assert found.report.searcher["generations"] == 2
    assert len(found.report.outcomes) == 8
    again = searched(home, f"evolution{count}", count, searcher)
    assert [one.tasks for one in again.report.outcomes] == [one.tasks for one in found.report.outcomes]


@pytest.mark.parametrize(
    ("variant", "asked"),
    [("plain", ["design"] * 8 + ["verify"]), ("bayesian", ["design"] * 8), ("nested", ["member"] * 2 + ["design"] * 20)],
)
def test_map_and_its_variants(home: Path, variant: str, asked: list[str]) -> None:
    found = searched(home, variant, 2, {"name": "map", "variant": variant, "points": 8, "verify": 1, "generations": 5})
    tags = [one.proposal.tag for one in found.report.outcomes]
    assert tags[: len(asked)] == asked or (tags == asked[:-1] and "refused" in found.report.searcher)
    assert found.report.searcher["variant"] == variant
    assert all(one.status == "ok" for one in found.report.outcomes)
    check_front(found, 2)


def test_a_weighted_or_worst_task_decides_where_that_is_said(home: Path) -> None:
    for rule, value in (("worst", min), ("mean", lambda scores: sum(scores) / len(scores))):
        found = searched(home, rule, 2, {"name": "random", "trials": 3}, objective={"rule": rule})
        assert [one.value for one in found.report.outcomes if one.whole] == pytest.approx(
            [value(list(one.tasks.values())) for one in found.report.outcomes if one.whole]
        )
