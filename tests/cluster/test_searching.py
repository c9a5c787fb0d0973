"""A search on a Ray cluster finds what one process finds; what a dead worker was doing is done by another."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.checkpoint.engine.executor import RayCluster
from modelglue.errors import MergeError, RunError, UserError
from modelglue.evaluation import CandidateEvaluator, ScoreStore, TaskSet
from modelglue.evaluation.members import Members
from modelglue.evaluation.places import Place
from modelglue.evaluation.ray_crew import RayCrew
from modelglue.recipe import Candidate, Plan
from modelglue.search.journal import Journal
from modelglue.search.run import JOURNAL
from modelglue.studies import run_search
from tests.small_zoo import TINY_ZOO, write_tasks, write_yaml, write_zoo

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

SKILLS = ("reverse", "larger")
BAD, DEADLY, UNLUCKY = (Candidate.linear({"reverse": share, "larger": 1 - share}) for share in (0.2, 0.5, 0.8))


@pytest.fixture(scope="module")
def models() -> Mapping[str, Checkpoint]:
    return {name: open_checkpoint(TINY_ZOO / "models" / name) for name in SKILLS}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    return TaskSet.load([f"{skill}_proxy" for skill in SKILLS], write_tasks(tmp_path_factory.mktemp("tasks"), SKILLS, items=12))


class Fragile(Members):
    """Members of which some merges kill the process, the first time or always, and some fail."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], died: Path) -> None:
        super().__init__(checkpoints)
        self.died = died

    def expression(self, candidate: Candidate) -> Checkpoint:
        if candidate.key == BAD.key:
            raise MergeError("comes out with NaN")
        if candidate.key == DEADLY.key or (candidate.key == UNLUCKY.key and not self.died.exists()):
            if candidate.key == UNLUCKY.key:
                self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().expression(candidate)


def unknown_there() -> None:
    raise ModuleNotFoundError("no such module")


class Foreign(Members):
    """Members that the other machine cannot make."""

    def __reduce__(self) -> Any:
        return unknown_there, ()


def test_a_search_finds_the_same(two_workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from relative paths: trace, result and stored scores."""
    write_zoo(tmp_path, SKILLS, SKILLS, items=8)
    file = {
        "zoo": "zoo.yaml", "members": list(SKILLS), "searcher": {"name": "evolution", "population": 4, "generations": 2}, "finalists": 2,
        "tasks": {"include": "tasks", **{split: [f"{skill}_{split}" for skill in SKILLS] for split in ("proxy", "confirmation")}},
    }  # fmt: skip
    write_yaml(tmp_path / "search.yaml", file)
    monkeypatch.chdir(tmp_path)
    found = run_search("search.yaml", "alone")
    there = run_search("search.yaml", "far", workers=2, executor="ray")
    assert there.result == found.result
    traces = []
    for folder in (Path("alone"), Path("far")):
        with Journal(folder / JOURNAL, read_only=True) as journal:
            traces.append((journal.asked(), journal.events(trace=True), dict(journal.results("search"))))
    assert traces[0] == traces[1]
    assert two_workers.is_initialized(), "a cluster that was there before stays"


def test_what_a_dead_worker_was_doing_is_done_by_another(
    two_workers: Any, models: Mapping[str, Checkpoint], tasks: TaskSet, tmp_path: Path
) -> None:
    """Once: who kills that one as well fails, as does who raises, and nobody else."""
    requests = [(candidate, Plan()) for candidate in (Candidate.single("reverse"), BAD, DEADLY, UNLUCKY)]
    with ScoreStore(":memory:") as store:
        alone = dict(CandidateEvaluator(models, tasks, store).evaluate_many(requests))
    crew = RayCrew(Fragile(models, tmp_path / "died"), RayCluster(None), 2)
    with ScoreStore(":memory:") as store, CandidateEvaluator(models, tasks, store, crew=crew) as evaluator:
        found = dict(evaluator.evaluate_many(requests))
    assert (tmp_path / "died").exists()
    assert (found[0], found[3]) == (alone[0], alone[3])
    assert (found[1].status, found[1].error) == ("invalid", f"{BAD.describe()}: comes out with NaN")
    assert found[2].status == "failed"
    assert found[2].error.startswith(f"{DEADLY.describe()}: its worker on the cluster died twice: ")


def test_workers_that_cannot_be_had(two_workers: Any, models: Mapping[str, Checkpoint]) -> None:
    """More than there is room for would wait for ever; those that cannot begin are nobody's fault."""
    with pytest.raises(UserError, match=r"^the cluster has 2 CPUs, and 3 workers need one each\. Give fewer, or add machines\.$"):
        RayCrew(Members(models), RayCluster(None), 3)
    with pytest.raises(RunError, match=r"^the workers of the cluster cannot begin \(.*no such module.*\)\. Every machine needs modelglue"):
        RayCrew(Foreign(models), RayCluster(None), 1)
    with (
        pytest.raises(UserError, match=r"^the cluster has 0 GPUs, and 1 workers need one each\."),
        Place.named(None, "cuda", "ray").crew(Members(models)),
    ):
        pass
