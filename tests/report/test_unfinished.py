"""A stopped run gives a page that says how far it is; what is no run, or is broken, gives an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modelglue.errors import CheckpointError, UserError
from modelglue.report import write_report
from tests.report.conftest import Runs
from tests.report.fake_run import STEPS
from tests.report.tree import Node, parse

NAMES = ["description of the zoo", "similarities", "families", "ranking", "merges", "experts and outcome", "final comparison", "recipe"]
#: files that are there, lines of the log that are there -> steps that are done, sections of the page
STOPPED = {
    "zoo": (2, 1, 1, ["zoo", "cost"]),
    "similarity": (3, 2, 2, ["families", "zoo", "cost"]),
    "families": (4, 2, 3, ["families", "zoo", "cost"]),
    "ranking": (4, 7, 4, ["families", "zoo", "cost"]),
    "selection": (4, 8, 5, ["families", "zoo", "cost"]),
    "decisions": (5, 10, 6, ["families", "ranking", "merging", "experts", "zoo", "cost"]),
    "results": (6, 12, 7, ["results", "families", "ranking", "merging", "experts", "zoo", "cost"]),
}


def stop(run: Path, files: int, lines: int) -> None:
    """Take away what later steps would have written."""
    for name in STEPS[files:]:
        (run / name).unlink()
    marker = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**marker, "complete": False}))
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(log[:lines]))


def page_of(run: Path) -> Node:
    return parse(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize("step", STOPPED)
def test_a_stopped_run_says_how_far_it_is(copy: Callable[[], Path], step: str) -> None:
    files, lines, done, sections = STOPPED[step]
    run = copy()
    stop(run, files, lines)
    page = page_of(run)
    assert [section.attributes["id"] for section in page.all("section")] == sections
    assert [link.attributes["href"] for link in page.one("nav").all("a")] == [f"#{name}" for name in sections]
    steps = page.one("ol", "progress").nodes
    assert [item.text for item in steps] == [
        f"{name} done" if number < done else f"{name} next" if number == done else name for number, name in enumerate(NAMES)
    ]
    assert "The run is not finished." in page.one("header").text
    decided = files >= 5
    assert (page.one("h1").text == "This run has not decided anything yet") == (not decided)


def test_a_finished_run_shows_no_steps(runs: Runs) -> None:
    assert not runs.page("plain").all("ol", "progress")
    assert "not finished" not in runs.page("plain").text


def test_before_the_final_comparison_the_confirmation_is_shown(copy: Callable[[], Path]) -> None:
    run = copy()
    stop(run, 5, 10)
    outcome = json.loads((run / "decisions.json").read_text())["outcome"]
    header = page_of(run).one("header")
    gain, low, high = outcome["interval_vs_best_single"]
    assert [node.text for node in header.all("div", "big")] == [
        f"{100 * outcome['score']:.1f}", f"{100 * (outcome['score'] - gain):.1f}", f"{100 * gain:+.1f}",
    ]  # fmt: skip
    assert f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}, paired" in header.text
    assert "on confirmation items, which decisions have seen" in header.text


def test_without_families_the_matrix_is_shown_in_the_order_of_the_zoo(copy: Callable[[], Path]) -> None:
    run = copy()
    stop(run, 3, 2)
    page = page_of(run)
    picture = page.one("svg", "heatmap")
    assert len(picture.all("g", "cell")) == 121
    assert not picture.all("rect", "family-box")
    assert not picture.all("g", "below")
    aliases = [model["alias"] for model in json.loads((run / "zoo.json").read_text())["models"]]
    assert [cell.one("title").children[0] for cell in picture.all("g", "same")] == aliases
    assert not page.by_id("families").all("ul", "groups")


@pytest.mark.parametrize("log", [None, "", "\n\n", "{torn", '[1]\n{"event": 3}\n{"no": "event"}\n', '{"event": "note"}\n'])
def test_a_log_without_times_gives_no_times(copy: Callable[[], Path], log: str | None) -> None:
    run = copy()
    (run / "log.jsonl").unlink()
    if log is not None:
        (run / "log.jsonl").write_text(log)
    page = page_of(run)
    assert not page.by_id("cost").all("div", "times")
    assert not page.by_id("cost").all("p", "finding")


def test_a_log_is_read_line_by_line(copy: Callable[[], Path]) -> None:
    """Torn lines, blank lines and bytes that are no text between whole lines; a line separator inside a name ends no line."""
    run = copy()
    lines = [
        b'{"event": "ranking", "seconds": 1.0, "time": 0}', b"", b'{"event": "ranking", "sec', b"\xff\xfe",
        '{"event": "ranking", "seconds": 2.5, "note": "a\u2028b", "time": 86400}'.encode(),
    ]  # fmt: skip
    (run / "log.jsonl").write_bytes(b"\n".join(lines))
    cost = page_of(run).by_id("cost")
    assert [[cell.text for cell in cells] for cells in cost.one("table", "weights").rows()] == [
        ["ranking", "", "100.0 %", "3.5 s"], ["together", "", "", "3.5 s"],
    ]  # fmt: skip
    assert cost.one("p", "finding").text == "3.5 s in all."
    assert "First entry 1970-01-01 00:00:00 UTC, last 1970-01-02 00:00:00 UTC." in cost.text


def test_a_run_without_test_items_says_that_its_scores_flatter(runs: Runs) -> None:
    page = runs.page("no-test")
    assert "on confirmation items, which decisions have seen, so they flatter the result" in page.one("header").text
    assert page.by_id("results").one("p", "lead").text == "Every model on confirmation items, which decisions have seen."
    assert "no decision has seen" in runs.page("plain").by_id("results").one("p", "lead").text


def test_a_zoo_of_one_model_has_nothing_to_compare(runs: Runs) -> None:
    page = runs.page("one-model")
    assert page.one("h1").text == "No merge and no mixture beats the best single model, reverse"
    findings = [part.text for part in page.all("p", "finding")]
    assert findings[:5] == [
        "There is no other model to compare the result with.",
        "Only one model: nothing to group.",
        "reverse is alone.",
        "No family has two members: there was nothing to merge.",
        "1 representative, no router: nothing to route.",
    ]
    assert "The result against every other model" not in [head.text for head in page.all("h3")]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder\. Give the folder that `modelglue glue` wrote\."):
        write_report(tmp_path / "nowhere")


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match="file: no such folder"):
        write_report(tmp_path / "file")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json, so it is no modelglue-run/1 folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("marker", ['{"format": "modelglue-run/2"}', "[]", "{}", '"modelglue-run/1"'])
def test_a_run_of_another_format(copy: Callable[[], Path], marker: str) -> None:
    run = copy()
    (run / "run.json").write_text(marker)
    with pytest.raises(UserError, match=r"holds a run\.json of another format"):
        write_report(run)


def test_a_run_that_measured_nothing(copy: Callable[[], Path]) -> None:
    run = copy()
    (run / "zoo.json").unlink()
    with pytest.raises(UserError, match=r"nothing was measured here \(zoo\.json is missing\)"):
        write_report(run)


JSON = ["zoo.json", "families.json", "decisions.json", "results.json"]


@pytest.mark.parametrize("name", ["run.json", *JSON])
@pytest.mark.parametrize("content", [b'{"models": [', b"", b"\xff\xfe{}"], ids=["torn", "empty", "no-text"])
def test_a_broken_file_is_named(copy: Callable[[], Path], name: str, content: bytes) -> None:
    run = copy()
    (run / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        write_report(run)
    assert str(caught.value).startswith(f"{run / name}: is not JSON (")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", JSON)
def test_a_file_without_its_keys_is_named(copy: Callable[[], Path], name: str) -> None:
    run = copy()
    whole = json.loads((run / name).read_text())
    for key in whole:
        (run / name).write_text(json.dumps({other: value for other, value in whole.items() if other != key}))
        with pytest.raises(UserError, match=rf"holds no {key}, so this version of modelglue did not write it") as caught:
            write_report(run)
        assert str(caught.value).startswith(f"{run / name}: ")
    (run / name).write_text("[1, 2]")
    with pytest.raises(UserError, match="did not write it"):
        write_report(run)


def test_a_broken_matrix_is_named(copy: Callable[[], Path]) -> None:
    run = copy()
    (run / "similarity.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(CheckpointError, match=r"similarity\.safetensors"):
        write_report(run)


def test_a_file_that_cannot_be_read_is_named(copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy()
    read = Path.read_text

    def refuse(path: Path, *args: object, **named: object) -> str:
        if path.name == "families.json":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"families\.json: cannot be read \(Permission denied\)"):
        write_report(run)


def test_a_page_that_cannot_be_written_leaves_nothing_behind(copy: Callable[[], Path]) -> None:
    run = copy()
    (run / "report.html").mkdir()
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(Exception, match=r"report\.html") as caught:
        write_report(run)
    assert type(caught.value).__module__ == "modelglue.errors"
    assert sorted(path.name for path in run.iterdir()) == before
