"""`modelglue diff`: tables, JSON, pictures and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import tensor_names as names
from tests.cli.conftest import Run, tree
from tests.recipe.on_disk import write_model


@pytest.fixture
def changed(zoo: Path) -> Path:
    """A copy of base of which one feed-forward matrix is 1.5 times as large."""
    write_model(zoo / "changed", 0)
    weights = load_file(zoo / "changed" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, zoo / "changed" / "model.safetensors", metadata={"format": "pt"})
    return zoo / "changed"


def test_tables(run: Run, zoo: Path, changed: Path) -> None:
    found = run("diff", zoo / "base", changed)
    assert (found.code, found.err) == (0, "")
    rows = [line.split() for line in found.out.splitlines()]
    assert rows[:2] == [
        ["relative", "difference", "|b", "-", "a|", "/", "|a|,", "a:", "base,", "b:", "changed"],
        ["layer", "embedding", "attention", "feed-forward", "norm", "head"],
    ]
    assert rows[2] == ["model.layers.0", "=", "=", "="]
    assert rows[3][:2] == ["model.layers.1", "="]
    assert 0.2 < float(rows[3][2]) < 0.5
    assert rows[4] == ["outside", "=", "="]
    assert rows[6] == ["role", "relative", "norm", "cosine", "changed", "elements"]
    assert [row[0] for row in rows[7:]] == ["embedding", "attention", "feed-forward", "norm", "head", "all"]
    assert rows[9][-3:] == ["25.00", "%", "240"]
    assert rows[12][-3:] == ["12.50", "%", "480"]


def test_every_tensor(run: Run, zoo: Path, changed: Path) -> None:
    rows = [line.split() for line in run("diff", zoo / "base", changed, "--tensors").out.splitlines()]
    start = rows.index(["tensor", "relative", "norm", "cosine", "changed", "elements"])
    assert rows[start + 1][:2] == ["model.layers.1.mlp.up_proj.weight", "0.5"]
    assert rows[start + 1][3:] == ["1.000000", "100.00", "%", "60"]
    assert len(rows) == start + 1 + 14
    assert all(row[1] == "=" for row in rows[start + 2 :])


def test_names_are_told_once_however_many_layers_are_shown(run: Run, zoo: Path, changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every row of the table asked all tensors for their roles, a model of 60,000 tensors would take many minutes."""
    asked: list[str] = []

    def role_of(name: str) -> str:
        asked.append(name)
        return names.role_of(name)

    monkeypatch.setattr("modelglue.zoo.difference.role_of", role_of)
    assert run("diff", zoo / "base", changed, "--workers", "1", "--tensors", "--out", zoo / "d.html").code == 0
    assert sorted(asked) == sorted(load_file(changed / "model.safetensors"))


def test_json(run: Run, zoo: Path, changed: Path) -> None:
    found = json.loads(run("diff", zoo / "base", changed, "--json").out)
    assert (found["a"], found["b"], found["identical"], found["total"]["changed"]) == ("base", "changed", False, 60)


def test_identical_models_and_a_recipe(run: Run, zoo: Path) -> None:
    write_model(zoo / "again", 0)
    assert run("diff", zoo / "base", zoo / "again").out.splitlines()[-1] == "identical: every tensor has the same bits in both"
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet").code == 0
    found = json.loads(run("diff", zoo / "recipe.yaml", zoo / "out", "--json").out)
    assert found["identical"] is True


def test_pictures(run: Run, zoo: Path, changed: Path) -> None:
    for name in ("d.svg", "d.html"):
        found = run("diff", zoo / "base", changed, "--out", zoo / name)
        assert found.out.splitlines()[-1] == f"wrote {zoo / name}"
        assert "Where changed differs from base" in (zoo / name).read_text()
        before = (zoo / name).read_bytes()
        again = run("diff", zoo / "base", zoo / "a", "--out", zoo / name)
        assert (again.code, "exists already" in again.err) == (2, True)
        assert (zoo / name).read_bytes() == before
        assert run("diff", zoo / "base", zoo / "a", "--out", zoo / name, "--overwrite").code == 0
        assert (zoo / name).read_bytes() != before


def test_what_cannot_be_compared(run: Run, zoo: Path) -> None:
    found = run("diff", zoo / "base", zoo / "half")
    assert (found.code, found.out.splitlines()[-1][:45]) == (0, "warning: 14 tensors differ in dtype (F32 and ")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("base", "nowhere"), "no such file or folder"),
        (("base", "a", "--out", "x.png"), "a picture ends in .svg or .html"),
        (("base", "a", "--out", "no/x.svg"), "does not exist. Make it first."),
        (("base", "a", "--workers", "0"), "Must be >= 1"),
    ],
)
def test_refusals(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch, tokens: tuple[str, ...], expected: str) -> None:
    monkeypatch.chdir(zoo)
    before = tree(zoo)
    found = run("diff", *tokens)
    assert (found.code, found.out) == (2, "")
    assert expected in found.err
    assert tree(zoo) == before
