"""Searches on the command line: real candidates of a tiny model, run, resumed, reported, exported; files of other tools."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelglue.checkpoint import open_checkpoint
from modelglue.cli.progress import SearchListener, search_line
from modelglue.errors import RecipeError
from modelglue.recipe import merge
from modelglue.search import recorded
from modelglue.studies import limits_of, read_search, run_search
from tests.cli.conftest import Run
from tests.small_zoo import write_tasks, write_yaml, write_zoo

SKILLS = ("reverse", "larger")


def search_file(**groups: Any) -> dict[str, Any]:
    return {
        "zoo": "zoo.yaml", "members": ["reverse", "larger"],
        "tasks": {"include": "tasks", **{split: [f"{skill}_{split}" for skill in SKILLS] for split in ("proxy", "confirmation", "test")}},
        "searcher": {"name": "random", "trials": 4}, "budget": {"candidates": 4}, "finalists": 2, **groups,
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_zoo(folder, ["reverse", "larger"], SKILLS, items=8)
    write_yaml(folder / "search.yaml", search_file())
    return folder


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    return run_search(home / "search.yaml", home / "out").folder


def test_a_search_prints_its_findings(run: Run, home: Path, tmp_path: Path, done: Path) -> None:
    found = run("search", "run", home / "search.yaml", tmp_path / "out", "--store", done / "scores.sqlite", "--json")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert content["counts"]["candidates"] == 4
    assert content["stopped"] == "the searcher has converged"
    assert content["best"] == json.loads(json.dumps(recorded(done).to_json()["best"]))  # the same search anywhere
    assert [row["name"] for row in content["result"]["test"]["rivals"]] == ["reverse", "larger", "base", "uniform average"]
    assert len(content["confirmed"]) == 2
    assert Path(content["report"]).read_text().startswith("<!doctype html>")


def test_what_is_recorded_is_what_was_found(home: Path, done: Path) -> None:
    again = run_search(home / "search.yaml", done).report  # replayed from the journal
    there = recorded(done)
    assert [(one.id, one.status, one.value, dict(one.tasks)) for one in there.outcomes] == [
        (one.id, one.status, one.value, dict(one.tasks)) for one in again.outcomes
    ]
    assert there.best is not None
    assert again.best is not None
    assert there.best.id == again.best.id
    assert there.history() == again.history()
    assert there.bias == again.bias
    assert {id_: scores.items for id_, scores in there.confirmed.items()} == {id_: scores.items for id_, scores in again.confirmed.items()}


def test_resume_needs_no_file_and_scores_nothing(run: Run, done: Path) -> None:
    before = len(recorded(done).outcomes)
    found = run("search", "resume", done)
    assert found.code == 0, found.err
    assert "4 candidates" in found.text
    assert len(recorded(done).outcomes) == before


def test_the_written_model_is_its_printed_recipe(run: Run, done: Path, tmp_path: Path) -> None:
    printed = run("search", "export", done)
    (tmp_path / "recipe.yaml").write_text(printed.out)
    assert run("search", "export", done, "--best", tmp_path / "best").code == 0
    expected, written = merge(tmp_path / "recipe.yaml"), open_checkpoint(tmp_path / "best")
    assert list(written.names()) == list(expected.names())
    assert all(bool((written.tensor(name) == expected.tensor(name)).all()) for name in written.names())
    weights = [entry["weight"] for entry in yaml.safe_load(printed.out)["models"]]
    best = recorded(done).best
    assert best is not None
    assert best.proposal.candidate is not None
    assert weights == pytest.approx(best.proposal.candidate.weights, abs=1e-6)


def test_export_of_a_table_and_of_one_candidate(run: Run, done: Path, tmp_path: Path) -> None:
    assert run("search", "export", done, "--csv", tmp_path / "a.csv", "--quiet").code == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    recipe = json.loads(run("search", "export", done, "--candidate", "1", "--json").out)["recipe"]
    outcome = recorded(done).outcomes[1].proposal.candidate
    assert outcome is not None
    assert [entry["weight"] for entry in recipe["models"]] == pytest.approx(outcome.weights, abs=1e-6)
    assert run("search", "export", done, "--candidate", "99").code == 2


def test_the_report_stands_alone(run: Run, done: Path) -> None:
    assert run("search", "report", done).out.strip() == str(done / "search.html")
    page = (done / "search.html").read_text()
    assert "winner" in page
    assert "http://" not in page
    assert "uniform average" in page
    assert page.count("<details>") == 4


def test_members_may_be_recipes(home: Path, tmp_path: Path) -> None:
    file = search_file(
        zoo={"base": str(home / "models" / "base"), "models": [
            str(home / "models" / "reverse"),
            {"alias": "half", "recipe": {"method": "linear", "models": [
                {"model": str(home / "models" / "reverse"), "weight": 0.5}, {"model": str(home / "models" / "larger"), "weight": 0.5}]}},
        ]},
        members=["reverse", "half"], budget={"candidates": 1},
    )  # fmt: skip
    file["tasks"] = {"include": str(home / "tasks"), "proxy": ["reverse_proxy"]}
    found = run_search(write_yaml(tmp_path / "s.yaml", file), tmp_path / "out")
    assert found.report.counts["ok"] == 1
    assert found.result["test"] is None


def test_another_search_is_refused(run: Run, home: Path, done: Path, tmp_path: Path) -> None:
    other = write_yaml(home / "other.yaml", search_file(seed=7))
    found = run("search", "run", other, done)
    assert found.code == 2
    assert "seed was 0, is 7" in found.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sercher": "cma"}, ["s.yaml:", "sercher: unknown key. Did you mean 'searcher'?"]),
        ({"searcher": {"name": "cmaes"}}, ["searcher 'cmaes'", "cma"]),
        ({"members": ["reverse", "largr"]}, ["Did you mean 'larger'?"]),
        ({"budget": {"items": 0}}, ["budget.items: is 0, allowed is a number >= 1"]),
    ],
)
def test_faults_name_their_place(run: Run, home: Path, change: dict[str, Any], words: list[str]) -> None:
    write_yaml(home / "s.yaml", search_file(**change))
    found = run("search", "run", home / "s.yaml", home / "never")
    assert found.code == 2
    assert all(word in found.err for word in words), found.err
    assert not (home / "never" / "search.sqlite").exists()


def test_places_that_are_none(run: Run, home: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options, said in (
        (("--device", "cuda:9"), "device 'cuda:9': torch"),
        (("--executor", "slurm"), "Allowed are local, ray and ray://HOST:PORT."),
        (("--executor", "ray://head:10001"), "pip install 'modelglue[ray]'"),
    ):
        for command in (("run", home / "search.yaml", home / "nowhere"), ("resume", done)):
            found = run("search", *command, *options)
            assert found.code == 2
            assert said in found.err
    assert not (home / "nowhere").exists()


def test_no_search_is_an_error(run: Run, tmp_path: Path) -> None:
    for command in ("resume", "report", "export"):
        assert run("search", command, tmp_path).code == 2


def test_progress_says_when_it_ends() -> None:
    fields = {"best": 0.5, "best_candidate": 3, "candidates": 10, "items": 500, "seconds": 60.0}
    assert search_line(fields, {"items": 2000}) == "best 50.0 % (candidate 3), 10 candidates, 500 items, 1:00, about 3:00 left"
    assert search_line({**fields, "best": None}, {}) == "no score yet, 10 candidates, 500 items, 1:00"


class Screen:
    """A console that keeps what it is given, and a clock that is set."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.time = 0.0

    def print(self, line: str, **_: Any) -> None:
        self.lines.append(line)

    def now(self) -> float:
        return self.time


