"""Searches by several methods, killed with SIGKILL at twenty random moments and run again each time, find what an undisturbed one finds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelglue.search.journal import Journal
from modelglue.search.run import JOURNAL
from tests.conftest import REPOSITORY
from tests.search.kill_driver import OPTIONS

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
