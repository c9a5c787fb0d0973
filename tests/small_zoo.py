"""A zoo that is glued in seconds: some models of the committed tiny zoo, and its tasks cut to a few items."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY

TINY_ZOO = REPOSITORY / "examples" / "tiny-zoo"
SPLITS = ("proxy", "confirmation", "test")
#: one family of three, and a model of another class and vocabulary
MODELS = ("reverse", "larger", "generalist", "stranger")
SKILLS = ("reverse", "larger", "double")


def write_tasks(folder: Path, skills: Sequence[str] = SKILLS, *, items: int = 16) -> Path:
    """The tiny zoo's tasks with the first `items` items of every set."""
    for skill in skills:
        (folder / "data" / skill).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            shutil.copy(TINY_ZOO / "tasks" / f"{skill}_{split}.yaml", folder)
            lines = (TINY_ZOO / "tasks" / "data" / skill / f"{split}.jsonl").read_text().splitlines(keepends=True)
            (folder / "data" / skill / f"{split}.jsonl").write_text("".join(lines[:items]))
    return folder


def glue_file(models: Sequence[str] = MODELS, skills: Sequence[str] = SKILLS, **groups: Any) -> dict[str, Any]:
    """The content of a zoo.yaml; `groups` replace or add what stands at the top."""
    return {
        "format": "modelglue/1",
        "zoo": {"name": "small", "base": "models/base", "models": [{"id": f"models/{name}"} for name in models]},
        "tasks": {"include": "tasks", **{split: [f"{skill}_{split}" for skill in skills] for split in SPLITS}},
        "select": {"strategy": "average"},
        "router": {"router_layer": 2, "gate_mode": "auto"},
        **groups,
    }


def write_zoo(folder: Path, models: Sequence[str] = MODELS, skills: Sequence[str] = SKILLS, *, items: int = 16, **groups: Any) -> Path:
    """A folder with models/, tasks/ and zoo.yaml; returns the path of zoo.yaml."""
    for name in ["base", *models]:
        shutil.copytree(TINY_ZOO / "models" / name, folder / "models" / name)
    write_tasks(folder / "tasks", skills, items=items)
    return write_yaml(folder / "zoo.yaml", glue_file(models, skills, **groups))


def write_yaml(path: Path, value: Any) -> Path:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path
