"""Merges of 200 MB models by every method, killed with SIGKILL at fifty random moments and run again each time, end with the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.test_same_bytes import METHODS
from tests.conftest import REPOSITORY

KILLS = 50
#: 100 million elements of bfloat16, in tensors as different as those of a model
SHAPES = {
    "embed": (16_000, 1000),
    **{f"layers.{n}.weight": (2000, 2000) for n in range(20)},
    **{f"layers.{n}.norm": (2000,) for n in range(20)},
}

#: what `modelglue merge` does, journaling every 16 MB so that a 200 MB model has a journal worth killing
DRIVER = """
import sys
from pathlib import Path
from modelglue.checkpoint.output import journal, plan
from modelglue.checkpoint import open_checkpoint, save
from tests.checkpoint.test_same_bytes import merged
import torch

journal.JOURNAL_BYTES = 16_000_000
plan.TASK_ELEMENTS = 2**20
method, out, *models = sys.argv[1:]
expression = merged(method, [open_checkpoint(path) for path in models])
print("ready", flush=True)
report = save(expression, Path(out), workers=2, shard_bytes=60_000_000)
print(report.resumed_bytes, report.already_complete, flush=True)
"""


def write_models(folder: Path) -> list[Path]:
    paths = []
    for number in range(3):
        generator = torch.Generator().manual_seed(5)
        step = torch.Generator().manual_seed(number)
        tensors = {
            name: (torch.randn(shape, generator=generator) + (0.01 * torch.randn(shape, generator=step) if number else 0)).bfloat16()
            for name, shape in SHAPES.items()
        }
        path = folder / f"m{number}"
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "x"}')
        paths.append(path)
    return paths


def start(method: str, out: Path, models: list[Path]) -> subprocess.Popen[bytes]:
    """The driver, in a process group of its own, after it has opened the models."""
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": paths, "MODELGLUE_COMPILE": "off", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, method, str(out), *map(str, models)]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def finish(process: subprocess.Popen[bytes]) -> int:
    """Bytes that an earlier process had written."""
    output, error = process.communicate()
    assert process.returncode == 0, error.decode()
    return int(output.split()[0])


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.soak
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    dice = random.Random(20)
    kills = resumed = 0
    while kills < KILLS:
        for method in METHODS:
            killed, went_on = kill_one(method, models, tmp_path / method, dice)
            kills, resumed = kills + killed, resumed + went_on
            shutil.rmtree(tmp_path / method)
    print(f"{kills} kills, {resumed} runs went on where a killed process had stopped", flush=True)
    assert resumed > 0


def kill_one(method: str, models: list[Path], folder: Path, dice: random.Random) -> tuple[int, int]:
    """Up to three attempts on one output, and a last one that is left alone: how many were killed, and whether one told of earlier work.

    Who goes on has little left to do, and is often done, but not ended, when it is killed: then it tells nobody.
    """
    reference, out = folder / "reference" / "out", folder / "victim" / "out"
    process = start(method, reference, models)
    began = time.monotonic()
    assert finish(process) == 0
    duration = time.monotonic() - began
    expected = fingerprint(reference)
    assert len([name for name in expected if name.endswith(".safetensors")]) == 4
    kills = 0
    went_on = False
    for _ in range(dice.randint(1, 3)):
        process = start(method, out, models)
        moment = dice.uniform(0.05 * duration, 0.5 * duration)  # the rest is the end of the process
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            print(f"{method}: killed after {moment:.2f} of {duration:.2f} s", flush=True)
            # the rename may have been the last thing that it did
            assert not out.exists() or fingerprint(out) == expected, "no final name before the end"
            continue
        went_on = finish(process) > 0
        break
    went_on = finish(start(method, out, models)) > 0 or went_on
    assert fingerprint(out) == expected, method
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"
    return kills, int(went_on)