TOLD = {"best": 0.5, "best_candidate": 3, "candidates": 4, "items": 100, "seconds": 10.0}


def events(screen: Screen, listener: SearchListener) -> None:
    """Two batches, the second without a new best, candidates of both raced in parts; then the end."""
    for time, event, fields in (
        (5.0, "scored", {"split": "search", "items": 25}), (10.0, "told", TOLD), (14.0, "scored", {"split": "search", "items": 25}),
        (41.0, "scored", {"split": "search", "items": 20}), (42.0, "told", {**TOLD, "candidates": 6, "items": 145, "seconds": 42.0}),
        (50.0, "scored", {"split": "confirm", "items": 100}), (51.0, "scored", {"split": "confirm", "items": 100}), (52.0, "test", {}),
    ):  # fmt: skip
        screen.time = time
        listener(event, fields)


def test_progress_in_a_log() -> None:
    """A line per new best, one after a silence, one per stage."""
    screen = Screen()
    events(screen, SearchListener(screen, {"candidates": 8}, None, screen.now))  # type: ignore[arg-type]
    assert screen.lines == [
        "best 50.0 % (candidate 3), 4 candidates, 100 items, 0:10, about 0:10 left",
        "best 50.0 % (candidate 3), 4 candidates, 145 items, 0:41, about 0:41 left",
        "scoring the best again, on items that the search has not seen",
        "scoring on items that no decision has seen",
    ]


