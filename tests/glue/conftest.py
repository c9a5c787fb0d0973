"""One finished run that many tests look at, and what they look with."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelglue.evaluation import TaskSet
from modelglue.glue import GlueResult, glue
from tests.small_zoo import SKILLS, write_pair_zoo

#: settings of the finished run: all strategies, with one coefficient
GROUPS = {"select": {"strategy": "all", "coefficients": [0.5]}}


@dataclass(frozen=True)
class Finished:
    """A zoo, and the folder of a run over it."""

    zoo: Path
    run: Path
    result: GlueResult
    events: list[tuple[str, dict[str, Any]]]

    def read(self, name: str) -> Any:
        return json.loads((self.run / name).read_text())

    def tasks(self, split: str) -> TaskSet:
        return TaskSet.load([f"{skill}_{split}" for skill in SKILLS], self.zoo.parent / "tasks")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    zoo = write_pair_zoo(folder / "zoo", **GROUPS)
    events: list[tuple[str, dict[str, Any]]] = []
    result = glue(zoo, folder / "run", listener=lambda *event: events.append(event))
    return Finished(zoo, folder / "run", result, events)


def state(folder: Path) -> Mapping[str, tuple[int, bytes | None]]:
    """Time of the last change and bytes of everything below a folder, hidden things too."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def stored(run: Path) -> tuple[int, int]:
    """(models, item scores) in a run's store."""
    with sqlite3.connect(f"file:{run / 'scores.sqlite'}?mode=ro", uri=True) as connection:
        counts = tuple(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("models", "scores"))
    connection.close()
    return counts[0], counts[1]
