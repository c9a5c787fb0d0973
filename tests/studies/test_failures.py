"""Candidates that cannot be scored, in searches over real models: each fails for its own reason, alone, and nothing else changes."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import Checkpoint
from modelglue.errors import MergeError, ModelGlueError
from modelglue.evaluation import ResidentModel
from modelglue.evaluation.members import Members
from modelglue.recipe import Candidate
from modelglue.search import recorded
from modelglue.search.journal import Journal
from modelglue.search.run import JOURNAL
from modelglue.studies import run_search
from modelglue.studies.study_folder import SCORES
from tests.checkpoint.killing import forked, run_in_child
from tests.cli.conftest import Run
from tests.cli.conftest import run as run  # the fixture
from tests.small_zoo import write_yaml
from tests.studies.conftest import journal_of, outcome_of, search_file, stored

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked, so that they see what is patched here")


def raised(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def no_room() -> None:
    torch.empty(2**48)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


#: number of the candidate -> what happens when it is put into the model, its status, and what is said
VICTIMS: Mapping[int, tuple[Callable[[], None], str, str]] = {
    1: (raised(MemoryError("no room")), "failed", "out of memory: no room"),
    3: (no_room, "failed", "out of memory: "),
    5: (raised(ValueError("odd")), "failed", "ValueError: odd"),
    7: (raised(MergeError("tensor 'w' comes out with NaN")), "invalid", "tensor 'w' comes out with NaN"),
    9: (lambda: None, "invalid", "the model answers NaN on 10 of 10 items"),  # its weights become NaN
    11: (kill_me, "failed", "the worker process died twice"),
}
NAN, KILLED = 9, 11


def acting(monkeypatch: pytest.MonkeyPatch, folder: Path, chosen: Mapping[int | None, Callable[[], None]]) -> None:
    """Candidates of the search in `folder` by number, and what happens when they are merged."""
    numbers = {outcome.proposal.candidate.key: outcome.id for outcome in recorded(folder).outcomes if outcome.proposal.candidate}
    expression, holding = Members.expression, ResidentModel.holding
    last: list[int | None] = [None]

    def merged(self: Members, candidate: Candidate) -> Checkpoint:
        number = last[0] = numbers.get(candidate.key)
        if number in chosen:
            chosen[number]()
        return expression(self, candidate)

    def held(self: ResidentModel, checkpoint: Checkpoint, content: str) -> Any:
        live = holding(self, checkpoint, content)
        if last[0] == NAN and NAN in chosen:
            with torch.no_grad():
                next(live.model.parameters()).fill_(float("nan"))
            self._content, self._values = None, {}  # it does not hold what it says
        return live

    monkeypatch.setattr(Members, "expression", merged)
    monkeypatch.setattr(ResidentModel, "holding", held)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_fails_for_its_own_reason(home: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    victims = {number: found for number, found in VICTIMS.items() if number != KILLED or workers > 1}
    expected = {outcome.id: outcome.value for outcome in recorded(alone).outcomes if outcome.id not in victims}
    with monkeypatch.context() as patch:
        acting(patch, alone, {number: act for number, (act, _, _) in victims.items()})
        found = run_search(home / "search.yaml", tmp_path / "out", workers=workers)
    outcomes = {outcome.id: outcome for outcome in found.report.outcomes}
    assert {id_: outcome.value for id_, outcome in outcomes.items() if id_ not in victims} == expected
    for number, (_, status, said) in victims.items():
        assert outcomes[number].status == status
        assert said in outcomes[number].scores.error
        assert outcomes[number].value == -math.inf
    assert found.report.best is not None
    assert found.report.best.id in expected
    assert (found.report.counts["failed"], found.report.counts["invalid"]) == (len(victims) - 2, 2)
    before = (tmp_path / "out" / "result.json").read_text()
    again = run_search(home / "search.yaml", tmp_path / "out")  # what failed has failed: it is not tried again
    assert again.report.spent == found.report.spent
    assert (tmp_path / "out" / "result.json").read_text() == before


def test_too_many_in_a_row_end_the_search_and_it_is_resumed(
    run: Run, home: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        acting(patch, alone, dict.fromkeys(range(12), no_room))
        failed = run("search", "run", home / "search.yaml", tmp_path / "out", "--quiet")
    assert failed.code == 1
    assert "in a row" in failed.err
    assert "out of memory" in failed.err
    assert [outcome.status for outcome in recorded(tmp_path / "out").outcomes] == ["failed"] * 8, "two batches of four"
    assert run("search", "resume", tmp_path / "out", "--quiet").code == 0
    statuses = [outcome.status for outcome in recorded(tmp_path / "out").outcomes]
    assert statuses == ["failed"] * 8 + ["ok"] * 4, "what failed has failed, the rest is scored"


@pytest.mark.parametrize("workers", [1, 2])
def test_who_hangs_is_ended(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Also where there is one worker. What was scored before needs no time, so that only the hanging one is ended."""
    few = {"tasks": {"include": "tasks", "proxy": ["reverse_proxy"]}}
    file = home / f"hanging-{workers}.yaml"
    run_search(write_yaml(file, search_file(**few, budget={"candidates": 3})), tmp_path)
    monkeypatch.setattr(ResidentModel, "holding", lambda *_: threading.Event().wait())
    found = run_search(write_yaml(file, search_file(**few, budget={"candidates": 4}, timeout=0.2)), tmp_path, workers=workers).report
    assert [outcome.status for outcome in found.outcomes] == ["ok", "ok", "ok", "failed"]
    assert found.outcomes[3].scores.error.endswith(": took longer than 0.2 seconds")