def test_progress_on_a_terminal() -> None:
    """The live line moves with every part that is scored."""
    screen, live = Screen(), list[str]()
    events(screen, SearchListener(screen, {"items": 200}, live.append, screen.now))  # type: ignore[arg-type]
    assert live == [
        "no score yet, 0 candidates, 25 items, 0:05, about 0:35 left",
        "best 50.0 % (candidate 3), 4 candidates, 100 items, 0:10, about 0:10 left",
        "best 50.0 % (candidate 3), 4 candidates, 125 items, 0:14, about 0:08 left",
        "best 50.0 % (candidate 3), 4 candidates, 145 items, 0:41, about 0:15 left",
        "best 50.0 % (candidate 3), 6 candidates, 145 items, 0:42, about 0:15 left",
    ]
    assert len(screen.lines) == 3


def test_progress_of_a_search_with_racing(run: Run, home: Path, tmp_path: Path) -> None:
    found = run("search", "run", write_yaml(home / "raced.yaml", search_file(fitness={"chunk": 4})), tmp_path / "out")
    lines = found.err.splitlines()
    assert re.fullmatch(r"best [0-9.]+ % \(candidate 0\), 1 candidates, [0-9]+ items, 0:[0-9]{2}, about 0:[0-9]{2} left", lines[0])
    assert lines[-2:] == ["scoring the best again, on items that the search has not seen", "scoring on items that no decision has seen"]


@pytest.mark.parametrize(
    ("fields", "candidates"),
    [
        ({}, 4), ({"budget": {"candidates": 3}}, 3), ({"searcher": "cma", "budget": {"items": 9, "seconds": 5.5}}, None),
        ({"searcher": {"name": "evolution", "population": 4, "generations": 5}, "budget": {}}, 20),
    ],
)  # fmt: skip
def test_when_a_search_ends(fields: dict[str, Any], candidates: int | None, home: Path, done: Path) -> None:
    file = read_search(write_yaml(home / "limits.yaml", search_file(**fields))).file
    assert limits_of(file) == {"candidates": candidates, "items": file.budget.items, "seconds": file.budget.seconds}
    assert limits_of(done)["candidates"] == 4


# -- files of other tools -----------------------------------------------------------------------------------------------------------


def genome(home: Path, **fields: Any) -> dict[str, Any]:
    models = [str(home / "models" / name) for name in ("reverse", "larger")]
    return {"genome": {"models": models, "merge_method": "linear", **fields}, "tasks": ["reverse_proxy"], "limit": 4}


def test_a_plan_of_mergekit_evolve_runs(run: Run, home: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", SKILLS, items=8)
    found = read_search(write_yaml(tmp_path / "evolve.yaml", genome(home)))
    assert found.file.searcher.options == {"trials": 100, "init": "vanilla"}
    assert found.file.members == ["reverse", "larger"]
    assert any("limit" in note for note in found.notes)
    assert any("apply_chat_template" in note for note in found.notes)
    short = {**found.file.model_dump(mode="json"), "budget": {"candidates": 2}}
    short["tasks"] = {"include": "tasks", "proxy": ["reverse_proxy"], "proxy_items": 4}
    done = run_search(write_yaml(tmp_path / "s.yaml", short), tmp_path / "out")
    first = done.report.outcomes[0].proposal.candidate
    assert first is not None
    assert [entry["weight"] for entry in first.recipe["models"]] == [0.5, 0.5]  # its search begins at equal weights
    assert len(done.report.confirmed) == 2


def test_a_configuration_of_mergenetic_is_read(tmp_path: Path) -> None:
    plan = {"pop_size": 7, "n_iter": 5, "models": {"it": "org/ita", "de": "org/deu"}, "base_model": "org/base", "metric": "acc",
            "tasks": {"search": {"it": "arc_it", "de": "arc_de", "base": "arc_en"}, "test": {"it": "arc_it", "de": "arc_de"}},
            "n_samples": 10, "dtype": "float16", "device": "cuda:0", "seed": 42}  # fmt: skip
    found = read_search(write_yaml(tmp_path / "m.yaml", plan))
    file = found.file
    assert (file.space.method, file.tasks.proxy, file.tasks.proxy_items) == ("dare_ties", ["arc_it:acc", "arc_de:acc"], 10)
    assert file.searcher.options == {"population": 7, "generations": 5, "objectives": "all"}
    assert (file.seed, file.dtype.store, file.tasks.test) == (42, "float16", ())
    assert {note.partition(":")[0] for note in found.notes} >= {"device", "mode gmpirt", "tasks.test"}
    with pytest.raises(RecipeError, match=r"m.yaml:8: tasks: names no task"):
        read_search(write_yaml(tmp_path / "m.yaml", {**plan, "tasks": None}))
