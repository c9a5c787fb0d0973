"""The memory of one search: an SQLite file to which rows are only ever added.

`run` says what is searched, `candidate` what was asked, `result` what was scored (a row per candidate and part, committed as soon as it is
known), `event` what happened in which order. A killed search loses what was being scored and nothing else; going on means asking
everything again, and finding the answers here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from modelglue.errors import ModelGlueError, RunError, UserError
from modelglue.recipe import Cost, Scores

#: name of this format ("mgst") and its version; SQLite keeps both in the file's header
_MARK = 0x6D677374
_VERSION = 1
_TABLES = ("run", "candidate", "result", "event")
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE candidate (
    id INTEGER PRIMARY KEY, batch INTEGER NOT NULL, tag TEXT NOT NULL, key TEXT, recipe TEXT, params TEXT NOT NULL, parents TEXT NOT NULL
);
CREATE TABLE result (
    candidate INTEGER NOT NULL REFERENCES candidate (id), split TEXT NOT NULL, part INTEGER NOT NULL, status TEXT NOT NULL,
    scores TEXT NOT NULL, error TEXT NOT NULL, items INTEGER NOT NULL, tokens INTEGER NOT NULL, computed INTEGER NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY (candidate, split, part)
) WITHOUT ROWID;
CREATE TABLE event (id INTEGER PRIMARY KEY, trace INTEGER NOT NULL, kind TEXT NOT NULL, fields TEXT NOT NULL);
{
    "".join(
        f"CREATE TRIGGER {table}_{what} BEFORE {what} ON {table} BEGIN SELECT RAISE(ABORT, 'rows are only added'); END;"
        for table in _TABLES
        for what in ("UPDATE", "DELETE")
    )
}
PRAGMA application_id = {_MARK};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_PATIENCE = 60.0


class ReplayError(UserError):
    """A search that goes on asks for something else than it did: another version of a library, or another evaluator."""


class NotBegunError(UserError):
    """No search has begun in this file; a process may have ended between making it and writing down what is searched."""


@dataclass(frozen=True)
class Asked:
    """A row of `candidate`."""

    id: int
    batch: int
    tag: str
    key: str | None
    recipe: str | None
    params: str
    parents: str


class Journal:
    """One search's file; use it as a context manager. Without a path it is kept in memory.

    UserError for a file that is damaged, is something else, or is in use by another process; such a file is not touched. RunError if the
    disk is full: what was committed stays.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._replayed = 0
        if path is not None and not read_only:
            self._lock = _locked(path)
        try:
            if read_only:
                if path is None or not path.is_file():
                    raise NotBegunError(f"{path}: there is no search. Run one first.")
                self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_PATIENCE)
            else:
                self._connection = sqlite3.connect(path or ":memory:", timeout=_PATIENCE)
            try:
                self._open(read_only)
            except BaseException:
                self._connection.close()
                raise
        except BaseException as error:
            self._unlock()
            if isinstance(error, sqlite3.Error):
                raise self._unusable(error) from error
            raise

    def _open(self, read_only: bool) -> None:
        query = self._connection.execute
        tables, mark, version = (
            query(text).fetchone()[0]
            for text in ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
        )  # fmt: skip
        if tables and mark != _MARK:
            raise UserError(f"{self.path}: is a database of something else, not a search. Choose another folder.")
        if tables and version != _VERSION:
            raise UserError(f"{self.path}: is a search of version {version}, this modelglue reads {_VERSION}. Choose another folder.")
        if tables:
            found = query("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise UserError(
                    f"{self.path}: is damaged ({found}). It was left as it is; restore it from a copy, or choose another folder."
                )
        if read_only and not (tables and self.run()):
            raise NotBegunError(f"{self.path}: a search was made ready here and did not begin. Run it.")
        if not read_only:
            query("PRAGMA journal_mode = WAL")
            query("PRAGMA synchronous = NORMAL")
            if not tables:
                self._connection.executescript(_SCHEMA)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- what is searched ----------------------------------------------------------------------------------------------------------

    def describe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write down what is searched, the first time; what was written then comes back every time."""
        known = self.run()
        if not known and values:
            self._write("INSERT INTO run VALUES (?, ?)", [(name, json.dumps(value, sort_keys=True)) for name, value in values.items()])
            known = self.run()
        return known

    def run(self) -> dict[str, Any]:
        return {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM run")}

    # -- candidates ----------------------------------------------------------------------------------------------------------------

    def asked(self) -> list[Asked]:
        """Every candidate, in the order of asking."""
        return [Asked(*row) for row in self._rows("SELECT id, batch, tag, key, recipe, params, parents FROM candidate ORDER BY id")]

    def ask(self, batch: Sequence[Asked]) -> None:
        """Add the candidates of a batch, or find them here already. ReplayError if others stand in their place."""
        first, last = batch[0].id, batch[-1].id
        known = [
            Asked(*row)
            for row in self._rows(
                "SELECT id, batch, tag, key, recipe, params, parents FROM candidate WHERE id BETWEEN ? AND ? ORDER BY id", first, last
            )
        ]
        for new, old in zip(batch, known, strict=False):
            if new != old:
                raise ReplayError(
                    f"{self.path}: candidate {new.id} of this search was {old.key or old.params} and would now be "
                    f"{new.key or new.params}: a library has another version than when the search began, or its settings changed. "
                    "Use the versions that the search's `run` table names, or start a new search from its results (warm start)."
                )
        if len(known) < len(batch):
            rows = [tuple(vars(one).values()) for one in batch[len(known) :]]
            self._write("INSERT INTO candidate VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    # -- results -------------------------------------------------------------------------------------------------------------------

    def result(self, candidate: int, split: str, part: int) -> Scores | None:
        """What was scored of a candidate in one part, or None."""
        rows = self._rows(
            "SELECT status, scores, error, items, tokens, computed, seconds FROM result WHERE candidate = ? AND split = ? AND part = ?",
            candidate, split, part,
        )  # fmt: skip
        return _scores(rows[0]) if rows else None

    def results(self, split: str) -> Iterator[tuple[int, Scores]]:
        """(candidate, scores) of every part of a split, in order."""
        columns = "candidate, status, scores, error, items, tokens, computed, seconds"
        for candidate, *row in self._rows(f"SELECT {columns} FROM result WHERE split = ? ORDER BY candidate, part", split):
            yield candidate, _scores(row)

    def add_result(self, candidate: int, split: str, part: int, scores: Scores) -> None:
        """Commit what was scored."""
        content = {"items": scores.items, "losses": scores.losses, "warnings": scores.warnings}
        cost = scores.cost
        row = (
            candidate,
            split,
            part,
            scores.status,
            json.dumps(content),
            scores.error,
            cost.items,
            cost.tokens,
            cost.computed,
            cost.seconds,
        )
        self._write("INSERT INTO result VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [row])

    # -- events --------------------------------------------------------------------------------------------------------------------

    def trace(self, kind: str, fields: Mapping[str, Any]) -> bool:
        """Add an event that is a function of the search alone, or find it here already (False). ReplayError if it was another one."""
        text = json.dumps(fields, sort_keys=True)
        rows = self._rows("SELECT kind, fields FROM event WHERE trace = 1 ORDER BY id LIMIT 1 OFFSET ?", self._replayed)
        self._replayed += 1
        if rows:
            if rows[0] != (kind, text):
                raise ReplayError(
                    f"{self.path}: event {self._replayed} of this search was {rows[0][0]} {rows[0][1]} and would now be {kind} {text}: "
                    "a library has another version, or the evaluator answers otherwise. Start a new search from its results (warm start)."
                )
            return False
        self._write("INSERT INTO event (trace, kind, fields) VALUES (1, ?, ?)", [(kind, text)])
        return True

    def note(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Add an event of this process: started, stopped."""
        self._write("INSERT INTO event (trace, kind, fields) VALUES (0, ?, ?)", [(kind, json.dumps(fields, sort_keys=True))])

    def events(self, *, trace: bool | None = None) -> list[tuple[str, dict[str, Any]]]:
        """(kind, fields) of every event in order; of the search's own (`trace`), of its processes (not `trace`), or of both."""
        where = "" if trace is None else f"WHERE trace = {int(trace)}"
        return [(kind, json.loads(fields)) for kind, fields in self._rows(f"SELECT kind, fields FROM event {where} ORDER BY id")]

    # -- SQLite --------------------------------------------------------------------------------------------------------------------

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """All rows in one transaction, or none."""
        try:
            with self._connection:
                self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _rows(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> ModelGlueError:
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        if primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return RunError(f"{self.path}: cannot be written ({error}). Free some space and resume the search; what was stored is kept.")
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return UserError(f"{self.path}: is damaged ({error}). It was left as it is; restore it from a copy, or choose another folder.")
        return UserError(f"{self.path}: cannot be used for a search ({error}). Choose another folder, one that you may write to.")


def as_text(value: Any) -> str:
    """Canonical JSON of parameters and the like."""
    return json.dumps(value, sort_keys=True)


def _locked(path: Path) -> IO[str]:
    """The lock beside the file, held until it is closed or the process ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error}). Choose another folder, one that you may write to.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise UserError(f"{path}: another process is running this search. Wait for it, or choose another folder.") from None
    return file


def _scores(row: Sequence[Any]) -> Scores:
    status, text, error, items, tokens, computed, seconds = row
    content = json.loads(text)
    cost = Cost(items, tokens, computed, seconds)
    return Scores(content["items"], tuple(content["warnings"]), status, content["losses"], cost, error)
