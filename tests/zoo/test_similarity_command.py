"""`modelglue similarity`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from modelglue.adapters import extract_lora
from modelglue.checkpoint import open_checkpoint
from modelglue.cli.app import main
from modelglue.zoo import Similarity

if TYPE_CHECKING:
    from pathlib import Path


def run(*tokens: str) -> int:
    try:
        main(["similarity", *tokens])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def folders(tiny_zoo: Path, *names: str) -> list[str]:
    return [str(tiny_zoo / "models" / name) for name in names]


def test_prints_matrix_and_families(tiny_zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*folders(tiny_zoo, "reverse", "sort", "drifted", "stranger")) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[1].split()[:3] == ["0", "reverse", "1.0000"]
    assert lines[4].split() == ["3", "stranger", "-", "-", "-", "1.0000"]
    assert "family 0  reverse, sort  reverse - sort 0.99" in text
    assert "family 2  stranger" in text
    across = re.search(r"between families  (reverse|sort) - drifted (0\.\d{4})\n", text)
    assert across is not None
    assert 0.5 < float(across[2]) < 0.95


def test_json_and_file(tiny_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.safetensors"
    models = folders(tiny_zoo, "reverse", "sort", "stranger")
    assert run(*models, "--json", "--out", str(out), "--mode", "tensor", "--threshold", "0.5") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["reverse", "sort", "stranger"]
    assert found["similarity"][0][2] is None
    assert found["families"]["families"][0]["members"] == ["reverse", "sort"]
    assert (found["mode"], found["families"]["threshold"]) == ("tensor", 0.5)
    loaded = Similarity.load(out)
    assert loaded.matrix[0, 1] == found["similarity"][0][1]
    assert loaded.to_merge({0: 1, 1: 1}, 0) > 0.9
    assert run(*models, "--out", str(out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(*models, "--out", str(out), "--overwrite", "--quiet") == 0


def test_a_zoo_file(tiny_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zoo.yaml"
    entries = "".join(f"    - {{id: '{tiny_zoo}/models/{name}', alias: {alias}}}\n" for name, alias in (("sort", "x"), ("next", "y")))
    path.write_text(f"zoo:\n  models:\n{entries}")
    base = str(tiny_zoo / "models" / "base")
    assert run("--zoo", str(path), "--json", "--base", base) == 0
    named = capsys.readouterr().out
    assert run(str(path), "--json", "--base", base) == 0
    assert capsys.readouterr().out == named
    found = json.loads(named)
    assert found["models"] == ["x", "y"]
    assert found["delta"]
    assert found["similarity"][0][1] < 0.9


def test_a_zoo_file_with_an_adapter(tiny_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, sort = (open_checkpoint(tiny_zoo / "models" / name) for name in ("base", "sort"))
    extract_lora(sort, base, tmp_path / "lora", energy=1.0)
    path = tmp_path / "zoo.yaml"
    first, second = f"{{id: '{tiny_zoo}/models/base', alias: x, adapter: lora}}", f"{{id: '{tiny_zoo}/models/sort'}}"
    path.write_text(f"zoo:\n  models:\n    - {first}\n    - {second}\n")
    assert run("--zoo", str(path), "--json", "--base", str(tiny_zoo / "models" / "base")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["x", "sort"]
    assert found["similarity"][0][1] == pytest.approx(1, abs=1e-3)


def test_equal_last_parts_are_told_apart(tiny_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sort").symlink_to(tiny_zoo / "models" / "sort")
    models = [*folders(tiny_zoo, "sort"), str(tmp_path / "sort")]
    assert run(*models, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == models
    assert found["similarity"][0][1] == 1.0


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "give models or --zoo"),
        (("a", "--zoo", "b"), "give models or --zoo"),
        (("./a", "./a"), "given twice"),
        (("./nowhere",), "nowhere"),
        (("./a", "--out", "/nowhere/else/s.safetensors"), "does not exist"),
    ],
)
def test_refusals(tokens: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tokens) == 2
    assert message in capsys.readouterr().err
