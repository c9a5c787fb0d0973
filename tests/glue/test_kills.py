"""SIGKILL at every kind of moment: what is there is whole, and the next call ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.glue import glue
from modelglue.glue.run_folder import RunFolder
from modelglue.models import LiveTextModel
from tests.checkpoint.killing import dying, forked, kill_group, run_in_child
from tests.glue_runs import assert_no_half_model, committed_items, computed_items, fingerprint
from tests.small_zoo import write_pair_zoo

pytestmark = forked

#: what the zoo and the settings below make a run score, all in all
BATCHES = 32


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_zoo(tmp_path_factory.mktemp("kills") / "zoo", ["reverse", "double"], items=4, select={"strategy": "average"})


@pytest.fixture(scope="module")
def expected(zoo: Path) -> dict[str, str]:
    run = zoo.parent / "undisturbed"
    steps: list[str] = []
    glue(zoo, run, listener=lambda event, fields: steps.append(event))
    assert steps.count("batch") == BATCHES
    return fingerprint(run)


Listener = Callable[[str, dict[str, Any]], None]
#: what is replaced in the victim's process
Patch = tuple[Any, str, Any]


def at(name: str, number: int = 1) -> Listener:
    """Dies at the `number`-th event of that name, or at the step of that name."""
    die = dying(lambda: None, number)
    return lambda event, fields: die() if name in (event, fields.get("name")) else None


def at_call(owner: Any, name: str, number: int) -> Callable[[], Patch]:
    """Dies before the `number`-th call of a function."""
    return lambda: (owner, name, dying(getattr(owner, name), number, before=True))


def in_the_middle() -> Patch:
    """Dies when half of the first tensor has reached the file."""

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        os.pwritev(descriptor, [bytes(data)[: len(data) // 2]], offset)
        kill_group()
        return 0

    return os, "pwrite", pwrite


def at_file(name: str, *, before: bool) -> Callable[[], Patch]:
    """Dies when that file of the run is written."""

    def patch() -> Patch:
        original = RunFolder.write_json

        def write(run: RunFolder, file: str, value: Any) -> None:
            die = dying(original, 1, before=before) if file == name else original
            die(run, file, value)

        return RunFolder, "write_json", write

    return patch


#: moment -> (what kills: a listener, or a patch; a file that must be there then, and one that must not)
MOMENTS: dict[str, tuple[Listener | None, Callable[[], Patch] | None, str, str]] = {
    "before anything is measured": (at("similarity"), None, "zoo.json", "similarity.safetensors"),
    "ranking, between batches": (at("batch", 3), None, "families.json", "decisions.json"),
    "ranking, within a batch": (None, at_call(LiveTextModel, "generate", 4), "families.json", "decisions.json"),
    "selection": (at("batch", 8), None, "families.json", "representatives"),
    "writing the merge": (None, in_the_middle, "representatives", "representatives/family-0"),
    "before the merge has its name": (None, at_call(Path, "rename", 1), "representatives", "representatives/family-0"),
    "the merge is there": (at("mixture"), None, "representatives/family-0/model.safetensors", "mixture"),
    "before the mixture has its name": (None, at_call(Path, "rename", 2), "representatives/family-0", "mixture"),
    "confirmation": (at("batch", 14), None, "mixture/mixture.json", "decisions.json"),
    "before the decisions are written": (None, at_file("decisions.json", before=True), "mixture/mixture.json", "decisions.json"),
    "test": (at("batch", 29), None, "decisions.json", "results.json"),
    "before the recipe": (None, at_file("results.json", before=False), "results.json", "recipe.yaml"),
    "at the very end": (at("results"), None, "recipe.yaml", "report.html"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_called_again(zoo: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    listener, patch, there, missing = MOMENTS[moment]
    run = zoo.parent / moment.replace(" ", "-")

    def victim() -> None:
        torch.set_num_threads(1)
        if patch is not None:
            monkeypatch.setattr(*patch())
        glue(zoo, run, listener=listener)

    assert run_in_child(victim) == -signal.SIGKILL
    assert (run / there).exists()
    assert not (run / missing).exists()
    assert_no_half_model(run)
    before = committed_items(run)

    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path))  # all that the next call knows stands in the run folder
    result = glue(zoo, run)
    assert result.already_complete is False
    assert fingerprint(run) == expected
    assert_no_half_model(run)
    assert [path for path in run.rglob("*") if path.name.endswith(".partial")] == []
    # Nothing that was committed is asked again.
    assert committed_items(run) == computed_items(run)[0] == BATCHES * 4
    assert before <= committed_items(run)


def test_killed_again_and_again(zoo: Path, expected: dict[str, str]) -> None:
    """Every call dies at its tenth batch: the next one begins where it ended."""
    run = zoo.parent / "again-and-again"
    codes, counts = [], []
    while not codes or codes[-1] != 0:
        codes.append(run_in_child(lambda: (torch.set_num_threads(1), glue(zoo, run, listener=at("batch", 10)))))
        counts.append(committed_items(run))
    assert codes == [-signal.SIGKILL] * (BATCHES // 10) + [0]
    assert counts == [*range(40, 4 * BATCHES, 40), 4 * BATCHES]
    assert fingerprint(run) == expected
    assert computed_items(run)[0] == committed_items(run)
