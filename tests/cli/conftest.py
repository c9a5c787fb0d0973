"""The command line in this process: tokens in; exit code, standard output and standard error out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from modelglue.cli.app import main
from tests.recipe.on_disk import write_model, write_recipe


@dataclass(frozen=True)
class Result:
    """What a user sees of one call."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard output in one line, whatever the width of the terminal."""
        return " ".join(self.out.split())


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*tokens: str | Path) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(token) for token in tokens])
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        return Result(code, found.out, found.err)

    return call


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with the models base, a and b, and recipe.yaml, which merges them by task arithmetic into something else."""
    folder = tmp_path / "zoo"
    for seed, name in enumerate(("base", "a", "b")):
        write_model(folder / name, seed)
    write_model(folder / "half", 3, dtype=torch.bfloat16)
    write_recipe(folder / "recipe.yaml", RECIPE)
    return folder


RECIPE = "method: task_arithmetic\nbase: base\nmodels:\n  - {model: a, weight: 0.5}\n  - {model: b, weight: 0.25}\n"


def tree(folder: Path) -> Mapping[str, bytes | None]:
    """Everything below a folder, hidden things too: relative path -> bytes (None for a folder)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
