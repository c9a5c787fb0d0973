"""`modelglue merge --memory, --device, --executor`: what they accept, and what they say of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, tree
from tests.cli.test_merge import refused


@pytest.mark.parametrize(
    "tokens", [("--memory", "2GiB"), ("--memory", "900 MB", "--workers", "2"), ("--device", "cpu:sim"), ("--executor", "local")]
)
def test_bytes_are_the_same_wherever_it_runs(run: Run, zoo: Path, tokens: tuple[str, ...]) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "1" / "out", "--quiet")
    assert run("merge", zoo / "recipe.yaml", zoo / "2" / "out", "--quiet", *tokens).code == 0
    assert tree(zoo / "1") == tree(zoo / "2")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("--memory", "20MB"), "a memory of 20,000,000 bytes is too little: this merge needs at least "),
        (("--memory", "20"), "--memory is '20'; allowed is a positive size such as 500MB, 5GB or 2GiB."),
        (("--device", "gpu"), "device 'gpu': is none to merge on. Allowed are cpu, cuda, cuda:0,cuda:1 (several), mps, xpu."),
        (("--executor", "slurm"), "executor 'slurm': there is none of this name. Allowed are local, ray and ray://HOST:PORT."),
    ],
)
def test_places_that_are_none(run: Run, zoo: Path, tokens: tuple[str, ...], message: str) -> None:
    assert refused(run, zoo, zoo / "recipe.yaml", zoo / "out", *tokens).startswith(message)
