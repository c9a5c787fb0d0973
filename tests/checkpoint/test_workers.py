"""Workers: every task once, exceptions as they are, deaths as RunError, and nothing left running."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint.engine.workers import run_tasks, single_thread
from modelglue.errors import MergeError, WorkerDiedError


def square(state: Any, task: int) -> tuple[int, int, int]:
    return task * task + state["add"], os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_every_task_is_done_once_and_reported_here(workers: int) -> None:
    done: dict[int, Any] = {}
    here: set[int] = set()

    def on_done(task: int, result: Any) -> None:
        assert task not in done
        done[task] = result
        here.add(os.getpid())

    run_tasks(square, {"add": 5}, list(range(40)), workers=workers, on_done=on_done)
    assert {task: value for task, (value, _, _) in done.items()} == {task: task * task + 5 for task in range(40)}
    pids = {pid for _, pid, _ in done.values()}
    assert here == {os.getpid()}
    assert (os.getpid() in pids) == (workers <= 1)
    assert len(pids) <= max(workers, 1)
    assert {threads for _, _, threads in done.values()} == {1}
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_handed_out_in_order(workers: int, tmp_path: Path) -> None:
    """Workers overtake each other; each of them goes forward."""
    run_tasks(log_start, tmp_path, list(range(30)), workers=workers, on_done=lambda *_: None)
    logs = [[int(line) for line in path.read_text().split()] for path in tmp_path.iterdir()]
    assert sorted(task for log in logs for task in log) == list(range(30))
    assert all(log == sorted(log) for log in logs)
    assert 1 <= len(logs) <= workers


def log_start(state: Path, task: int) -> None:
    with (state / str(os.getpid())).open("a") as stream:
        stream.write(f"{task}\n")


def fail_on_three(state: Any, task: int) -> None:
    if task == 3:
        raise MergeError("tensor 'w' is bad")


@pytest.mark.parametrize("workers", [1, 2])
def test_exception_of_a_task_arrives_as_it_is(workers: int) -> None:
    done: list[int] = []
    with pytest.raises(MergeError, match=r"^tensor 'w' is bad$"):
        run_tasks(fail_on_three, None, list(range(50)), workers=workers, on_done=lambda task, _: done.append(task))
    assert 3 not in done
    assert workers > 1 or done == [0, 1, 2]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_exception_of_the_caller_ends_the_workers(workers: int) -> None:
    def on_done(task: int, result: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(square, {"add": 0}, list(range(100)), workers=workers, on_done=on_done)
    assert multiprocessing.active_children() == []


def die(state: Any, task: int) -> None:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def leave(state: Any, task: int) -> None:
    if task == 3:
        os._exit(0)


@pytest.mark.parametrize("function", [die, leave])
def test_worker_that_dies_is_a_run_error(function: Any) -> None:
    message = "a worker process died, probably for want of memory. Run it again with fewer --workers; the finished part is kept."
    with pytest.raises(WorkerDiedError) as caught:
        run_tasks(function, None, list(range(20)), workers=2, on_done=lambda *_: None)
    assert (str(caught.value), caught.value.exit_code) == (message, 1)
    assert multiprocessing.active_children() == []


def test_one_task_needs_no_worker() -> None:
    pids: list[int] = []
    run_tasks(square, {"add": 0}, [4], workers=8, on_done=lambda _, result: pids.append(result[1]))
    assert pids == [os.getpid()]
    run_tasks(square, {"add": 0}, [], workers=8, on_done=lambda _, result: pids.append(result[1]))
    assert len(pids) == 1


def interrupt_signal(state: Any, task: int) -> Any:
    return signal.getsignal(signal.SIGINT)


def test_ctrl_c_is_the_parents_to_handle() -> None:
    found: list[Any] = []
    run_tasks(interrupt_signal, None, [1, 2, 3], workers=2, on_done=lambda _, result: found.append(result))
    assert found == [signal.SIG_IGN] * 3


def test_single_thread_gives_threads_back_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(ZeroDivisionError), single_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