# -- files ------------------------------------------------------------------------------------------------------------------------


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "page":
        path.write_bytes(whole[:4096] + os.urandom(4096) + whole[8192:])
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.commit()
        connection.close()


@pytest.mark.parametrize("name", [JOURNAL, SCORES])
@pytest.mark.parametrize(("how", "said"), [("cut", "damaged"), ("page", "damaged"), ("version", "of version 99")])
def test_a_damaged_file_is_said_and_left_alone(run: Run, alone: Path, tmp_path: Path, name: str, how: str, said: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(alone, folder)
    content = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps({**content, "home": str(alone.parent)}))
    damaged(folder / name, how)
    before = [(folder / file).read_bytes() for file in (JOURNAL, SCORES)]
    for command in ("resume", "report") if name == JOURNAL else ("resume",):
        found = run("search", command, folder)
        assert found.code == 2
        assert str(folder / name) in found.err
        assert said in found.err
    assert [(folder / file).read_bytes() for file in (JOURNAL, SCORES)] == before


def test_a_search_that_runs_already(run: Run, alone: Path, tmp_path: Path) -> None:
    """It can be looked at, and not run a second time."""
    folder = shutil.copytree(alone, tmp_path / "out")
    content = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps({**content, "home": str(alone.parent)}))
    with Journal(folder / JOURNAL):
        found = run("search", "resume", folder)
        assert (found.code, f"{folder / JOURNAL}: another process is running this search. Wait for it" in found.err) == (2, True)
        assert run("search", "report", folder).code == 0
    assert run("search", "resume", folder, "--quiet").code == 0


@forked
@pytest.mark.parametrize("limit", [40_000, 90_000])
def test_a_full_disk_loses_nothing_that_was_stored(run: Run, home: Path, alone: Path, tmp_path: Path, limit: int) -> None:
    """No file may grow beyond the limit, so SQLite is refused in the midst of the search, as on a full disk."""
    folder, said = tmp_path / "out", tmp_path / "said"

    def search() -> None:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            run_search(home / "search.yaml", folder)
        except ModelGlueError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            said.write_text(str(error))
            os._exit(error.exit_code)

    assert run_in_child(search) == 1
    text = said.read_text()
    assert str(folder) in text
    assert "Free some space and" in text
    assert "what was" in text
    kept = set(stored(folder / SCORES))
    journal = journal_of(folder)
    assert run("search", "run", home / "search.yaml", folder, "--quiet").code == 0
    assert kept < set(stored(folder / SCORES))
    assert outcome_of(folder) == outcome_of(alone)
    assert journal_of(folder)[0][: len(journal[0])] == journal[0]
