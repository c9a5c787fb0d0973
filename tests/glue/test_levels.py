"""`level: auto`: the ways to join experts are scored on the proxy items, and the best one is written, reported and replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelglue.evaluation import TaskSet, evaluate
from modelglue.glue import glue
from modelglue.report import write_report
from tests.small_zoo import glue_file, write_yaml, write_zoo

SKILLS = ["reverse", "sort"]
ALONE = {"cluster": {"threshold": 0.9999}}


def zoo_of(folder: Path, models: list[str], skills: list[str], **groups: Any) -> Path:
    write_zoo(folder, models, skills, items=4)
    return write_yaml(folder / "zoo.yaml", glue_file(models, skills, **ALONE, **groups))


def test_experts_that_share_their_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two children of one base: feed-forward networks can be experts too. Where complete models are closed, one model is the result."""
    zoo = zoo_of(tmp_path / "zoo", ["reverse", "sort"], SKILLS, mixture={"level": "auto"})
    result = glue(zoo, tmp_path / "run")
    decisions = json.loads((result.run / "decisions.json").read_text())
    scores = {row["name"]: row["score"] for row in decisions["levels"]}
    assert list(scores) == ["complete models", "ffn by sample", "ffn by token", "ffn by token, lower half merged"]
    assert all(0 <= score <= 1 for score in scores.values())
    assert not list(result.run.glob(".level-*"))
    best = max(scores, key=lambda name: (scores[name], -list(scores).index(name)))
    assert ((result.run / "mixture" / "mixture.json").exists()) == (best == "complete models")

    monkeypatch.setattr("modelglue.glue.levels.INSIDE", {"ffn by token": {"level": "ffn", "routing": "token", "half": True}})
    monkeypatch.setattr("modelglue.glue.levels._FIRST", {})
    inside = glue(zoo, tmp_path / "inside")
    decisions = json.loads((inside.run / "decisions.json").read_text())
    proxy = TaskSet.load([f"{skill}_proxy" for skill in SKILLS], tmp_path / "zoo" / "tasks")
    assert [row["score"] for row in decisions["levels"]] == [evaluate(inside.run / "mixture", proxy).mean]
    assert decisions["router"] is None
    assert json.loads((inside.run / "mixture" / "config.json").read_text())["num_hidden_layers"] == 8
    assert inside.results is not None
    rows = {row["name"]: row["mean"] for row in inside.results["models"]}
    test = TaskSet.load([f"{skill}_test" for skill in SKILLS], tmp_path / "zoo" / "tasks")
    assert rows["mixture"] == evaluate(inside.run / "mixture", test).mean
    assert inside.results["routing"] is None
    write_report(inside.run)
    page = (inside.run / "report.html").read_text()
    assert "2 of 2 representatives became experts inside one model, with a router in every layer." in page
    assert "Ways to join them, on proxy items: ffn by token " in page
    again = glue(inside.run / "recipe.yaml", tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again.run / "mixture" / name).read_bytes() == (inside.run / "mixture" / name).read_bytes(), name


def test_experts_that_do_not(tmp_path: Path) -> None:
    zoo = zoo_of(tmp_path / "zoo", ["reverse", "stranger"], ["reverse", "double"], mixture={"level": "auto"})
    result = glue(zoo, tmp_path / "run")
    first, *others = json.loads((result.run / "decisions.json").read_text())["levels"]
    assert (first["name"], first["reason"], result.outcome["kind"]) == ("complete models", None, "mixture")
    assert all(row["score"] is None and row["reason"] for row in others)
    assert (result.run / "mixture" / "mixture.json").exists()
