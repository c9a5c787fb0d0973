"""Several processes score what one would, to the last bit, and one that dies or hangs takes its candidate with it and nobody else."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import MergeError, RunError, UserError
from modelglue.evaluation import CandidateEvaluator, ScoreStore, TaskSet, crew
from modelglue.evaluation.crew import Outcome, Unit
from modelglue.evaluation.members import Members
from modelglue.evaluation.places import Place
from modelglue.recipe import Candidate, Plan, Scores
from tests.small_zoo import TINY_ZOO, write_tasks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked, so that they see what is patched here")

NAMES = ("reverse", "larger", "generalist")


@pytest.fixture(scope="module")
def models() -> Mapping[str, Checkpoint]:
    return {name: open_checkpoint(TINY_ZOO / "models" / name) for name in NAMES}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    return TaskSet.load(["reverse_proxy", "larger_proxy"], write_tasks(tmp_path_factory.mktemp("tasks"), items=20))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batches a candidate."""
    monkeypatch.setattr("modelglue.evaluation.scoring.BATCH_ITEMS", 8)


def candidates() -> list[Candidate]:
    merges = [Candidate.linear({"reverse": share, "larger": 1 - share}) for share in (0.2, 0.5, 0.8)]
    return [Candidate.single("reverse"), *merges, Candidate.single("reverse")]


def requests() -> list[tuple[Candidate, Plan]]:
    return [(candidate, Plan()) for candidate in candidates()]


def scored(models: Mapping[str, Checkpoint], tasks: TaskSet, workers: int, path: str | Path = ":memory:") -> tuple[dict[int, Scores], Any]:
    with ScoreStore(path) as store, CandidateEvaluator(models, tasks, store, workers=workers) as evaluator:
        found = dict(evaluator.evaluate_many(requests()))
        keys = [item.key for items in tasks.skills.values() for item in items]
        return found, {key: store.known(key, keys) for key in map(evaluator.key, candidates())}


def test_the_number_of_workers_changes_nothing(models: Mapping[str, Checkpoint], tasks: TaskSet) -> None:
    """Values, losses, answers and tokens; a candidate that is asked for twice is scored once."""
    alone = scored(models, tasks, 1)
    assert sorted(alone[0]) == [0, 1, 2, 3, 4]
    for workers in (2, 4):
        together = scored(models, tasks, workers)
        assert together == alone
        assert [together[0][number].cost.computed for number in range(5)] == [40, 40, 40, 40, 0]
    assert alone[0][0] == alone[0][4]


def test_one_candidate_is_shared(models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: list[int] = []
    give = crew.Processes.give

    def noting(self: crew.Processes, lane: int, unit: Unit) -> None:
        lanes.append(lane)
        give(self, lane, unit)

    monkeypatch.setattr(crew.Processes, "give", noting)
    with ScoreStore(":memory:") as store, CandidateEvaluator(models, tasks, store, workers=2) as evaluator:
        scores = evaluator.evaluate(Candidate.single("reverse"))
    with ScoreStore(":memory:") as store:
        assert scores == CandidateEvaluator(models, tasks, store).evaluate(Candidate.single("reverse"))
    assert len(lanes) == 6
    assert set(lanes) == {0, 1}


def patched(monkeypatch: pytest.MonkeyPatch, when: str, what: Any) -> None:
    """Workers that do `what` when they are asked about the candidate with this description."""
    do = crew.Worker.do

    def doing(self: crew.Worker, unit: Unit) -> Outcome:
        return what() if unit[0].describe() == when else do(self, unit)

    monkeypatch.setattr(crew.Worker, "do", doing)


VICTIM = "0.5 reverse + 0.5 larger"


def others_are_fine(found: Mapping[int, Scores]) -> Scores:
    assert [found[number].status for number in (0, 1, 3, 4)] == ["ok"] * 4
    return found[2]


def test_a_worker_that_dies(models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, VICTIM, lambda: os.kill(os.getpid(), signal.SIGKILL))
    lost = others_are_fine(scored(models, tasks, 2)[0])
    assert (lost.status, lost.error) == ("failed", f"{VICTIM}: the worker process died twice, probably for want of memory.")


def test_what_a_dead_worker_was_doing_is_done_once_more(
    models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Anything may have killed it: who else is on the machine, or the one who looks for memory."""
    do = crew.Worker.do

    def dying(self: crew.Worker, unit: Unit) -> Outcome:
        if unit[0].describe() == VICTIM and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return do(self, unit)

    expected = scored(models, tasks, 1)
    monkeypatch.setattr(crew.Worker, "do", dying)
    assert scored(models, tasks, 2) == expected
    assert (tmp_path / "died").exists()


def test_devices_are_given_out_in_turn(models: Mapping[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew.Worker, "do", lambda self, _unit: RuntimeError(self._resident._device))
    for devices, expected in ((("cpu", "cpu:0"), ["cpu", "cpu:0", "cpu"]), ((), ["None"] * 3)):
        processes = crew.Processes(Members(models), 3, devices)
        for lane in range(3):
            processes.give(lane, (Candidate.single("reverse"), "key", []))
        found: dict[int, str] = {}
        while len(found) < 3:
            found |= {lane: str(outcome) for lane, outcome in processes.wait(None)}
        processes.close()
        assert [found[lane] for lane in range(3)] == expected


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("cuda", 3, ("cuda:0", "cuda:1", "cuda:2")), ("cuda", 1, ("cuda",)), ("cuda:1", 3, ("cuda:1",)),
        ("cuda:0,cuda:2", 3, ("cuda:0", "cuda:2")), ("cpu", 3, ()), ("cpu:sim", 3, ("cpu",)),
    ],
)  # fmt: skip
def test_a_kind_of_device_is_all_of_its_kind(text: str, count: int, expected: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(device_count=lambda: count, is_available=lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda _kind: fake)
    place = Place.named(device=text)
    assert place.devices == tuple(expected)
    assert place.device == (expected[0] if expected else None)


def test_one_worker_for_every_device(models: Mapping[str, Checkpoint], tasks: TaskSet) -> None:
    """The processor is the device here, and answers as ever."""
    members = Members(models)
    with Place(devices=("cpu",)).crew(members) as none, Place().crew(members) as neither:
        assert none is neither is None
    with Place(devices=("cpu", "cpu:0")).crew(members) as two, ScoreStore(":memory:") as store:
        assert isinstance(two, crew.Processes)
        assert two.lanes == 2
        found = dict(CandidateEvaluator(models, tasks, store, crew=two).evaluate_many(requests()))
    with Place(workers=3, devices=("cpu",)).crew(members) as three:
        assert three is not None
        assert three.lanes == 3
    assert found == scored(models, tasks, 1)[0]


def test_a_process_that_is_started_afresh(models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerators and other systems than Linux want it; it maps the files itself."""
    monkeypatch.setattr(crew.sys, "platform", "darwin")
    lane = crew.Processes(Members(models), 1, ("cpu",))
    with ScoreStore(":memory:") as store, CandidateEvaluator(models, tasks, store, crew=lane) as evaluator:
        found = evaluator.evaluate(Candidate.linear({"reverse": 0.5, "larger": 0.5}))
    with ScoreStore(":memory:") as store:
        assert found == CandidateEvaluator(models, tasks, store).evaluate(Candidate.linear({"reverse": 0.5, "larger": 0.5}))


def test_places_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="executor 'slurm': there is none of this name"):
        Place.named(executor="slurm")
    with pytest.raises(UserError, match=r"device 'cuda:7': torch .* sees (no such device|\d of this kind) here"):
        Place.named(device="cuda:7")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=r"Ray is not installed\. Install it with: pip install 'modelglue\[ray\]'"):
            Place.named(executor="ray://head:10001")
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"device 'mps' and executor 'ray': allowed on a cluster are cpu, and cuda for one GPU each"):
        Place.named(device="mps", executor="ray")


