"""Routers that a run learns from the proxy scores that it has anyway: when one is used, what is said, and that a replay needs no scores."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from modelglue.cli.summary import print_summary
from modelglue.errors import UserError
from modelglue.evaluation import TaskSet
from modelglue.glue import GlueResult, glue
from tests.small_zoo import glue_file, write_yaml, write_zoo

SKILLS = ["reverse", "double"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`reverse` and `stranger`, each with the other's questions as its prompts: a router from prompts sends everything astray."""
    folder = tmp_path_factory.mktemp("astray")
    write_zoo(folder, ["reverse", "stranger"], SKILLS, items=12)
    proxy = TaskSet.load([f"{skill}_proxy" for skill in SKILLS], folder / "tasks")
    value = glue_file(["reverse", "stranger"], SKILLS)
    value["zoo"]["models"][0]["prompts"] = {"positive": proxy.contexts("double")}
    value["zoo"]["models"][1]["prompts"] = {"positive": proxy.contexts("reverse")}
    return write_yaml(folder / "zoo.yaml", value)


@pytest.fixture(scope="module")
def learned(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> GlueResult:
    return glue(zoo, tmp_path_factory.mktemp("runs") / "run")


def changed(zoo: Path, name: str, **groups: Any) -> Path:
    return write_yaml(zoo.parent / name, {**yaml.safe_load(zoo.read_text()), **groups})


def test_scores_outvote_misleading_prompts(learned: GlueResult) -> None:
    decisions = json.loads((learned.run / "decisions.json").read_text())
    router = decisions["router"]
    assert learned.outcome["kind"] == "mixture"
    assert router["load"] == {"reverse": {"reverse": 12, "stranger": 0}, "double": {"reverse": 0, "stranger": 12}}
    assert router["oracle_gap"] == pytest.approx(0.0, abs=1e-12)
    assert (router["gate_mode"], router["self_test"]["accuracy"]) == ("scores", 0.0)  # the prompts are the wrong ones, not the router
    found = router["learned"]
    held_out = found["training"]["held_out"]
    best = {skill: max(one["representative"]["tasks"][skill] for one in decisions["families"]) for skill in SKILLS}
    assert found["used"] is True
    assert found["held_out_tasks"] == {skill: {"trained": best[skill], "reference": 0.0, "oracle": best[skill]} for skill in SKILLS}
    assert held_out["against"] == "prompts"
    assert held_out["difference"] == pytest.approx(sum(best.values()) / 2)
    assert found["message"].startswith(f"The router learned from scores: {100 * held_out['difference']:+.1f} points (")
    assert (found["training"]["items"], found["training"]["tasks"], found["training"]["hidden"]) == (24, SKILLS, None)


def test_the_summary_says_where_the_router_comes_from(learned: GlueResult) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(learned, None, console)
    message = json.loads((learned.run / "router.json").read_text())["message"]
    assert f"router   {message}" in console.export_text()


def test_the_learned_router_stands_in_the_recipe(learned: GlueResult, tmp_path: Path) -> None:
    """No item is read, let alone scored."""
    again = glue(learned.run / "recipe.yaml", learned.run.parent / "again")
    assert again.outcome == learned.outcome
    assert not (again.run / "scores.sqlite").exists()
    first, second = ((run / "mixture" / "router.safetensors").read_bytes() for run in (learned.run, again.run))
    assert first == second
    manifests = [json.loads((run / "mixture" / "mixture.json").read_text()) for run in (learned.run, again.run)]
    assert manifests[0] == manifests[1]
    assert manifests[0]["training"] == json.loads((learned.run / "router.json").read_text())["training"]
    recipe = yaml.safe_load((learned.run / "recipe.yaml").read_text())
    recipe["replay"]["mixture"]["learned"]["tensors"] = "bm90aGluZw=="
    write_yaml(learned.run / "spoiled.yaml", recipe)
    with pytest.raises(UserError, match="the recipe's router cannot be read"):
        glue(learned.run / "spoiled.yaml", tmp_path / "spoiled")


def test_prompts_alone_on_request(zoo: Path, tmp_path: Path) -> None:
    router = {"router_layer": 2, "source": "prompts"}
    value = yaml.safe_load(zoo.read_text())
    misleading = value["zoo"]["models"][1].pop("prompts")["positive"]
    (zoo.parent / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in misleading))
    value["zoo"]["models"][1]["prompts_from"] = "prompts.txt"
    result = glue(write_yaml(zoo.parent / "prompts.yaml", {**value, "router": router}), tmp_path / "run")
    manifest = json.loads((result.run / "mixture" / "mixture.json").read_text())
    assert manifest["experts"][1]["prompts"]["positive"] == misleading
    assert not (result.run / "router.json").exists()
    assert json.loads((result.run / "decisions.json").read_text())["router"]["learned"] is None
    assert (result.outcome["kind"], result.outcome["name"]) == ("single", result.outcome["best_single"])
    assert result.outcome["reason"].endswith("look at the router")
    (zoo.parent / "prompts.txt").write_text("something else\n")
    with pytest.raises(UserError, match="a run of other inputs or settings"):
        glue(zoo.parent / "prompts.yaml", tmp_path / "run")


def test_scores_that_do_not_suffice(zoo: Path, tmp_path: Path) -> None:
    """Two skills with four items each: with source auto the prompts stay, and it is said; with source scores it is an error."""
    for split in ("proxy", "confirmation", "test"):
        for skill in SKILLS:
            lines = (zoo.parent / "tasks" / "data" / skill / f"{split}.jsonl").read_text().splitlines(keepends=True)
            path = tmp_path / "tasks" / "data" / skill / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines[:4]))
            (tmp_path / "tasks" / f"{skill}_{split}.yaml").write_text((zoo.parent / "tasks" / f"{skill}_{split}.yaml").read_text())
    (tmp_path / "models").symlink_to(zoo.parent / "models")
    value = glue_file(["reverse", "stranger"], SKILLS)
    result = glue(write_yaml(tmp_path / "zoo.yaml", value), tmp_path / "run")
    found = json.loads((result.run / "decisions.json").read_text())["router"]["learned"]
    assert (found["used"], found["training"]) == (False, None)
    assert found["message"] == "8 scored items are too few (at least 20): there is nothing to learn a router from."
    with pytest.raises(UserError, match=r"router.source is 'scores': 8 scored items are too few .* Give more proxy items"):
        glue(write_yaml(tmp_path / "zoo.yaml", {**value, "router": {"source": "scores", "router_layer": 2}}), tmp_path / "other")


def test_an_mlp_must_be_learned(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mixture.router is 'mlp', which prompts cannot make; give router.source: scores"):
        glue(changed(zoo, "mlp.yaml", mixture={"router": "mlp"}), tmp_path / "run")
    groups = {"mixture": {"router": "mlp"}, "router": {"source": "scores", "hidden": 8, "objective": "expected", "router_layer": 2}}
    result = glue(changed(zoo, "mlp.yaml", **groups), tmp_path / "run")
    manifest = json.loads((result.run / "mixture" / "mixture.json").read_text())
    assert (manifest["router"], manifest["training"]["hidden"], manifest["training"]["objective"]) == ("mlp", 8, "expected")
    assert result.outcome["kind"] == "mixture"
