"""A zoo that is glued in seconds: some models of the committed tiny zoo, and its tasks cut to a few items."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

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


def write_pair_zoo(folder: Path, skills: Sequence[str] = SKILLS, *, items: int = 8, **groups: Any) -> Path:
    """A zoo whose run is known beforehand, however its models were trained: `reverse`, its twin `reverse-b`, and `stranger`.

    The twins differ in what no answer depends on (the embedding of the padding token), so they tie, their average ties with them, and
    ties merge. Only they can reverse, only the stranger can double, so both families become experts.
    """
    write_zoo(folder, ["reverse", "stranger"], skills, items=items)
    write_twin(folder / "models" / "reverse", folder / "models" / "reverse-b")
    return write_yaml(folder / "zoo.yaml", glue_file(["reverse", "reverse-b", "stranger"], skills, **groups))


def write_twin(model: Path, twin: Path) -> None:
    """A copy of a model in which only the padding token's embedding is another."""
    shutil.copytree(model, twin)
    weights = load_file(twin / "model.safetensors")
    row = weights["model.embed_tokens.weight"][0]
    row += torch.full_like(row, 0.125)
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})


def write_yaml(path: Path, value: Any) -> Path:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def write_lines_of(source: Path, folder: Path, split: str, *, start: int, items: int = 8) -> None:
    """A copy of the tasks in `source` whose sets of one split hold other items of the tiny zoo's, from number `start`."""
    shutil.copytree(source, folder)
    for data in sorted((folder / "data").glob(f"*/{split}.jsonl")):
        lines = (TINY_ZOO / "tasks" / data.relative_to(folder)).read_text().splitlines(keepends=True)
        data.write_text("".join(lines[start : start + items]))
