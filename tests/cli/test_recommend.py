"""`modelglue recommend`: measurements of a zoo, and what follows from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.errors import CheckpointError
from modelglue.zoo.measure import Measured, measure
from modelglue.zoo.recommend import recommendations
from tests.cli.conftest import Run
from tests.conftest import REPOSITORY

PLAIN = Measured(("a", "b"), True, (), False, False, 1000, 1.0, 0.99, 0.05, {"a": 0.01, "b": 0.01}, 0.5)


def methods(zoo: Measured, verdict: str) -> str:
    return "; ".join(one.method for one in recommendations(zoo) if one.verdict == verdict)


def test_measurements_of_two_changes() -> None:
    base = torch.tensor([3.0, 4.0, 0.0, 0.0])
    change = {"a": torch.tensor([0.0, 0.0, 1.0, 1.0]), "b": torch.tensor([0.0, 0.0, 1.0, -1.0]), "c": torch.tensor([0.0, 0.0, 2.0, 2.0])}
    models = {name: TensorsCheckpoint({"w": base + delta}) for name, delta in change.items()}
    found = measure(models, TensorsCheckpoint({"w": base}))
    assert found.change == pytest.approx({"a": 2**0.5 / 5, "b": 2**0.5 / 5, "c": 8**0.5 / 5})
    assert found.kinship == pytest.approx((0 + 1 + 0) / 3)
    assert found.agreement == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert found.sampled == 1
    assert measure(models, TensorsCheckpoint({"w": base}), most=3).sampled == 0.75


def test_numbers_that_are_none_are_refused() -> None:
    bad = TensorsCheckpoint({"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(CheckpointError, match="b: tensor 'w' holds NaN"):
        measure({"a": TensorsCheckpoint({"w": torch.ones(2)}), "b": bad}, None)


def test_what_the_measurements_mean() -> None:
    assert methods(PLAIN, "first") == "task_arithmetic, then ties"
    assert methods(replace(PLAIN, kinship=0.8), "first") == "model_stock, linear"
    assert methods(replace(PLAIN, kinship=0.3), "first") == "ties"
    assert methods(replace(PLAIN, proxy=True), "first").startswith("search")
    assert "dare_linear" in methods(replace(PLAIN, change={"a": 0.5, "b": 0.01}), "avoid")
    assert "merge-adapters" in methods(replace(PLAIN, adapters=("a",)), "try")
    assert "glue" in methods(replace(PLAIN, distinct_domains=True), "try")
    assert methods(replace(PLAIN, has_base=False, kinship=None, change={}, agreement=None), "first") == "linear"
    assert methods(replace(PLAIN, parameters=30_000_000_000), "first") == "linear"
    assert "sums" in methods(replace(PLAIN, models=tuple("abcdefghi")), "avoid")
    assert methods(replace(PLAIN, models=("a",)), "avoid") == "any merge"


def test_the_command_on_the_tiny_zoo(run: Run) -> None:
    zoo: Path = REPOSITORY / "examples" / "tiny-zoo" / "zoo.yaml"
    found = run("recommend", zoo, "--json")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert content["measured"]["models"] == [
        "reverse", "reverse-twin", "sort", "sort-twin", "next", "larger", "generalist", "corrupted", "drifted", "drifted-child",
    ]  # fmt: skip
    assert content["measured"]["proxy"] is True
    assert content["measured"]["warnings"][0].startswith("stranger: of another architecture")
    assert content["recommendations"][0]["verdict"] == "first"
    shown = run("recommend", zoo)
    assert "greedy selection of members" in shown.text
