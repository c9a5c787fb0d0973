"""Processes that kill themselves at a chosen moment, workers and all: what SIGKILL, the power cord of programs, leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

forked = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the victim is a forked copy of this process")


def run_in_child(function: Callable[[], Any]) -> int | None:
    """The exit code of a forked process that calls `function` as the leader of its own process group."""
    process = multiprocessing.get_context("fork").Process(target=_detached, args=(function,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads; the child runs torch in one thread
        process.start()
    process.join()
    return process.exitcode


def _detached(function: Callable[[], Any]) -> None:
    os.setsid()
    function()


def kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


def dying(function: Callable[..., Any], calls: int, *, before: bool = False) -> Callable[..., Any]:
    """`function`, whose process group dies after (or before) that call of it."""
    left = calls

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if before and left == 0:
            kill_group()
        result = function(*args, **kwargs)
        if left == 0:
            kill_group()
        return result

    return wrapped
