"""The demo, killed with SIGKILL at twenty random moments and run again each time, ends with the same bytes."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.glue_runs import (
    assert_no_half_model,
    committed_items,
    computed_items,
    fingerprint,
    finish,
    kill_group,
    start_glue,
)

KILLS = 20


@pytest.mark.soak
def test_twenty_kills_change_nothing(tmp_path: Path, tiny_zoo: Path) -> None:
    glue_file = tiny_zoo / "zoo.yaml"
    reference = tmp_path / "reference"
    start = time.monotonic()
    finish(start_glue(glue_file, reference))
    duration = time.monotonic() - start
    expected = fingerprint(reference)

    # Moments are drawn over the work that a resumed run still has to do, so that all phases are hit.
    random.seed(20)
    victim = tmp_path / "victim"
    kills = 0
    while kills < KILLS:
        process = start_glue(glue_file, victim)
        moment = random.uniform(1.0, max(12.0, duration / 8))
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            kill_group(process)
            kills += 1
            assert_no_half_model(victim)
            print(f"kill {kills} after {moment:.1f} s, {committed_items(victim)} item scores committed", flush=True)
            continue
        finish(process)
        assert fingerprint(victim) == expected
        # Finished before all kills were spent: start another victim, so that late phases are killed too.
        check_nothing_scored_twice(victim, kills)
        victim = tmp_path / f"victim-{kills}"
    finish(start_glue(glue_file, victim))
    assert fingerprint(victim) == expected
    check_nothing_scored_twice(victim, kills)


def check_nothing_scored_twice(run: Path, kills: int) -> None:
    """No committed score is computed again; at most the batch in flight repeats at every kill."""
    computed, batch = computed_items(run)
    assert committed_items(run) <= computed <= committed_items(run) + kills * batch
