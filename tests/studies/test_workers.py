"""Searches over real models by several processes: same trace, same result, same store, with and without racing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelglue.studies import run_search
from tests.small_zoo import write_yaml
from tests.studies.conftest import SKILLS, outcome_of, search_file

TASKS = {"include": "tasks", **{split: [f"{skill}_{split}" for skill in SKILLS] for split in ("proxy", "confirmation")}}
SPACE = {"method": "task_arithmetic", "parameters": {"weight": [-1.0, 2.0]}}
SEARCHES: dict[str, dict[str, Any]] = {
    "racing": {"searcher": {"name": "random", "trials": 8}, "batch": 4, "space": SPACE, "fitness": {"chunk": 5}},
    "population": {"searcher": {"name": "evolution", "population": 4, "generations": 2}, "space": SPACE, "fitness": {"chunk": 10}},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_two_and_four_workers_are_one(home: Path, name: str) -> None:
    file = write_yaml(home / f"{name}.yaml", search_file(tasks=TASKS, **SEARCHES[name]))
    one = run_search(file, home / name / "1")
    expected = outcome_of(one.folder)
    for workers in (2, 4):
        assert outcome_of(run_search(file, home / name / str(workers), workers=workers).folder) == expected
    assert (one.report.counts["pruned"] > 0) == (name == "racing")
