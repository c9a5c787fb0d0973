"""A small zoo to search over, and one search of it that nothing disturbed."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modelglue.search.journal import Journal
from modelglue.search.run import JOURNAL
from modelglue.studies import run_search
from modelglue.studies.study_folder import SCORES
from tests.small_zoo import write_yaml, write_zoo

SKILLS = ("reverse", "larger")
MEMBERS = ("reverse", "larger", "generalist")


def search_file(**groups: Any) -> dict[str, Any]:
    """Twelve random merges of three models, two of them confirmed, tested against their members."""
    return {
        "zoo": "zoo.yaml",
        "tasks": {"include": "tasks", **{split: [f"{skill}_{split}" for skill in SKILLS] for split in ("proxy", "confirmation", "test")}},
        "searcher": {"name": "random", "trials": 12}, "batch": 4, "finalists": 2, "fitness": {"kind": "everything"}, **groups,
    }  # fmt: skip


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_zoo(folder, MEMBERS, SKILLS, items=10)
    write_yaml(folder / "search.yaml", search_file())
    return folder


@pytest.fixture(scope="session")
def alone(home: Path) -> Path:
    return run_search(home / "search.yaml", home / "alone").folder


def journal_of(folder: Path) -> tuple[Any, ...]:
    """Everything that must be the same however a search came about."""
    with Journal(folder / JOURNAL, read_only=True) as journal:
        results = [list(journal.results(split)) for split in ("search", "confirm")]
        return journal.asked(), journal.events(trace=True), results


def stored(path: Path) -> list[tuple[Any, ...]]:
    """The rows of a store of scores, read by SQLite alone."""
    connection = sqlite3.connect(path)
    query = "SELECT key, item, value, loss, answer, tokens FROM scores JOIN models ON id = model ORDER BY 1, 2"
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def outcome_of(folder: Path) -> tuple[Any, ...]:
    return (folder / "result.json").read_text(), journal_of(folder), stored(folder / SCORES)
