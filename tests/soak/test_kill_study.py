"""Searches, killed with SIGKILL at twenty random moments and run again each time, find what an undisturbed one finds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modelglue.evaluation import ScoreStore
from modelglue.search.journal import Journal
from modelglue.search.run import JOURNAL
from modelglue.studies import run_search
from tests.checkpoint.killing import forked, kill_group, run_in_child
from tests.conftest import REPOSITORY
from tests.search.kill_driver import OPTIONS
from tests.small_zoo import write_yaml, write_zoo
from tests.studies.conftest import MEMBERS, SKILLS, outcome_of, search_file
from tests.studies.scoring_log import noted, scored_again

KILLS = 20
PAUSE = 0.004


def start(folder: Path, log: Path, name: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.search.kill_driver", str(folder), str(log), name, "-1", str(PAUSE)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()


@pytest.mark.soak
@pytest.mark.parametrize("name", OPTIONS)
def test_killed_at_twenty_moments(tmp_path: Path, name: str) -> None:
    generator = random.Random(name)
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    finish(start(tmp_path / "whole", tmp_path / "whole.log", name))
    duration = time.monotonic() - began
    expected = (tmp_path / "whole" / "report.json").read_text()
    requests = len((tmp_path / "whole.log").read_text().splitlines())
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    folder.mkdir()
    kills = 0
    while kills < KILLS and not (folder / "report.json").exists():
        process = start(folder, log, name)
        time.sleep(generator.uniform(0, 2 * duration / KILLS))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    if not (folder / "report.json").exists():
        finish(start(folder, log, name))
    assert (folder / "report.json").read_text() == expected
    assert len(log.read_text().splitlines()) <= requests + kills, "only what was in flight is scored again"
    with Journal(folder / JOURNAL, read_only=True) as killed, Journal(tmp_path / "whole" / JOURNAL, read_only=True) as whole:
        assert killed.events(trace=True) == whole.events(trace=True)
        assert killed.asked() == whole.asked()


@forked
@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["random", "evolution"])
def test_searches_over_models_killed_at_twenty_moments(tmp_path: Path, name: str, workers: int) -> None:
    """Workers and all, before or after any transaction of the journal or of the store of scores."""
    generator = random.Random(f"{name} {workers}")
    write_zoo(tmp_path, MEMBERS, SKILLS, items=12)
    searcher = {"random": {"trials": 20}, "evolution": {"population": 5, "generations": 4}}[name]
    file = write_yaml(tmp_path / "search.yaml", search_file(searcher={"name": name, **searcher}, fitness={"chunk": 6}))
    commits: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, method in ((ScoreStore, "add"), (Journal, "_write")):
            patch.setattr(owner, method, counted(getattr(owner, method), commits))
        whole = run_search(file, tmp_path / "whole").folder
    folder, log = tmp_path / "killed", tmp_path / "log"

    def search(calls: int, before: bool) -> None:
        left = [calls]
        with pytest.MonkeyPatch.context() as patch:
            noted(patch, log)
            for owner, method in ((ScoreStore, "add"), (Journal, "_write")):
                patch.setattr(owner, method, fatal(getattr(owner, method), left, before))
            run_search(file, folder, workers=workers)
            os._exit(0)

    kills = 0
    while kills < KILLS:
        point = (generator.randint(1, 2 * len(commits) // (KILLS + 10)), generator.random() < 0.5)
        ended = run_in_child(partial(search, *point))
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:
            break
        kills += 1
    assert kills == KILLS
    assert run_search(file, folder).folder == folder
    print(f"{name}, {workers} workers: {kills} kills in {len(commits)} transactions")
    assert outcome_of(folder) == outcome_of(whole)
    assert scored_again(log) == 0


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return wrapped


def fatal(function: Callable[..., Any], left: list[int], before: bool) -> Callable[..., Any]:
    """`function`, one of those that count down together; the last call kills the process group before or after its work."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and before:
            kill_group()
        result = function(*args, **kwargs)
        if left[0] == 0:
            kill_group()
        return result

    return wrapped
