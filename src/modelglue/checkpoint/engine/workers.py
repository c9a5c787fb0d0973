"""Worker processes on one machine: they map the same files, so the page cache is shared and nothing is sent but names."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeAlias

from modelglue.errors import WorkerDiedError

#: called with a task and its result; may return further tasks
OnDone: TypeAlias = Callable[[Any, Any], Iterable[Any] | None]

#: state that tasks share; set before workers start, so that a forked worker has it for nothing
_state: Any = None
_number = 0


def run_tasks(
    function: Callable[[Any, Any], Any],
    state: Any,
    tasks: Sequence[Any],
    *,
    workers: int,
    on_done: OnDone,
    cost: Callable[[Any], int] | None = None,
    capacity: int = 0,
    spawn: bool = False,
) -> None:
    """Call `function(state, task)` for every task, in `workers` processes; `on_done(task, result)` runs here, as they end.

    What `on_done` returns are further tasks, which come next. With one worker everything runs in this process. A worker that dies
    raises WorkerDiedError; an exception of a task is raised here as it is. Tasks are started in the order given: put long ones first.

    With `cost`, tasks are in work together only while their costs sum to at most `capacity`; one alone always may. `spawn` starts
    workers afresh instead of forking them, which a process that has used an accelerator must.
    """
    if workers <= 1 or len(tasks) <= 1:
        with single_thread():
            waiting = deque(tasks)
            while waiting:
                task = waiting.popleft()
                waiting.extendleft(on_done(task, function(state, task)) or ())
        return
    global _state
    _state = (function, state)
    context = _context(spawn)
    given = None if context.get_start_method() == "fork" else (function, state)
    gc.freeze()  # the collector of a forked worker would copy every page with an object of this process by looking at it
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(given, context.Value("i", 0)))
    try:
        with warnings.catch_warnings():
            # Forking a process that has threads is what torch's own data loader does; ours run no torch code meanwhile.
            warnings.simplefilter("ignore", DeprecationWarning)
            _drive(pool, tasks, workers, on_done, cost, capacity)
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "a worker process died, probably for want of memory. Run it again with fewer --workers; the finished part is kept."
        ) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        _state = None
        pool.shutdown(wait=True, cancel_futures=True)
        gc.unfreeze()


def _drive(
    pool: ProcessPoolExecutor, tasks: Sequence[Any], workers: int, on_done: OnDone, cost: Callable[[Any], int] | None, capacity: int
) -> None:
    running: dict[Future[Any], Any] = {}
    waiting = deque(tasks)
    spent: dict[Future[Any], int] = {}
    while running or waiting:
        while waiting and len(running) < (2 * workers if cost is None else workers):  # one in work and one in hand per worker
            price = 0 if cost is None else cost(waiting[0])
            if running and cost is not None and sum(spent.values()) + price > capacity:
                break
            task = waiting.popleft()
            future = pool.submit(_work, task)
            running[future], spent[future] = task, price
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            del spent[future]
            waiting.extendleft(on_done(running.pop(future), future.result()) or ())


def _context(spawn: bool) -> multiprocessing.context.BaseContext:
    """Fork where it is safe and cheap (Linux, no CUDA context): a spawned worker would import torch for seconds."""
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    return multiprocessing.get_context("fork" if sys.platform.startswith("linux") and not cuda and not spawn else "spawn")


def worker_number() -> int:
    """Which worker this process is, from 0; 0 as well where tasks run in the calling process."""
    return _number


def _start(argument: Any, started: Any) -> None:
    global _state, _number
    if argument is not None:
        _state = argument
    with started.get_lock():
        _number = started.value
        started.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        with contextlib.suppress(AttributeError):
            set_death_signal = 1
            libc.prctl(set_death_signal, signal.SIGKILL)  # nobody writes on when the parent was killed
        if os.getppid() == 1:
            os._exit(1)
    keep_freed_memory()
    import torch

    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Have this process keep freed chunks: giving their pages back and faulting them in again costs more than the arithmetic."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):
            trim_threshold, mmap_threshold = -1, -3
            libc = ctypes.CDLL(None)
            libc.mallopt(trim_threshold, 1 << 29)
            libc.mallopt(mmap_threshold, 1 << 28)


def _work(task: Any) -> Any:
    function, state = _state
    return function(state, task)


@contextmanager
def collector_paused() -> Iterator[None]:
    """The garbage collector finds nothing while modules are imported, and takes a fifth of the time of importing torch."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def single_thread() -> Iterator[None]:
    """Torch in one thread: sums and decompositions then have one order, so equal inputs give equal bytes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
