"""The store of results: one row per (model, item) with value, loss, digest of the answer and tokens, shared by as many processes as like.

A model's key is made of content identities, an item's key of everything that its value depends on, so no row can answer a question that
was not asked. Batches are committed whole: a process that is killed loses the batch in flight and nothing else.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from modelglue.errors import ModelGlueError, RunError, UserError
from modelglue.evaluation.items import Mark

#: name this format ("mgsc") and its version; SQLite keeps both in the file's header
_MARK = 0x6D677363
_VERSION = 2
#: what a score is besides its value; version 1 had none of it
_BESIDES = {"loss": "REAL", "answer": "TEXT", "tokens": "INTEGER NOT NULL DEFAULT 0"}
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS models (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, description TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
    model INTEGER NOT NULL REFERENCES models (id), item TEXT NOT NULL, value REAL,
    {", ".join(f"{name} {kind}" for name, kind in _BESIDES.items())}, PRIMARY KEY (model, item)
) WITHOUT ROWID;
PRAGMA application_id = {_MARK};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_HEADER = ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
#: how many values a query may be given, in every version of SQLite
_VARIABLES = 900
#: seconds to wait for another process that is committing
_PATIENCE = 60.0
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class ScoreStore:
    """Scores in one SQLite file; use it as a context manager.

    Raises UserError for a file that is no store, is damaged or cannot be opened (such a file is not touched), RunError when the disk is
    full. Opening looks through the whole file once for damage (about 0.2 s for 100 MB).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._asked: dict[str, set[str]] = {}
        try:
            self._connection = sqlite3.connect(self.path, timeout=_PATIENCE)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._open()
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.Error):
                raise self._unusable(error) from error
            raise

    def _open(self) -> None:
        with self._connection:
            self._connection.execute("BEGIN")  # all three are read from one state of the file
            tables, mark, version = (self._connection.execute(query).fetchone()[0] for query in _HEADER)
        if tables and mark != _MARK:
            raise UserError(f"{self.path}: is a database of something else, not a store of scores. Choose another file.")
        if tables and version not in (1, _VERSION):
            raise UserError(f"{self.path}: is a store of version {version}, this modelglue reads version {_VERSION}. Choose another file.")
        found = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(str(found))
        self._write_ahead()
        self._connection.execute("PRAGMA synchronous = NORMAL")
        if not tables:
            self._connection.executescript(_SCHEMA)
        elif version == 1:
            self._extend()

    def _extend(self) -> None:
        """A store of version 1 gets the columns that it lacks; its scores stay."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            if self._connection.execute("PRAGMA user_version").fetchone()[0] == 1:  # nobody else was faster
                for name, kind in _BESIDES.items():
                    self._connection.execute(f"ALTER TABLE scores ADD COLUMN {name} {kind}")
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _write_ahead(self) -> None:
        """Readers and one writer at a time, without blocking each other. SQLite waits everywhere but at this switch, so we do."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def known(self, model: str, items: Sequence[str]) -> dict[str, Mark]:
        """Marks of those of `items` that have been scored for `model`; the value is NaN where the model answered NaN."""
        wanted = list(dict.fromkeys(items))
        self._asked.setdefault(model, set()).update(wanted)
        found: dict[str, Mark] = {}
        for start in range(0, len(wanted), _VARIABLES):
            some = wanted[start : start + _VARIABLES]
            rows = self._rows(
                "SELECT item, value, loss, answer, tokens FROM scores WHERE model = (SELECT id FROM models WHERE key = ?) "
                f"AND item IN ({', '.join('?' * len(some))})",
                model, *some,
            )  # fmt: skip
            found |= {item: Mark(math.nan if value is None else value, *besides) for item, value, *besides in rows}
        return found

    def complete(self, items: Sequence[str]) -> list[dict[str, float]]:
        """The values of `items` for every model that has them all and never answered NaN, in the order of the models' keys."""
        rows = self._rows("SELECT models.key, item, value FROM scores JOIN models ON models.id = scores.model ORDER BY models.key")
        wanted = set(items)
        found: dict[str, dict[str, float]] = {}
        for model, item, value in rows:
            if item in wanted and value is not None:
                found.setdefault(model, {})[item] = value
        return [values for values in found.values() if len(values) == len(wanted)]

    def add(self, model: str, description: str, marks: Mapping[str, Mark]) -> None:
        """Commit the marks of one batch, all or none. A score that is there already stays."""
        try:
            with self._connection:
                self._connection.execute("INSERT OR IGNORE INTO models (key, description) VALUES (?, ?)", (model, description))
                number = self._connection.execute("SELECT id FROM models WHERE key = ?", (model,)).fetchone()[0]
                rows = [(number, item, _number(mark.value), _number(mark.loss), mark.answer, mark.tokens) for item, mark in marks.items()]
                self._connection.executemany(
                    "INSERT OR IGNORE INTO scores (model, item, value, loss, answer, tokens) VALUES (?, ?, ?, ?, ?, ?)", rows
                )
        except sqlite3.Error as error:
            if _code(error) in _DAMAGE:
                raise self._damaged(str(error)) from error
            remedy = "Wait for the process that holds it" if _code(error) == sqlite3.SQLITE_BUSY else "Free some space"
            raise RunError(
                f"{self.path}: scores cannot be written ({error}). {remedy} and run it again; what was scored is kept."
            ) from error

    def asked(self) -> tuple[int, int]:
        """(models, item scores) that were asked for since the store was opened, whoever scored them."""
        return len(self._asked), sum(map(len, self._asked.values()))

    def counts(self) -> tuple[int, int]:
        """(models, item scores) in the store."""
        ((models, items),) = self._rows("SELECT (SELECT count(*) FROM models), (SELECT count(*) FROM scores)")
        return int(models), int(items)

    def _rows(self, query: str, *values: str) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: this store of scores is damaged ({' '.join(what.split())}). Nothing was written to it. "
            "Restore it from a copy, or choose another file."
        )

    def _unusable(self, error: sqlite3.Error) -> ModelGlueError:
        if _code(error) == sqlite3.SQLITE_CORRUPT:
            return self._damaged(str(error))
        if _code(error) == sqlite3.SQLITE_FULL:
            return RunError(f"{self.path}: the disk is full ({error}). Free some space and run it again.")
        if _code(error) == sqlite3.SQLITE_BUSY:
            return RunError(f"{self.path}: another process holds this store of scores ({error}). Wait for it, or choose another file.")
        return UserError(f"{self.path}: cannot be used as a store of scores ({error}). Choose another file, in a folder you may write to.")


def _number(value: float | None) -> float | None:
    """NaN is stored as nothing."""
    return None if value is None or math.isnan(value) else value


def _code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
