"""How many workers and how large a chunk a merge may have, so that private memory over all processes stays below a limit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from modelglue.checkpoint.output.plan import Task
from modelglue.checkpoint.protocol import Checkpoint
from modelglue.errors import UserError
from modelglue.settings import CHUNK_ELEMENTS

#: private bytes over all processes that a merge stays below where nothing else is said and its method needs no whole matrices
DEFAULT_BYTES = 1_000_000_000
#: what the calling process has: interpreter, torch and the headers
PROCESS_BYTES = 260_000_000
#: what a forked worker has of its own before it holds a chunk, and what a survey keeps of a tensor
WORKER_BYTES = 40_000_000
_SMALLEST_CHUNK = 2**16
#: pages beyond `MAPPED_BYTES` that a worker keeps mapped at most where memory is left: a tensor of several large models
_MAPPED_MOST = 2**27


@dataclass(frozen=True)
class Division:
    """Workers and elements of a chunk; the bytes that tasks in work may take together, the unit of `cost`; and the bytes of the inputs that
    each worker may keep mapped, because they are read again and nothing else needs the memory.
    """

    workers: int
    chunk: int
    capacity: int
    mapped: int

    def cost(self, checkpoint: Checkpoint, task: Task) -> int:
        """Bytes that a worker takes while it does this task."""
        return WORKER_BYTES + _largest(checkpoint, {name for name, _, _ in task.spans}, self.chunk)


def divide(checkpoint: Checkpoint, *, memory: int | None, workers: int, fixed_workers: bool, chunk: int | None = None) -> Division:
    """The most workers up to `workers` and the largest chunk that keep private memory within `memory` bytes.

    Without `memory` the limit is DEFAULT_BYTES, or what one worker needs if that is more: a method that holds whole matrices takes
    (inputs + 3) times the largest. Then `fixed_workers` are kept, and only the chunk shrinks. UserError if even one worker with the
    smallest chunk needs more than `memory`; it names the least.

    The numbers are upper estimates: chunks of every input in the dtype of the arithmetic, the temporaries of the method, mapped pages.
    """
    sizes = [chunk] if chunk is not None else [CHUNK_ELEMENTS >> shift for shift in range((CHUNK_ELEMENTS // _SMALLEST_CHUNK).bit_length())]
    limit = DEFAULT_BYTES if memory is None else memory
    names = checkpoint.names()
    needs = [WORKER_BYTES + _largest(checkpoint, names, size) for size in sizes]
    fits = [(limit - PROCESS_BYTES) // need for need in needs]
    if memory is not None and fits[-1] < 1:
        least = PROCESS_BYTES + needs[-1]
        raise UserError(
            f"a memory of {memory:,} bytes is too little: this merge needs at least {math.ceil(least / 1e6):,} MB with one worker. "
            "Allow as much, or leave it out."
        )
    best = next((number for number, fit in enumerate(fits) if fit >= workers), len(sizes) - 1)
    # Where a few tensors need much more than the others (whole matrices), the workers share them out by their cost instead.
    usual = WORKER_BYTES + _median(checkpoint, names, sizes[best])
    affordable = max((limit - PROCESS_BYTES) // usual, 1)
    kept = workers if memory is None and fixed_workers else min(workers, affordable)
    again = any(checkpoint.reads_twice(name) for name in names)
    spare = (limit - PROCESS_BYTES) // kept - needs[best] if again else 0
    return Division(kept, sizes[best], max(limit - PROCESS_BYTES, needs[best]), min(max(spare, 0), _MAPPED_MOST))


def _largest(checkpoint: Checkpoint, names: Iterable[str], chunk: int) -> int:
    return max((_of(checkpoint, name, chunk) for name in names), default=0)


def _median(checkpoint: Checkpoint, names: Iterable[str], chunk: int) -> int:
    found = sorted(_of(checkpoint, name, chunk) for name in names)
    return found[len(found) // 2] if found else 0


def _of(checkpoint: Checkpoint, name: str, chunk: int) -> int:
    info = checkpoint.info(name)
    return checkpoint.working_bytes(name, min(chunk, max(info.numel, 1)))
