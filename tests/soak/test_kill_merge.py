"""A merge of 200 MB models, killed with SIGKILL at twenty random moments and run again each time, ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import REPOSITORY

KILLS = 20
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
from modelglue.checkpoint import MergedCheckpoint, journal, open_checkpoint, plan, save
from modelglue.methods import get
import torch

journal.JOURNAL_BYTES = 16_000_000
plan.TASK_ELEMENTS = 2**20
out, *models = map(Path, sys.argv[1:])
base, *models = [open_checkpoint(path) for path in models]
parameters = {"weight": [0.6, 0.4], "density": [0.5, 0.7], "lambda": 1.0, "normalize": True, "rescale": False, "trim_scope": "tensor",
              "zero_sign": "plus"}
merged = MergedCheckpoint(get("ties"), models, base, parameters)
print("ready", flush=True)
report = save(merged, out, workers=2, shard_bytes=60_000_000)
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


def start(out: Path, models: list[Path]) -> subprocess.Popen[bytes]:
    """The driver, in a process group of its own, after it has opened the models."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "MODELGLUE_COMPILE": "off"}
    command = [sys.executable, "-c", DRIVER, str(out), *map(str, models)]
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
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    reference = tmp_path / "reference" / "out"
    process = start(reference, models)
    began = time.monotonic()
    assert finish(process) == 0
    duration = time.monotonic() - began
    expected = fingerprint(reference)
    assert len([name for name in expected if name.endswith(".safetensors")]) == 4

    dice = random.Random(20)
    kills, finished, resumed = 0, 0, 0
    out = tmp_path / "victim-0" / "out"
    while kills < KILLS:
        process = start(out, models)
        moment = dice.uniform(0, duration)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            # the rename may have been the last thing that it did
            assert not out.exists() or fingerprint(out) == expected, "no final name before the end"
            print(f"kill {kills} after {moment:.2f} of {duration:.2f} s", flush=True)
            continue
        resumed += finish(process) > 0
        assert fingerprint(out) == expected
        finished += 1
        out = tmp_path / f"victim-{finished}" / "out"
    resumed += finish(start(out, models)) > 0
    assert fingerprint(out) == expected
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"
    print(f"{finished + 1} outputs, {resumed} of them went on where a killed process had stopped", flush=True)
    assert resumed > 0
