"""A run is a function of its inputs: another folder, another process, or its own recipe gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from modelglue.adapters import extract_lora
from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.glue import glue
from modelglue.mixture import Mixture
from tests.conftest import REPOSITORY
from tests.glue.conftest import GROUPS, Finished, state
from tests.glue_runs import fingerprint
from tests.small_zoo import glue_file, write_pair_zoo, write_yaml, write_zoo


def artefacts(run: Path) -> Mapping[str, str]:
    """The part of a fingerprint that a recipe.yaml rebuilds."""
    return {name: digest for name, digest in fingerprint(run).items() if name.split("/")[0] in ("representatives", "mixture")}


def test_another_process_with_other_hashes_and_more_workers(finished: Finished) -> None:
    """Set and dictionary orders, and who writes which tensor, must not matter."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONHASHSEED": "12345"}
    run = finished.run.with_name("elsewhere")
    command = [sys.executable, "-m", "modelglue", "glue", str(finished.zoo), str(run), "--json", "--workers", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert fingerprint(run) == fingerprint(finished.run)
    assert len(fingerprint(run)) == len(artefacts(run)) + 5 == 15
    report = json.loads(done.stdout)
    assert report == {
        "run": str(run), "report": str(run / "report.html"), "already_complete": False,
        "outcome": finished.result.outcome, "results": finished.result.results,
    }  # fmt: skip


def test_a_recipe_rebuilds_its_artefacts_and_scores_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.glue.bench.Bench.scoring", None)
    again = finished.run.with_name("again")
    result = glue(finished.run / "recipe.yaml", again)
    assert (result.run, result.outcome, result.results) == (again, finished.result.outcome, None)
    assert artefacts(again) == artefacts(finished.run)
    assert sorted(path.name for path in again.iterdir()) == [".lock", "mixture", "representatives", "run.json"]
    before = state(again)
    assert glue(finished.run / "recipe.yaml", again).outcome == finished.result.outcome
    assert {name: content for name, (_, content) in state(again).items()} == {name: content for name, (_, content) in before.items()}


def test_a_run_and_its_zoo_move_together(finished: Finished, tmp_path: Path) -> None:
    """References are relative: the mixture answers, and the recipe rebuilds, wherever they are."""
    moved = tmp_path / "deep" / "down"
    for folder in (finished.zoo.parent, finished.run):
        shutil.copytree(folder, moved / folder.name)
    glue(moved / "run" / "recipe.yaml", moved / "again")
    assert artefacts(moved / "again") == artefacts(finished.run)
    here, there = (Mixture.load(run / "mixture") for run in (finished.run, moved / "again"))
    prompts = ["reverse: abcd =", "double: abc ="]
    assert there.identity == here.identity
    assert there.generate(prompts, until=["\n"], max_new_tokens=10) == here.generate(prompts, until=["\n"], max_new_tokens=10)


def test_a_recipe_in_another_place_finds_the_same_models(finished: Finished, tmp_path: Path) -> None:
    """Weights and router are equal; only the paths by which they are found differ."""
    glue(finished.run / "recipe.yaml", tmp_path / "far" / "again")
    here, there = artefacts(finished.run), artefacts(tmp_path / "far" / "again")
    assert here.keys() == there.keys()
    different = {name for name in here if here[name] != there[name]}
    assert different == {
        "mixture/mixture.json", "representatives/family-0/README.md", "representatives/family-0/modelglue_recipe.yaml",
        "representatives/family-0/modelglue_record.json",  # it holds the hash of the recipe
    }  # fmt: skip
    assert Mixture.load(tmp_path / "far" / "again" / "mixture").identity == Mixture.load(finished.run / "mixture").identity


def test_a_recipe_whose_models_have_changed(finished: Finished, tmp_path: Path) -> None:
    for folder in (finished.zoo.parent, finished.run):
        shutil.copytree(folder, tmp_path / folder.name)
    shutil.rmtree(tmp_path / "zoo" / "models" / "reverse-b")
    shutil.copytree(tmp_path / "zoo" / "models" / "base", tmp_path / "zoo" / "models" / "reverse-b")
    with pytest.raises(UserError, match=r"'\.\./zoo/models/reverse-b': is not the model that the recipe was made with \(.* instead of"):
        glue(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    shutil.rmtree(tmp_path / "zoo" / "models" / "reverse-b")
    with pytest.raises(CheckpointError, match=r"'\.\./zoo/models/reverse-b': no such file or folder \(looked at .*run/"):
        glue(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_packed_mixture_needs_no_zoo(tmp_path: Path) -> None:
    zoo = write_pair_zoo(tmp_path / "zoo", ["reverse", "double"], items=4, select={"strategy": "average"}, mixture={"pack": True})
    glue(zoo, tmp_path / "run")
    shutil.rmtree(tmp_path / "zoo")
    shutil.move(tmp_path / "run" / "mixture", tmp_path / "mixture")
    mixture = Mixture.load(tmp_path / "mixture")
    assert mixture.experts == ["family-0", "stranger"]
    assert mixture.generate(["double: abc ="], until=["\n"], max_new_tokens=10) == [" aabbcc"]
    assert sorted(path.name for path in (tmp_path / "mixture" / "experts").iterdir()) == ["family-0", "stranger"]


def test_a_model_with_an_adapter(tmp_path: Path) -> None:
    """It is scored as the model that the adapter was made of; as an expert it is written, and its recipe rebuilds it."""
    zoo = write_zoo(tmp_path / "zoo", ["reverse", "stranger"], ["reverse", "double"], items=4)
    base, reverse = (open_checkpoint(tmp_path / "zoo" / "models" / name) for name in ("base", "reverse"))
    extract_lora(reverse, base, tmp_path / "zoo" / "lora", energy=1.0)
    value = yaml.safe_load(zoo.read_text())
    value["zoo"]["models"][0] = {"id": "models/base", "alias": "reverse", "adapter": "lora"}
    result = glue(write_yaml(zoo, value), tmp_path / "run")
    assert result.outcome["kind"] == "mixture"
    assert [path.name for path in (tmp_path / "run" / "representatives").iterdir()] == ["reverse"]
    manifest = json.loads((tmp_path / "run" / "mixture" / "mixture.json").read_text())
    assert [expert["reference"] for expert in manifest["experts"]] == ["../representatives/reverse", "../../zoo/models/stranger"]
    written = open_checkpoint(tmp_path / "run" / "representatives" / "reverse")
    for name in reverse.names():
        torch.testing.assert_close(written.tensor(name), reverse.tensor(name), rtol=1e-3, atol=1e-4)
    replay = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["replay"]
    assert sorted(replay["contents"]) == ["../zoo/models/base+../zoo/lora", "../zoo/models/stranger"]
    glue(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    assert artefacts(tmp_path / "again") == artefacts(tmp_path / "run")
    glue(tmp_path / "run" / "recipe.yaml", tmp_path / "far" / "again")
    assert open_checkpoint(tmp_path / "far" / "again" / "representatives" / "reverse").identity == written.identity


def test_models_of_the_hub(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by id and revision, found in the hub's cache: members, experts and encoder, in the run and in its replay."""
    revision = "0" * 40
    for name in ("reverse", "reverse-b", "stranger", "base"):
        snapshot = tmp_path / "hub" / f"models--org--{name}" / "snapshots" / revision
        shutil.copytree(finished.zoo.parent / "models" / name, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    value = glue_file(["reverse", "reverse-b", "stranger"], **GROUPS)
    models: list[dict[str, Any]] = [{"id": "org/reverse"}, {"id": "org/reverse-b"}, {"id": "org/stranger", "revision": revision}]
    value["zoo"] |= {"base": "org/base", "models": models}
    (tmp_path / "zoo").mkdir()
    shutil.copytree(finished.zoo.parent / "tasks", tmp_path / "zoo" / "tasks")
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    assert result.outcome == finished.result.outcome

    manifest = json.loads((tmp_path / "run" / "mixture" / "mixture.json").read_text())
    assert [expert["reference"] for expert in manifest["experts"]] == ["../representatives/family-0", f"org/stranger@{revision}"]
    assert "- org/reverse\n- org/reverse-b\n" in (tmp_path / "run" / "representatives" / "family-0" / "README.md").read_text()
    replay = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["replay"]
    assert sorted(replay["contents"]) == ["org/reverse", "org/reverse-b", f"org/stranger@{revision}"]
    glue(tmp_path / "run" / "recipe.yaml", tmp_path / "far" / "again")
    assert artefacts(tmp_path / "far" / "again") == artefacts(tmp_path / "run")
    assert Mixture.load(tmp_path / "run" / "mixture").identity == Mixture.load(finished.run / "mixture").identity
