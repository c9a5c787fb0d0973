"""What is found out of a checkpoint's headers is found out once: checkpoints do not change."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

from modelglue.checkpoint.protocol import Checkpoint

T = TypeVar("T")


def once_per_checkpoint(function: Callable[[Checkpoint], T]) -> Callable[[Checkpoint], T]:
    """Remember the results of a function of one checkpoint for as long as somebody holds the checkpoint."""
    known: weakref.WeakKeyDictionary[Checkpoint, T] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def remembering(checkpoint: Checkpoint) -> T:
        if checkpoint not in known:
            known[checkpoint] = function(checkpoint)
        return known[checkpoint]

    return remembering
