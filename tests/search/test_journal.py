"""A search's file: what is written stays, what is damaged is said and left alone, one process at a time."""

from __future__ import annotations

import itertools
import math
import sqlite3
from pathlib import Path

import pytest

from modelglue.errors import RunError, UserError
from modelglue.recipe import Cost, Scores
from modelglue.search import recorded, warm_start
from modelglue.search.journal import Asked, Journal, NotBegunError, ReplayError
from modelglue.search.run import JOURNAL, read_settings

ROW = Asked(0, 0, "child", "key", "{}", '{"x": 1}', "[]")
SCORES = Scores({"t": {"a": 1.0, "b": 0.1 + 0.2}}, ("careful",), "ok", {"t": {"a": 0.5}}, Cost(2, 30, 2, 0.25))


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run" / "search.sqlite"
    with Journal(path) as journal:
        assert journal.describe({"settings": {"b": 1, "a": [0.1]}}) == {"settings": {"a": [0.1], "b": 1}}
        journal.ask([ROW])
        journal.add_result(0, "search", 0, SCORES)
        assert journal.trace("told", {"values": [1 / 3]})
        journal.note("began", {})
    with Journal(path) as journal:
        assert journal.describe({"settings": "other"}) == {"settings": {"a": [0.1], "b": 1}}
        assert journal.asked() == [ROW]
        assert journal.result(0, "search", 0) == SCORES
        assert journal.result(0, "search", 1) is None
        assert journal.result(0, "confirm", 0) is None
        assert list(journal.results("search")) == [(0, SCORES)]
        assert not journal.trace("told", {"values": [1 / 3]})
        assert journal.events() == [("told", {"values": [1 / 3]}), ("began", {})]
        assert journal.events(trace=False) == [("began", {})]


def test_nan_comes_back(tmp_path: Path) -> None:
    with Journal() as journal:
        journal.ask([ROW])
        journal.add_result(0, "search", 0, Scores({"t": {"a": math.nan}}, status="invalid", error="NaN"))
        found = journal.result(0, "search", 0)
    assert found is not None
    assert math.isnan(found.items["t"]["a"])
    assert (found.status, found.error) == ("invalid", "NaN")


def test_rows_are_only_added(tmp_path: Path) -> None:
    with Journal(tmp_path / "s") as journal:
        journal.ask([ROW])
        journal.add_result(0, "search", 0, SCORES)
        journal.note("began", {})
    connection = sqlite3.connect(tmp_path / "s")
    for statement in ("UPDATE result SET status = 'failed'", "DELETE FROM candidate", "DELETE FROM event", "UPDATE event SET kind = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="rows are only added"):
            connection.execute(statement)
    connection.close()


def test_another_candidate_or_event_in_the_same_place_is_refused() -> None:
    with Journal() as journal:
        journal.ask([ROW])
        journal.ask([ROW, Asked(1, 0, "child", "other", "{}", "{}", "[0]")])
        with pytest.raises(ReplayError, match=r"candidate 0 of this search was key and would now be kez.*warm start"):
            journal.ask([Asked(0, 0, "child", "kez", "{}", '{"x": 1}', "[]")])
        assert len(journal.asked()) == 2
        journal.trace("told", {"values": [1.0]})
        journal._replayed = 0
        with pytest.raises(ReplayError, match=r"event 1 of this search was told .*1.0.* would now be told .*2.0"):
            journal.trace("told", {"values": [2.0]})


def test_a_second_process_waits_outside(tmp_path: Path) -> None:
    with Journal(tmp_path / "s") as writer:
        writer.describe({"settings": {}})
        with pytest.raises(UserError, match="another process is running this search"):
            Journal(tmp_path / "s")
        with Journal(tmp_path / "s", read_only=True) as reader:
            assert reader.asked() == []
    with Journal(tmp_path / "s"):
        pass


def test_reading_needs_a_search_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no search"):
        Journal(tmp_path / "s", read_only=True)
    assert list(tmp_path.iterdir()) == []


def filled(path: Path) -> bytes:
    with Journal(path) as journal:
        for number in range(200):
            journal.ask([Asked(number, number, "child", f"key {number}", "{}" * 50, "{}", "[]")])
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["text", "cut", "overwritten", "another"])
def test_what_is_damaged_is_said_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s"
    whole = filled(path)
    if damage == "another":
        path.unlink()
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()
        connection.close()
    elif damage == "text":
        path.write_bytes(b"these are my notes, and there are enough of them to be no empty file" * 20)
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(whole[:8192] + b"\xff" * 4096 + whole[12288:])
    before = path.read_bytes()
    with pytest.raises(UserError, match="is a database of something else" if damage == "another" else "damaged"):
        Journal(path)
    assert path.read_bytes() == before


def test_another_version_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    connection = sqlite3.connect(tmp_path / "s")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(UserError, match="is a search of version 9, this modelglue reads 1"):
        Journal(tmp_path / "s")


def add_for_ever(journal: Journal) -> None:
    for number in itertools.count(1):
        journal.add_result(0, "search", number, SCORES)


def test_a_full_disk_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    with Journal(tmp_path / "s") as journal:
        journal.ask([ROW])
        pages = journal._rows("PRAGMA page_count")[0][0]
        journal._rows(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(RunError, match="Free some space and resume the search; what was stored is kept"):
            add_for_ever(journal)
        stored = len(list(journal.results("search")))
        assert stored
    with Journal(tmp_path / "s") as journal:
        assert len(list(journal.results("search"))) == stored
        assert journal.asked() == [ROW]
        journal.add_result(0, "search", stored + 1, SCORES)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        Journal(tmp_path / "file" / "search.sqlite")


def test_a_search_that_ended_before_it_was_written_down_has_not_begun(tmp_path: Path) -> None:
    with Journal(tmp_path / JOURNAL):
        pass
    for read in (read_settings, recorded, warm_start):
        with pytest.raises(NotBegunError, match="made ready here and did not begin"):
            read(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / JOURNAL).touch()
    with pytest.raises(NotBegunError):
        read_settings(tmp_path / "other")
