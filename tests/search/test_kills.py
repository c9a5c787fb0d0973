"""A search that is killed with SIGKILL and run again tells the same trace, and scores nothing again that was committed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelglue.search import SyntheticEvaluator, run_study
from modelglue.search.journal import Journal
from modelglue.search.run import JOURNAL
from tests.conftest import REPOSITORY
from tests.search.doubles import Counting
from tests.search.kill_driver import content, settings


def driver(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "tests.search.kill_driver", *arguments], env=environment, check=False, capture_output=True)


@pytest.mark.parametrize("name", ["coefficient", "cma"])
def test_killed_twice_and_run_again(tmp_path: Path, name: str) -> None:
    whole = Counting(SyntheticEvaluator(3, 2, 60))
    undisturbed = run_study(settings(name), whole, tmp_path / "whole", confirm=SyntheticEvaluator(3, 2, 60, split="confirm"))
    folder, log = tmp_path / "killed", tmp_path / "log"
    folder.mkdir()
    for where in (7, 13):
        found = driver(str(folder), str(log), name, str(where))
        assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    again = Counting(SyntheticEvaluator(3, 2, 60))
    report = run_study(settings(name), again, folder, confirm=SyntheticEvaluator(3, 2, 60, split="confirm"))
    assert content(report) == content(undisturbed)
    # each killed process had answered one request that it could not store
    assert len(log.read_text().splitlines()) - 2 + len(again.asked) == len(whole.asked)
    traces = []
    for place in ("whole", "killed"):
        with Journal(tmp_path / place / JOURNAL, read_only=True) as journal:
            traces.append((journal.asked(), journal.events(trace=True), list(journal.results("search"))))
    assert traces[0] == traces[1]
