"""Searches over real models: what a search finds is a recipe that merges, and nothing is scored that was scored before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.evaluation import CandidateEvaluator, ScoreStore, TaskSet
from modelglue.recipe import Candidate, Evaluator, build, read_recipe
from modelglue.recipe.dataflow import depth
from modelglue.search import Facts, SearchSettings, run_study
from tests.small_zoo import TINY_ZOO, write_tasks

MEMBERS = ("reverse", "larger", "generalist")


@pytest.fixture(scope="module")
def models() -> Mapping[str, Checkpoint]:
    return {name: open_checkpoint(TINY_ZOO / "models" / name) for name in ("base", *MEMBERS)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, TaskSet]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), ["reverse", "larger"], items=24)
    return {split: TaskSet.load([f"reverse_{split}", f"larger_{split}"], folder) for split in ("proxy", "confirmation")}


def settings(name: str, **fields: Any) -> SearchSettings:
    searcher = {"name": name, **fields.pop("options", {})}
    return SearchSettings(members=MEMBERS, base="base", searcher=searcher, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("coefficient", {"options": {"coarse": True}}),
        ("cma", {"space": {"method": "ties", "granularity": "layer", "filters": ["mlp"]}, "budget": {"candidates": 4}}),
        ("evolution", {"space": {"method": "dare_linear"}, "options": {"population": 3}, "budget": {"candidates": 3}}),
        ("kinship_greedy", {"options": {"explore": False, "k": 2}, "budget": {"candidates": 5}}),
        ("dataflow", {"options": {"repeats": 1, "population": 4}, "budget": {"candidates": 3}}),
        ("map", {"options": {"points": 20, "generations": 2}, "budget": {"candidates": 20}, "fitness": {"kind": "everything", "limit": 4}}),
    ],
)
def test_candidates_are_models(
    models: Mapping[str, Checkpoint], tasks: Mapping[str, TaskSet], tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    depths = {alias: depth(models[alias]) for alias in MEMBERS}
    facts = Facts(layers=depths["reverse"], depths=depths)
    with ScoreStore(tmp_path / "scores.sqlite") as store:
        evaluators: list[Evaluator] = [CandidateEvaluator(models, tasks[split], store) for split in ("proxy", "confirmation")]
        report = run_study(settings(name, **fields), evaluators[0], tmp_path / "a", confirm=evaluators[1], facts=facts)
        assert report.counts["failed"] == 0, report.warnings
        assert report.counts["ok"] >= 1
        assert report.best is not None
        assert 0 < report.best.value <= 1
        before = store.counts()
        again = run_study(settings(name, **fields), evaluators[0], tmp_path / "b", confirm=evaluators[1], facts=facts)
        assert store.counts() == before, "another search finds all scores in the store"
        assert [one.value for one in again.outcomes] == [one.value for one in report.outcomes]
        assert again.spent["items"] == report.spent["items"]
        assert again.spent["computed"] == 0 < report.spent["computed"]


def test_the_best_of_a_search_is_a_recipe_that_merges(models: Mapping[str, Checkpoint], tasks: Mapping[str, TaskSet]) -> None:
    with ScoreStore(":memory:") as store:
        evaluator = CandidateEvaluator(models, tasks["proxy"], store)
        report = run_study(settings("average"), evaluator, None)
        assert report.best is not None
        candidate = report.best.proposal.candidate
        assert isinstance(candidate, Candidate)
        merged = build(read_recipe(dict(candidate.recipe)), resolve=models.__getitem__)
        assert merged.names() == models["base"].names()
