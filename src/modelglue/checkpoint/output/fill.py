"""What a worker does: compute pieces, put them at their places, and hash the tensors on the way."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint.engine.device import lanes_of, pipelined
from modelglue.checkpoint.engine.workers import worker_number
from modelglue.checkpoint.formats.pages import keeping
from modelglue.checkpoint.output.plan import Plan, Task
from modelglue.checkpoint.protocol import Checkpoint
from modelglue.errors import RunError

_STEP = 2**20


@dataclass(frozen=True)
class Filling:
    """What all tasks of one output share.

    `chunk`: elements computed at a time. `mapped`: bytes of the inputs that a worker may keep mapped. `devices`: where, one for each
    worker in turn; none is the processor. `durable`: a task's bytes are on the disk before it is reported done, which who journals on
    another machine could not see to.
    """

    checkpoint: Checkpoint
    plan: Plan
    folder: Path
    chunk: int
    mapped: int = 0
    devices: tuple[str, ...] = ()
    durable: bool = False


@dataclass(frozen=True)
class Digest:
    """The task to hash a tensor whose pieces several tasks wrote; its bytes are still in the page cache."""

    name: str


def fill(state: Filling, task: Task | Digest) -> dict[str, str]:
    """Do one task and return the SHA-256 of the tensors that it completed.

    A tensor that this task writes alone is hashed chunk by chunk while the chunk is in the processor's cache.
    """
    if isinstance(task, Digest):
        return {task.name: _digest_of(state, task.name)}
    with keeping(state.mapped):
        return _write_pieces(state, task)


def whole_tensors(checkpoint: Checkpoint, task: Task) -> set[str]:
    """The tensors all of whose elements are in this task."""
    elements: dict[str, int] = {}
    for name, start, stop in task.spans:
        elements[name] = elements.get(name, 0) + stop - start
    return {name for name, count in elements.items() if count == checkpoint.info(name).numel}


def chunks_of(checkpoint: Checkpoint, task: Task, chunk: int) -> list[tuple[str, int, int]]:
    """The task's spans cut into pieces of about `chunk` elements, as the expression's methods want them."""
    return [
        (name, max(start, first), min(stop, last))
        for name, first, last in task.spans
        for start, stop in checkpoint.pieces(name, chunk)
        if start < last and stop > first
    ]


def _write_pieces(state: Filling, task: Task) -> dict[str, str]:
    import torch

    checkpoint, plan = state.checkpoint, state.plan
    if state.durable and not state.folder.is_dir():
        raise RunError(f"{socket.gethostname()}: does not see the folder {state.folder}. Choose one on a disk that all machines share.")
    lanes = lanes_of(state.devices[worker_number() % len(state.devices)] if state.devices else None)
    hashers = {name: hashlib.sha256() for name in whole_tensors(checkpoint, task)}
    descriptors: dict[str, int] = {}
    try:
        chunks = chunks_of(checkpoint, task, state.chunk)
        for (name, start, _), values in pipelined(chunks, lambda chunk: checkpoint.read(*chunk), lanes):
            shard = plan.home[name]
            if shard.file not in descriptors:
                descriptors[shard.file] = os.open(state.folder / shard.file, os.O_WRONLY)
            data = values.view(torch.uint8).numpy().data
            _write_at(descriptors[shard.file], data, shard.offsets[name] + start * values.element_size())
            if name in hashers:
                hashers[name].update(data)
        if state.durable:
            for descriptor in descriptors.values():
                os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, offset)
        else:  # no pwrite here: a descriptor of our own makes seek and write safe
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, data)
        data, offset = data[count:], offset + count


def _digest_of(state: Filling, name: str) -> str:
    shard, left = state.plan.home[name], state.checkpoint.info(name).nbytes
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(_STEP, left)))
    with (state.folder / shard.file).open("rb", buffering=0) as stream:
        stream.seek(shard.offsets[name])
        while left:
            count = stream.readinto(buffer[: min(_STEP, left)])
            if not count:
                raise OSError(f"{shard.file} has become shorter while it was written")
            hasher.update(buffer[:count])
            left -= count
    return hasher.hexdigest()
