"""Workers on a Ray cluster: the same bytes, deaths made good, exceptions as they are. The cluster is this machine, with two workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import save
from modelglue.checkpoint.engine.executor import RayCluster, executor_of
from modelglue.checkpoint.output import plan
from modelglue.checkpoint.output.fill import Filling, fill
from modelglue.errors import MergeError, RunError, UserError, WorkerDiedError
from tests.checkpoint.files import contents
from tests.checkpoint.merges import merge_of, reopened, write_zoo


def test_names_of_executors() -> None:
    pytest.importorskip("ray")
    assert executor_of(None) is executor_of("local") is None
    assert executor_of("ray") == RayCluster(None)
    assert executor_of("ray://head:10001") == RayCluster("ray://head:10001")


@pytest.mark.parametrize("text", ["slurm", "Ray", "ray:head", "http://head", ""])
def test_unknown_executor_is_refused_before_anything_is_written(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^executor '{text}': there is none of this name\. Allowed are local, ray and ray://HOST:PORT\.$"):
        save(merge_of(write_zoo(tmp_path / "zoo")), tmp_path / "out", executor=text)
    assert not (tmp_path / "out").exists()


def test_cluster_and_device_do_not_go_together(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"^device 'cpu:sim' and executor 'ray' do not go together: workers of a cluster compute on"):
        save(merge_of(write_zoo(tmp_path / "zoo")), tmp_path / "out", executor="ray", device="cpu:sim")


def test_without_ray_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for text in ("ray", "ray://head:10001"):
        with pytest.raises(UserError, match=r"^executor 'ray': Ray is not installed\. Install it with: pip install 'modelglue\[ray\]'\.$"):
            executor_of(text)


def test_machine_that_does_not_see_the_folder_is_named(tmp_path: Path) -> None:
    merged = merge_of(write_zoo(tmp_path / "zoo"))
    planned = plan.plan_output(merged)
    with pytest.raises(RunError, match=r"does not see the folder .*not-here\. Choose one on a disk that all machines share"):
        fill(Filling(merged, planned, tmp_path / "not-here", 1000, durable=True), planned.tasks[0])


# -- a cluster ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Any]:
    """A local cluster for the tests below, which is shut down whatever happens."""
    ray = pytest.importorskip("ray")
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=80_000_000,
            )  # fmt: skip
            yield ray
        finally:
            ray.shutdown()


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_cluster_writes_the_same_bytes(two_workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from relative paths, and with tensors that several workers write and one hashes."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 300)
    zoo = write_zoo(tmp_path / "zoo")
    monkeypatch.chdir(tmp_path)
    for method in ("linear", "ties"):
        save(merge_of(reopened(zoo), method), Path("plain") / method / "out", workers=1, shard_bytes=5000)
        report = save(merge_of(reopened(zoo), method), Path("far") / method / "out", executor="ray", workers=2, shard_bytes=5000)
        assert contents(Path("far") / method / "out") == contents(Path("plain") / method / "out")
        assert (report.shards > 1, report.resumed_bytes) == (True, 0)
    assert two_workers.is_initialized(), "a cluster that was there before stays"


def die_once(state: Path, task: int) -> int:
    """The first worker that takes task 3 dies with it."""
    if task == 3 and not (state / "died").exists():
        (state / "died").touch()
        os._exit(1)
    if task == 5:
        (state / "there").write_text(str(Path.cwd()))
    return task * task


def die_always(state: Path, task: int) -> None:
    os._exit(1)


def fail(state: Path, task: int) -> None:
    raise MergeError("tensor 'w' is bad")


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_what_a_dead_worker_was_doing_is_done_again(two_workers: Any, tmp_path: Path) -> None:
    done: dict[int, int] = {}

    def on_done(task: int, result: int) -> list[int]:
        done[task] = result
        return [100] if task == 7 else []

    RayCluster(None).run(die_once, tmp_path, list(range(8)), workers=2, on_done=on_done)
    assert (tmp_path / "died").exists()
    assert done == {task: task * task for task in [*range(8), 100]}
    assert (tmp_path / "there").read_text() == str(Path.cwd())


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_errors_of_workers_arrive_as_they_are(two_workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.engine.executor._DEATHS", 2)
    with pytest.raises(MergeError, match=r"^tensor 'w' is bad$"):
        RayCluster(None).run(fail, tmp_path, [1, 2], workers=1, on_done=lambda *_: None)
    with pytest.raises(WorkerDiedError, match=r"2 workers of the cluster died, the last one with: .*the finished part is kept"):
        RayCluster(None).run(die_always, tmp_path, [1], workers=1, on_done=lambda *_: None)
