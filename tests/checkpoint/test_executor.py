"""What `--executor` may name, and what is said where it cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from modelglue.checkpoint import save
from modelglue.checkpoint.engine.executor import RayCluster, executor_of
from modelglue.checkpoint.output import plan
from modelglue.checkpoint.output.fill import Filling, fill
from modelglue.errors import RunError, UserError
from tests.checkpoint.merges import merge_of, write_zoo


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
