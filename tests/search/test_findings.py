"""The report of a search, and what other tools are given of it."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelglue.recipe import Candidate, Scores
from modelglue.search import SearchReport, SearchSettings, SyntheticEvaluator, run_study
from modelglue.search.event_file import _masked, crc32c
from modelglue.search.export import to_csv, to_tensorboard
from modelglue.search.findings import winners_curse
from modelglue.search.objective import Objective
from tests.search.doubles import Counting


def report(**fields: Any) -> SearchReport:
    evaluator = Counting(SyntheticEvaluator(3, 2, 60))
    evaluator.before = lambda candidate, number: Scores({}, status="failed", error="lost") if number == 5 else None
    config = SearchSettings(members=("m0", "m1", "m2"), searcher={"name": "random", "trials": 20}, **fields)  # type: ignore[arg-type]
    return run_study(config, evaluator, None, confirm=SyntheticEvaluator(3, 2, 60, split="confirm"))


def test_a_report_is_json_and_adds_up() -> None:
    found = report()
    data = json.loads(json.dumps(found.to_json()))
    assert data["counts"]["ok"] + data["counts"]["pruned"] + data["counts"]["failed"] == 20
    assert data["counts"]["failed"] == 1
    history = data["history"]
    assert [row["id"] for row in history] == list(range(20))
    assert history[-1]["items"] == data["spent"]["items"]
    best = -math.inf
    for row in history:
        if row["status"] == "ok":
            best = max(best, row["value"])
        assert row["best"] == best
    assert data["best"]["confirmed"] == max(entry["score"] for entry in data["confirmed"])
    assert Candidate.of(data["best"]["recipe"]) == found.best.proposal.candidate  # type: ignore[union-attr]
    assert data["hypervolume"] > 0
    assert any("lost" in text for text in data["warnings"])
    for task, entry in data["by_task"].items():
        assert entry["tasks"][task] == max(row["tasks"][task] for row in history if row["status"] == "ok")


def test_the_winners_curse_is_the_error_times_the_root_of_two_logs() -> None:
    """160 of 400 right: standard error sqrt(0.4 * 0.6 / 400), and a hundred candidates."""
    scores = Scores({"t": {str(number): float(number < 160) for number in range(400)}})
    assert winners_curse(scores, 100) == pytest.approx(math.sqrt(0.24 / 400) * math.sqrt(2 * math.log(100)), rel=0.06)
    assert winners_curse(scores, 1) is None
    assert winners_curse(Scores({"t": {"*": 0.5}}), 100) is None


def test_a_search_that_found_nothing_has_a_report() -> None:
    found = run_study(
        SearchSettings(members=("m0", "m1"), budget={"items": 1}),
        SyntheticEvaluator(2, 1, 50),
        None,  # type: ignore[arg-type]
    )
    assert found.best is None
    assert found.to_json()["front"] == []
    assert found.stopped == "the budget is spent"


def test_items_that_tell_nothing_apart_are_named() -> None:
    evaluator = Counting(SyntheticEvaluator(2, 1, 10))
    evaluator.before = lambda candidate, number: Scores({"t0": dict.fromkeys(evaluator.items("t0"), 1.0)})
    found = run_study(SearchSettings(members=("m0", "m1"), searcher={"name": "average"}), evaluator, None)  # type: ignore[arg-type]
    assert "the items cannot tell these candidates apart: every one scores 1.0000." in found.warnings


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (Objective(), 0.5), (Objective("worst"), 0.2), (Objective("weighted", {"a": 3.0}), 0.65),
        (Objective("chebyshev"), -0.8), (Objective("chebyshev", {"b": 0.1}, {"a": 0.9}), -0.1),
    ],
)  # fmt: skip
def test_objectives(objective: Objective, value: float) -> None:
    assert objective({"a": 0.8, "b": 0.2}) == pytest.approx(value)


def test_a_table_of_all_candidates() -> None:
    found = report()
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert list(rows[0]) == [
        "id", "tag", "status", "value", "best", "items", "task:t0", "task:t1", "param:weight[0]", "param:weight[1]", "param:weight[2]"
    ]  # fmt: skip
    assert len(rows) == 20
    for row, outcome in zip(rows, found.outcomes, strict=True):
        assert row["status"] == outcome.status
        assert row["value"] == ("" if outcome.status == "failed" else repr(outcome.value))
        assert [float(row[f"param:weight[{n}]"]) for n in range(3)] == outcome.proposal.params["weight"]


def read_events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, number), read by the format's description, every checksum checked."""
    data, found = path.read_bytes(), dict[str, list[tuple[int, float]]]()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        body, data, sums = data[12 : 12 + size], data[16 + size :], (data[8:12], data[12 + size : 16 + size])
        assert [struct.unpack("<I", one)[0] for one in sums] == [_masked(struct.pack("<Q", size)), _masked(body)]
        event = fields(body)
        for value in repeated(event.get(5, b"")):
            one = fields(value)
            found.setdefault(one[1].decode(), []).append((event[2], struct.unpack("<f", one[2])[0]))
    return found


def repeated(data: bytes) -> list[Any]:
    """The parts of a message whose only field is number 1."""
    return [value for _, value in pairs(data)]


def fields(data: bytes) -> dict[int, Any]:
    return dict(pairs(data))


def pairs(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, content) of a protocol buffer."""
    while data:
        key, data = varint(data)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, data = varint(data)
            yield field, value
        else:
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, data = varint(data)
            yield field, data[:size]
            data = data[size:]


def varint(data: bytes) -> tuple[int, bytes]:
    value = 0
    for place, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, data[place + 1 :]
    raise AssertionError("cut off")


def test_checksums() -> None:
    """The examples of RFC 3720, B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([255] * 32)) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_tensorboard_events(tmp_path: Path) -> None:
    found = report()
    count = to_tensorboard(found, tmp_path / "events")
    assert to_tensorboard(found, tmp_path / "events") == count
    (path,) = (tmp_path / "events").iterdir()
    events = read_events(path)
    history = found.history()
    assert count == sum(map(len, events.values())) > 20
    assert events["search/best"] == [(row["id"], pytest.approx(row["best"])) for row in history]
    assert events["search/value"] == [(row["id"], pytest.approx(row["value"])) for row in history if row["value"] is not None]
    assert events["search/task/t1"] == [(row["id"], pytest.approx(row["tasks"]["t1"])) for row in history if row["tasks"]]


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = report()
    to_tensorboard(found, tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("search/best")] == pytest.approx([row["best"] for row in found.history()])
