"""The store of scores: nothing that was committed is ever lost, and nothing else is taken for a store."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import ModelGlueError, RunError, UserError
from modelglue.evaluation import ScoreStore
from modelglue.evaluation.items import Mark
from tests.checkpoint.killing import dying, forked, kill_group, run_in_child


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scores.sqlite"


def rows(path: Path) -> list[tuple[str, str, float | None]]:
    """(model, item, value) of every row, read by SQLite alone."""
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT models.key, item, value FROM scores JOIN models ON models.id = model ORDER BY 1, 2").fetchall()
    connection.close()
    return found


def marks(values: Mapping[str, float]) -> dict[str, Mark]:
    return {item: Mark(value) for item, value in values.items()}


def values(marks: Mapping[str, Mark]) -> dict[str, float]:
    return {item: mark.value for item, mark in marks.items()}


# -- values -----------------------------------------------------------------------------------------------------------------------


def test_what_was_added_is_known_ever_after(path: Path) -> None:
    with ScoreStore(path) as store:
        store.add("m", "a model", marks({"x": 1.0, "y": 0.25, "z": math.nan}))
        store.add("n", "another", marks({"x": 0.0}))
        assert values(store.known("m", ["x", "y", "w"])) == {"x": 1.0, "y": 0.25}
        assert store.counts() == (2, 4)
    with ScoreStore(path) as store:
        assert values(store.known("n", ["x", "y", "z"])) == {"x": 0.0}
        assert store.known("o", ["x"]) == {}
        value = store.known("m", ["z"])["z"].value
        assert value != value
    assert rows(path) == [("m", "x", 1.0), ("m", "y", 0.25), ("m", "z", None), ("n", "x", 0.0)]


def test_more_items_than_a_query_takes(path: Path) -> None:
    scores = {f"{number}": number / 4096 for number in range(2100)}
    with ScoreStore(path) as store:
        store.add("n", "", marks(dict.fromkeys(scores, 0.5)))
        store.add("m", "", marks(scores))
        assert values(store.known("m", ["other", *scores, "0"])) == scores
        assert store.asked() == (1, 2101)


def test_a_value_that_is_there_stays(path: Path) -> None:
    with ScoreStore(path) as store:
        store.add("m", "first", marks({"x": 1.0}))
        store.add("m", "second", marks({"x": 0.0, "y": 0.5}))
        assert values(store.known("m", ["x", "y"])) == {"x": 1.0, "y": 0.5}
        assert store.counts() == (1, 2)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("mn"), st.dictionaries(st.text(max_size=5), st.floats(0, 1) | st.just(math.nan), max_size=5)), max_size=5
    )
)
def test_a_store_is_a_dictionary_that_keeps_first_values(batches: list[tuple[str, dict[str, float]]]) -> None:
    expected: dict[tuple[str, str], float] = {}
    with ScoreStore(":memory:") as store:
        for model, scored in batches:
            store.add(model, "", marks(scored))
            for item, value in scored.items():
                expected.setdefault((model, item), value)
        names = [item for _, scored in batches for item in scored]
        found = {(model, item): value for model in "mn" for item, value in values(store.known(model, names)).items()}
        assert store.counts() == (len({model for model, _ in batches}), len(expected))
    assert {key: repr(value) for key, value in found.items()} == {key: repr(value) for key, value in expected.items()}


def test_opening_a_store_changes_nothing(path: Path) -> None:
    with ScoreStore(path) as store:
        store.add("m", "", marks({"x": 1.0}))
    before = path.read_bytes()
    with ScoreStore(path) as store:
        assert values(store.known("m", ["x"])) == {"x": 1.0}
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.sqlite"]


# -- several processes ------------------------------------------------------------------------------------------------------------


@forked
def test_processes_write_at_once(path: Path) -> None:
    """They create the store together, too."""

    def write(writer: int) -> None:
        gate.wait()  # all start together
        with ScoreStore(path) as store:
            for batch in range(25):
                store.add("m", "", marks({f"{writer}-{batch}-{item}": item / 8 for item in range(8)}))
                store.add("shared", "", marks({f"{batch}": 0.5}))

    processes = multiprocessing.get_context("fork")
    gate = processes.Barrier(4)
    writers = [processes.Process(target=write, args=(writer,)) for writer in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads; the children do nothing but write
        for writer in writers:
            writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    with ScoreStore(path) as store:
        assert store.counts() == (2, 4 * 25 * 8 + 25)
        assert values(store.known("m", ["3-24-7", "0-0-0"])) == {"3-24-7": 0.875, "0-0-0": 0.0}


@forked
@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize("before", [False, True])
def test_a_writer_that_is_killed_loses_the_batch_in_flight_at_most(path: Path, calls: int, before: bool) -> None:
    def write() -> None:
        with ScoreStore(path) as store:
            commit = dying(ScoreStore.add, calls, before=before)
            for batch in range(10):
                commit(store, "m", "", marks({f"{batch}-{item}": 1.0 for item in range(100)}))

    assert run_in_child(write) == -signal.SIGKILL
    kept = calls - before
    with ScoreStore(path) as store:
        assert store.counts() == (min(kept, 1), kept * 100)
        store.add("m", "", marks({"new": 0.0}))
    assert len(rows(path)) == kept * 100 + 1


@forked
def test_a_writer_that_is_killed_inside_a_batch(path: Path) -> None:
    """All of a batch or none of it: here SQLite itself is interrupted, after some of the batch's rows."""

    def write() -> None:
        with ScoreStore(path) as store:
            store.add("m", "", marks({"a": 1.0, "b": 1.0}))
            store._connection.set_progress_handler(kill_group, 1000)
            store.add("m", "", marks({str(number): 1.0 for number in range(1000)}))

    assert run_in_child(write) == -signal.SIGKILL
    assert rows(path) == [("m", "a", 1.0), ("m", "b", 1.0)]


