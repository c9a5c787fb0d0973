"""The plan of an output: every byte has its place before the first tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modelglue.checkpoint.protocol import ITEM_SIZE, PACKED_BITS, Checkpoint
from modelglue.errors import CheckpointError

#: elements that one task writes at least, when tensors are small enough to be bundled
TASK_ELEMENTS = 2**23
#: elements that are written at a time where nothing is computed
_STEP = 2**24
#: a tensor of up to so many tasks' elements stays whole, so that who writes it can hash it on the way
_WHOLE_TASKS = 4


@dataclass(frozen=True)
class Shard:
    """One planned file: its header, and where every tensor's bytes will stand (absolute offsets)."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True)
class Task:
    """A bundle of spans, (tensor, start, stop) in elements, done by one worker, in whatever chunks, and journaled as one."""

    number: int
    spans: tuple[tuple[str, int, int], ...]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Every byte of the output, before the first tensor is read."""

    shards: tuple[Shard, ...]
    tasks: tuple[Task, ...]

    @cached_property
    def home(self) -> dict[str, Shard]:
        return {name: shard for shard in self.shards for name in shard.offsets}

    @property
    def tensor_bytes(self) -> int:
        return sum(task.bytes for task in self.tasks)

    @property
    def digest(self) -> str:
        text = repr([(shard.file, shard.header) for shard in self.shards]) + repr(self.tasks)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_output(checkpoint: Checkpoint, *, shard_bytes: int = 5_000_000_000) -> Plan:
    """Divide the tensors, in the order of their names, into shards of at most `shard_bytes` (a larger tensor has its own)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(checkpoint.names()):
        if checkpoint.info(name).dtype in PACKED_BITS:
            raise CheckpointError(
                f"{checkpoint!r}: tensor '{name}' is {checkpoint.info(name).dtype}, several numbers to a byte; that is not written. "
                "Dequantise the model first, or take a release that is not quantised."
            )
        size = checkpoint.info(name).nbytes
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if not groups[0]:
        raise CheckpointError(f"{checkpoint!r}: holds no tensors, there is nothing to write.")
    total = len(groups)
    files = ["model.safetensors"] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    shards = tuple(_plan_shard(checkpoint, file, names) for file, names in zip(files, groups, strict=True))
    return Plan(shards, tuple(_plan_tasks(checkpoint, shards)))


def tensor_file(checkpoint: Checkpoint) -> bytes:
    """The bytes of one safetensors file with all tensors of a small checkpoint: the same layout, so equal tensors give equal bytes."""
    import torch

    plan = plan_output(checkpoint, shard_bytes=2**62)
    shard = plan.shards[0]
    data = bytearray(shard.size)
    data[: len(shard.header)] = shard.header
    for name, offset in shard.offsets.items():
        values = checkpoint.read(name).view(torch.uint8).numpy().tobytes()
        data[offset : offset + len(values)] = values
    return bytes(data)


def write_tensor_file(checkpoint: Checkpoint, path: Path) -> int:
    """The same file, written a step at a time; returns its size. Memory: 16 Mi elements of a tensor."""
    import torch

    (shard,) = plan_output(checkpoint, shard_bytes=2**62).shards
    with path.open("wb") as stream:
        stream.write(shard.header)
        for name in sorted(shard.offsets, key=shard.offsets.__getitem__):
            numel = checkpoint.info(name).numel
            for start in range(0, numel, _STEP):
                stream.write(checkpoint.read(name, start, min(start + _STEP, numel)).view(torch.uint8).numpy().data)
    return shard.size


def _plan_shard(checkpoint: Checkpoint, file: str, names: Sequence[str]) -> Shard:
    """Wide elements first, then by name: every tensor is aligned. JSON keys are sorted, the header is padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for name in sorted(names, key=lambda name: (-ITEM_SIZE[checkpoint.info(name).dtype], name)):
        info = checkpoint.info(name)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + info.nbytes]}
        relative[name] = position
        position += info.nbytes
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    prefix = len(text).to_bytes(8, "little") + text
    return Shard(file, prefix, {name: start + offset for name, offset in relative.items()}, start + position)


def _plan_tasks(checkpoint: Checkpoint, shards: Sequence[Shard]) -> list[Task]:
    """Bundles of about equal size. A tensor stays whole that only one worker may handle, or that is not much larger than a bundle.

    The largest come first. How they are cut into chunks is not part of the plan: a killed save may be continued with other chunks.
    """
    bundles: list[list[tuple[str, int, int]]] = []
    for shard in shards:
        bundle: list[tuple[str, int, int]] = []
        filled = 0
        for name in shard.offsets:
            numel = checkpoint.info(name).numel
            whole = not checkpoint.splittable(name) or numel <= _WHOLE_TASKS * TASK_ELEMENTS
            for start, stop in [(0, numel)] if whole else checkpoint.pieces(name, TASK_ELEMENTS):
                bundle.append((name, start, stop))
                filled += stop - start
                if filled >= TASK_ELEMENTS:
                    bundles.append(bundle)
                    bundle, filled = [], 0
        if bundle:
            bundles.append(bundle)
    sized = [(sum((b - a) * ITEM_SIZE[checkpoint.info(n).dtype] for n, a, b in bundle), bundle) for bundle in bundles]
    sized.sort(key=lambda item: -item[0])
    return [Task(number, tuple(bundle), size) for number, (size, bundle) in enumerate(sized)]