def test_a_worker_that_hangs_is_ended(models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, VICTIM, lambda: threading.Event().wait())
    with ScoreStore(":memory:") as store, CandidateEvaluator(models, tasks, store, workers=2, timeout=20) as evaluator:
        assert all(
            scores.status == "ok" for _, scores in evaluator.evaluate_many([one for one in requests() if one[0].describe() != VICTIM])
        )
        evaluator._timeout = 0.5
        ((_, lost),) = evaluator.evaluate_many([requests()[2]])
        evaluator._timeout = 20
        assert evaluator.evaluate(Candidate.single("generalist")).status == "ok"
    assert (lost.status, lost.error) == ("failed", f"{VICTIM}: took longer than 0.5 seconds")


class Foreign(Exception):  # noqa: N818
    """An exception that cannot travel: it cannot be made of a text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (MemoryError("no room"), "failed", "out of memory: no room"),
        (RuntimeError("CUDA out of memory"), "failed", "out of memory: CUDA out of memory"),
        (MergeError("comes out with NaN"), "invalid", "comes out with NaN"),
        (Foreign(1, 2), "failed", "Foreign: 1 and 2"),
    ],
)
def test_an_exception_in_a_worker(
    models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, text: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    holding = crew.ResidentModel.holding
    monkeypatch.setattr(
        crew.ResidentModel, "holding", lambda self, made, key: fail() if "0.5" in repr(made.describe()) else holding(self, made, key)
    )
    lost = others_are_fine(scored(models, tasks, 2)[0])
    assert (lost.status, lost.error) == (status, f"{VICTIM}: {text}")


def test_what_is_nobodys_fault_is_raised(models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, VICTIM, lambda: UserError("the tokenizer is gone"))
    with pytest.raises(UserError, match="the tokenizer is gone"):
        scored(models, tasks, 2)


def test_a_full_disk_loses_nothing_that_was_stored(
    models: Mapping[str, Checkpoint], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add = ScoreStore.add
    calls: list[int] = []

    def full(self: ScoreStore, *values: Any) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise RunError("scores cannot be written (the disk is full)")
        add(self, *values)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreStore, "add", full)
        with pytest.raises(RunError, match="the disk is full"):
            scored(models, tasks, 2, tmp_path / "s")
    with ScoreStore(tmp_path / "s") as store:
        kept = store.counts()[1]
    found, _ = scored(models, tasks, 2, tmp_path / "s")
    assert sum(scores.cost.computed for scores in found.values()) == 160 - kept
    assert kept > 0
    assert found == scored(models, tasks, 1)[0]


def test_who_stops_listening_leaves_no_worker(models: Mapping[str, Checkpoint], tasks: TaskSet) -> None:
    with ScoreStore(":memory:") as store:
        evaluator = CandidateEvaluator(models, tasks, store, workers=2)
        answers: Iterator[tuple[int, Scores]] = evaluator.evaluate_many(requests())
        next(answers)
        pids = workers_of(evaluator)
        assert pids
        answers.close()  # type: ignore[attr-defined]
        evaluator.close()
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def workers_of(evaluator: CandidateEvaluator) -> Sequence[int]:
    assert isinstance(evaluator._crew, crew.Processes)
    return [process.pid for process, _ in evaluator._crew._running.values()]
