"""Workers on a Ray cluster write the same bytes, deaths are made good, exceptions arrive as they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import save
from modelglue.checkpoint.engine.executor import RayCluster
from modelglue.checkpoint.output import plan
from modelglue.errors import MergeError, WorkerDiedError
from tests.checkpoint.files import contents
from tests.checkpoint.merges import merge_of, reopened, write_zoo

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


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


def test_what_a_dead_worker_was_doing_is_done_again(two_workers: Any, tmp_path: Path) -> None:
    done: dict[int, int] = {}

    def on_done(task: int, result: int) -> list[int]:
        done[task] = result
        return [100] if task == 7 else []

    RayCluster(None).run(die_once, tmp_path, list(range(8)), workers=2, on_done=on_done)
    assert (tmp_path / "died").exists()
    assert done == {task: task * task for task in [*range(8), 100]}
    assert (tmp_path / "there").read_text() == str(Path.cwd())


def test_errors_of_workers_arrive_as_they_are(two_workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.engine.executor._DEATHS", 2)
    with pytest.raises(MergeError, match=r"^tensor 'w' is bad$"):
        RayCluster(None).run(fail, tmp_path, [1, 2], workers=1, on_done=lambda *_: None)
    with pytest.raises(WorkerDiedError, match=r"2 workers of the cluster died, the last one with: .*the finished part is kept"):
        RayCluster(None).run(die_always, tmp_path, [1], workers=1, on_done=lambda *_: None)
