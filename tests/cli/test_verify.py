"""`modelglue verify`: exit codes, words and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.outputs import WEIGHTS, write_output
from tests.cli.conftest import Run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_output(tmp_path / "out")


@pytest.fixture
def damaged(output: Path) -> Path:
    save_file({**WEIGHTS, "model.layers.1.w": torch.full((), 8)}, output / "model.safetensors")
    return output


def test_all_is_well(run: Run, output: Path) -> None:
    found = run("verify", output)
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith("ok: 4 tensors, 248 B, hold the numbers that were written; ")
    assert run("verify", output, "--quiet").out == ""
    assert "not hashed" in run("verify", output, "--quick").out
    assert json.loads(run("verify", output, "--json").out) == {
        "folder": str(output), "tensors": 4, "bytes": 248, "hashed": True, "faults": [],
    }  # fmt: skip


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_damage(run: Run, damaged: Path, quiet: tuple[str, ...]) -> None:
    found = run("verify", damaged, *quiet)
    assert found.code == 1
    assert found.out == "model.layers.1.w: holds other numbers than were written\n"
    assert found.err == f"error: {damaged}: 1 of its tensors and files is not as it was written. Merge it again, or restore it.\n"
    assert run("verify", damaged, "--quick").code == 0
    found = run("verify", damaged, "--json")
    assert found.code == 1
    assert json.loads(found.out)["faults"] == [{"name": "model.layers.1.w", "fault": "holds other numbers than were written"}]


def test_no_record(run: Run, zoo: Path) -> None:
    found = run("verify", zoo / "a")
    assert (found.code, found.out) == (2, "")
    assert "holds no modelglue_record.json" in found.err
    assert run("verify", zoo / "nowhere").code == 2


def test_what_merge_wrote(run: Run, zoo: Path) -> None:
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet").code == 0
    assert run("verify", zoo / "out").code == 0
    path = zoo / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    found = run("verify", zoo / "out")
    assert found.code == 1
    assert len(found.out.splitlines()) == 1
    assert found.out.endswith(": holds other numbers than were written\n")