# -- refused ----------------------------------------------------------------------------------------------------------------------


def refused(path: Path, kind: type[ModelGlueError] = UserError) -> str:
    with pytest.raises(ModelGlueError) as caught:
        ScoreStore(path)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("content", [b"accuracy: 0.5\n" * 100, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_file_that_is_no_database(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "cannot be used as a store of scores" in refused(path)
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_database_of_something_else(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE holidays (day TEXT)")
    connection.close()
    before = path.read_bytes()
    assert "is a database of something else, not a store of scores. Choose another file." in refused(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [0, 3, 99])
def test_a_store_of_another_version(path: Path, version: int) -> None:
    ScoreStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    assert f"is a store of version {version}, this modelglue reads version 2. Choose another file." in refused(path)


def test_a_folder_or_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "unable to open database file" in refused(tmp_path / "folder")
    assert "unable to open database file" in refused(tmp_path / "gone" / "scores.sqlite")
    assert not (tmp_path / "gone").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "in a folder you may write to" in refused(tmp_path / "scores.sqlite")
    finally:
        tmp_path.chmod(0o700)


def test_a_store_that_may_not_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SQLite says where permissions forbid writing, for root too."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **_: connect(f"file:{path}?mode=ro", uri=True))
    assert "cannot be used as a store of scores (unable to open database file)" in refused(path)
    connect(path).close()
    path.touch()
    assert "cannot be used as a store of scores (attempt to write a readonly database)" in refused(path)


def large_store(path: Path) -> bytearray:
    with ScoreStore(path) as store:
        store.add("m", "", marks({f"{number:064}": 1.0 for number in range(1000)}))
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("page", [1, 2, 12])
def test_a_damaged_store(path: Path, page: int) -> None:
    """One page of many is enough, and it is found before anything is written."""
    content = large_store(path)
    content[4096 * page : 4096 * (page + 1)] = b"\xaa" * 4096
    path.write_bytes(content)
    assert re.search(r"this store of scores is damaged \(.+\)\. Nothing was written to it\. Restore it from a copy", refused(path))
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_store_that_is_cut_off(path: Path) -> None:
    content = large_store(path)[: 4096 * 9 + 100]
    path.write_bytes(content)
    assert "is damaged" in refused(path)
    assert path.read_bytes() == content


def test_a_store_that_is_damaged_while_it_is_open(path: Path) -> None:
    content = large_store(path)
    with ScoreStore(path) as store:
        path.write_bytes(content[:4096] + b"\xaa" * (len(content) - 4096))
        for call in (lambda: store.known("m", ["x"]), store.counts, lambda: store.add("m", "", marks({"new": 1.0}))):
            store._connection.execute("PRAGMA shrink_memory")  # forget the pages that were read
            with pytest.raises(UserError, match=f"{path}: this store of scores is damaged"):
                call()


def test_a_store_of_version_1_keeps_its_scores(path: Path) -> None:
    """It had values alone."""
    connection = sqlite3.connect(path)
    connection.executescript(
        """CREATE TABLE models (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, description TEXT NOT NULL);
        CREATE TABLE scores (model INTEGER NOT NULL REFERENCES models (id), item TEXT NOT NULL, value REAL, PRIMARY KEY (model, item))
        WITHOUT ROWID;
        INSERT INTO models VALUES (1, 'm', ''); INSERT INTO scores VALUES (1, 'x', 0.5);
        PRAGMA application_id = 0x6D677363; PRAGMA user_version = 1;"""
    )
    connection.close()
    for _ in range(2):
        with ScoreStore(path) as store:
            store.add("m", "", {"y": Mark(1.0, 0.25, "abc", 7)})
            assert store.known("m", ["x", "y"]) == {"x": Mark(0.5), "y": Mark(1.0, 0.25, "abc", 7)}


def test_a_mark_is_kept_whole(path: Path) -> None:
    found = {"x": Mark(0.5, 1.25, None, 3), "y": Mark(0.0, None, "0123456789abcdef", 12), "z": Mark(1.0, math.inf)}
    with ScoreStore(path) as store:
        store.add("m", "", found)
    with ScoreStore(path) as store:
        assert store.known("m", list(found)) == found


# -- no room ----------------------------------------------------------------------------------------------------------------------


def small_disk(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """Databases may have so many pages; SQLite says then what it says on a full disk."""
    connect = sqlite3.connect

    def small(path: str, **options: float) -> sqlite3.Connection:
        connection = connect(path, **options)
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch, 8)
    batches = [{f"{batch}-{item:064}": 1.0 for item in range(50)} for batch in range(10)]
    added = []
    with ScoreStore(path) as store:

        def fill() -> None:
            for batch in batches:
                store.add("m", "", marks(batch))
                added.append(batch)

        with pytest.raises(RunError, match=f"{path}: scores cannot be written .*full.*Free some space and run it again") as caught:
            fill()
        assert caught.value.exit_code == 1
        assert 1 <= len(added) < 10
        assert store.known("m", list(batches[len(added)])) == {}
        assert store.counts() == (1, 50 * len(added))
    assert len(rows(path)) == 50 * len(added)


def test_a_disk_that_is_full_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch, 1)
    assert "the disk is full" in refused(path, RunError)


class Busy(sqlite3.Connection):
    """Another process is creating the file: the switch to write-ahead logging is refused a few times, without any waiting by SQLite."""

    refusals = 0

    def execute(self, query: str, *arguments: Any) -> sqlite3.Cursor:
        if query == "PRAGMA journal_mode = WAL" and Busy.refusals:
            Busy.refusals -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error
        return super().execute(query, *arguments)


def test_a_store_that_another_process_is_creating(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, factory=Busy, **options))
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    Busy.refusals = 3
    ScoreStore(path).close()
    assert (Busy.refusals, len(waits)) == (0, 3)
    monkeypatch.setattr("modelglue.evaluation.store._PATIENCE", -1.0)
    Busy.refusals = 1
    assert "another process holds this store of scores (database is locked). Wait for it" in refused(path, RunError)


def test_a_store_that_somebody_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.evaluation.store._PATIENCE", 0.0)
    with ScoreStore(path) as store:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match=r"scores cannot be written \(database is locked\)\. Wait for the process that holds it"):
            store.add("m", "", marks({"x": 1.0}))
        holder.execute("ROLLBACK")
        holder.close()
        store.add("m", "", marks({"x": 1.0}))
        assert store.counts() == (1, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are listed in /proc")
def test_what_was_refused_is_closed(path: Path) -> None:
    path.write_bytes(b"no database, and long enough to be looked at" * 10)
    refused(path)
    assert path not in [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
