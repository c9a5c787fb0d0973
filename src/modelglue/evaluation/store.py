"""The store of results: one row per (model, item), kept for ever, shared by as many processes as like.

A model's key is made of content identities, an item's key of everything that its value depends on, so no row can answer a question that
was not asked. Batches are committed whole: a process that is killed loses the batch in flight and nothing else.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType

from modelglue.errors import RunError, UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS models (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, description TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
    model INTEGER NOT NULL REFERENCES models (id), item TEXT NOT NULL, value REAL, PRIMARY KEY (model, item)
) WITHOUT ROWID;
"""
#: names the schema; SQLite keeps it in the file's header
_VERSION = 1
#: seconds to wait for another process that is committing
_PATIENCE = 60.0


class ScoreStore:
    """Scores in one SQLite file; use it as a context manager.

    Raises UserError for a file that is no store or cannot be opened, RunError when the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._connection = sqlite3.connect(self.path, timeout=_PATIENCE)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, _VERSION):
                raise UserError(f"{self.path}: is a store of version {found}, this modelglue reads version {_VERSION}. Use another file.")
            with self._connection:
                self._connection.executescript(_SCHEMA)
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be used as a store of scores ({error}). Remove it, or choose another file.") from error

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def known(self, model: str, items: Sequence[str]) -> dict[str, float]:
        """Values of those of `items` that have been scored for `model`; NaN where the model answered NaN."""
        wanted = set(items)
        query = "SELECT item, value FROM scores JOIN models ON models.id = scores.model WHERE models.key = ?"
        with closing(self._connection.execute(query, (model,))) as rows:
            return {item: math.nan if value is None else value for item, value in rows if item in wanted}

    def add(self, model: str, description: str, values: Mapping[str, float]) -> None:
        """Commit the values of one batch, all or none. A value that is there already stays."""
        try:
            with self._connection:
                self._connection.execute("INSERT OR IGNORE INTO models (key, description) VALUES (?, ?)", (model, description))
                number = self._connection.execute("SELECT id FROM models WHERE key = ?", (model,)).fetchone()[0]
                rows = [(number, item, None if math.isnan(value) else value) for item, value in values.items()]
                self._connection.executemany("INSERT OR IGNORE INTO scores (model, item, value) VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise RunError(f"{self.path}: scores cannot be written ({error}). Free some space and run it again.") from error

    def counts(self) -> tuple[int, int]:
        """(models, item scores) in the store."""
        models = self._connection.execute("SELECT count(*) FROM models").fetchone()[0]
        items = self._connection.execute("SELECT count(*) FROM scores").fetchone()[0]
        return int(models), int(items)
