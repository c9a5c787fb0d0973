"""The one code path that writes models.

The output is planned before it is written: names, shapes, dtypes and byte offsets are known from the inputs' headers. Workers
then put every piece at its place; a journal of finished tasks makes the write resumable after a kill; one rename makes
the folder appear.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from modelglue.checkpoint.card import model_card
from modelglue.checkpoint.folder import INDEX
from modelglue.checkpoint.merged import ENGINE_VERSION
from modelglue.checkpoint.protocol import ITEM_SIZE, PACKED_BITS, Checkpoint, SideFile
from modelglue.checkpoint.reference import reference_from
from modelglue.checkpoint.staging import JOURNAL, LOCK, json_bytes, staged
from modelglue.checkpoint.workers import run_tasks
from modelglue.checkpoint.yaml_text import yaml_text
from modelglue.errors import CheckpointError, RunError, UserError, WorkerDiedError
from modelglue.settings import CHUNK_ELEMENTS, SMALL_OUTPUT_BYTES, cache_dir, default_workers

RECIPE_FILE = "modelglue_recipe.yaml"
#: elements that one task writes at least, when tensors are small enough to be bundled
_TASK_ELEMENTS = 2**23
#: bytes that may be written but not yet journaled: what a kill can cost
_JOURNAL_BYTES = 512_000_000


@dataclass(frozen=True)
class SaveReport:
    """What `save` did."""

    directory: Path
    tensors: int
    bytes: int
    shards: int
    resumed_bytes: int
    already_complete: bool


@dataclass(frozen=True)
class Shard:
    """One planned file: its header, and where every tensor's bytes will stand (absolute offsets)."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True)
class Task:
    """A bundle of pieces, (tensor, start, stop) in elements, done by one worker and journaled as one."""

    number: int
    pieces: tuple[tuple[str, int, int], ...]
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


def plan_output(checkpoint: Checkpoint, *, shard_bytes: int = 5_000_000_000, chunk: int = CHUNK_ELEMENTS) -> Plan:
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
    return Plan(shards, tuple(_plan_tasks(checkpoint, shards, chunk)))


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


def _plan_tasks(checkpoint: Checkpoint, shards: Sequence[Shard], chunk: int) -> list[Task]:
    """Bundles of about equal size; a tensor that only one worker may handle stays whole. The largest come first."""
    bundles: list[list[tuple[str, int, int]]] = []
    for shard in shards:
        bundle: list[tuple[str, int, int]] = []
        filled = 0
        for name in shard.offsets:
            whole = not checkpoint.splittable(name)
            for start, stop in checkpoint.pieces(name, chunk):
                bundle.append((name, start, stop))
                filled += stop - start
                if filled >= _TASK_ELEMENTS and not whole:
                    bundles.append(bundle)
                    bundle, filled = [], 0
            if filled >= _TASK_ELEMENTS:
                bundles.append(bundle)
                bundle, filled = [], 0
        if bundle:
            bundles.append(bundle)
    sized = [(sum((b - a) * ITEM_SIZE[checkpoint.info(n).dtype] for n, a, b in bundle), bundle) for bundle in bundles]
    sized.sort(key=lambda item: -item[0])
    return [Task(number, tuple(bundle), size) for number, (size, bundle) in enumerate(sized)]


def save(
    checkpoint: Checkpoint,
    directory: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int = 5_000_000_000,
    chunk: int = CHUNK_ELEMENTS,
    recipe_text: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SaveReport:
    """Write `checkpoint` as an ordinary Hugging Face folder; equal inputs give equal bytes, whatever `workers` and `chunk`.

    Time: every input byte is read as often as the expression's method needs it (once for linear), every output byte is written
    once. Memory: O(chunk x inputs) in each worker, whatever the size of the model. `progress(done, total)` gets bytes.

    The recipe in the folder (unless `recipe_text` is given) refers to local models by paths that are relative to the folder;
    absolute paths and hub ids stay as they are.

    A killed save continues when it is called again with the same inputs; a finished one is recognised and left alone.
    Raises UserError for an existing other folder, for one that is, holds or lies in an input's folder, or for missing permission,
    RunError for a full disk, MergeError for what the merge finds in the weights; none of these leaves anything behind.
    WorkerDiedError leaves what was finished to the next call.
    """
    directory = Path(directory)
    plan = plan_output(checkpoint, shard_bytes=shard_bytes, chunk=chunk)
    _check_apart(checkpoint, directory)
    references = _references_from(checkpoint, directory)
    recipe = recipe_text if recipe_text is not None else yaml_text(_renamed(checkpoint.describe(), references))
    # Chunking is part of the key because it shapes the journal's tasks; it never shapes the bytes.
    key = hashlib.sha256(f"{ENGINE_VERSION}\n{plan.digest}\n{checkpoint.stamp}\n{recipe}".encode()).hexdigest()
    if _is_complete(directory, key, plan):
        return SaveReport(directory, len(plan.home), plan.tensor_bytes, len(plan.shards), 0, True)
    if workers is None:
        workers = 1 if plan.tensor_bytes < SMALL_OUTPUT_BYTES else default_workers()
    made = _made_files(checkpoint, plan, recipe, references)
    with staged(directory, key=key, overwrite=overwrite) as folder:
        resumed = _write_shards(checkpoint, plan, folder, workers, progress)
        _write_side_files(checkpoint.files, made, folder)
        _remember_complete(directory, folder, key)
    return SaveReport(directory, len(plan.home), plan.tensor_bytes, len(plan.shards), resumed, False)


def _check_apart(checkpoint: Checkpoint, directory: Path) -> None:
    """UserError if writing `directory` would touch a model that the merge reads."""
    target = Path(os.path.realpath(directory))
    for source in checkpoint.sources():
        for place in source.places:
            path = Path(os.path.realpath(place))
            if target == path:
                relation = "is"
            elif target in path.parents:
                relation = "holds"
            elif path in target.parents:
                relation = "lies in"
            else:
                continue
            model = source.describe()["model"]
            raise UserError(f"{directory}: {relation} the model '{model}' ({place}), which is merged here. Choose another path.")


def _references_from(checkpoint: Checkpoint, directory: Path) -> dict[str, str]:
    """How a file in `directory` refers to the local models that the checkpoint calls by relative paths."""
    found: dict[str, set[str]] = {}
    for source in checkpoint.sources():
        if source.places:
            reference = str(source.describe()["model"])
            found.setdefault(reference, set()).add(reference_from(reference, source.places, directory))
    # One name for two models can only be made in Python, and no text could tell them apart.
    return {reference: seen.pop() for reference, seen in found.items() if len(seen) == 1 and seen != {reference}}


def _renamed(description: Any, references: Mapping[str, str]) -> Any:
    """A checkpoint's description with its models called by other references."""
    if isinstance(description, list):
        return [_renamed(value, references) for value in description]
    if not isinstance(description, dict):
        return description
    return {
        key: references.get(value, value) if key in ("model", "base") and isinstance(value, str) else _renamed(value, references)
        for key, value in description.items()
    }


def _write_shards(checkpoint: Checkpoint, plan: Plan, folder: Path, workers: int, progress: Callable[[int, int], None] | None) -> int:
    """Fill the preallocated shards; return the bytes that an earlier process had already written."""
    journal = _Journal(folder / JOURNAL, plan.digest)
    afresh = not journal.done or not all(_is_there(folder, shard) for shard in plan.shards)
    if afresh:
        _clear(folder)
    _check_space(folder, plan)
    if afresh:
        _lay_out(folder, plan)
        journal.start()
    waiting = [task for task in plan.tasks if task.number not in journal.done]
    resumed = plan.tensor_bytes - sum(task.bytes for task in waiting)
    written = resumed
    if progress:
        progress(written, plan.tensor_bytes)
    if waiting:
        checkpoint.prepare(sorted({name for task in waiting for name, _, _ in task.pieces}))
    with _Flusher([folder / shard.file for shard in plan.shards], journal) as flusher:

        def on_done(task: Task, _result: None) -> None:
            nonlocal written
            written += task.bytes
            flusher.add(task)
            if progress:
                progress(written, plan.tensor_bytes)

        run_tasks(_fill, (checkpoint, plan, folder), waiting, workers=workers, on_done=on_done)
    return resumed


def _is_there(folder: Path, shard: Shard) -> bool:
    path = folder / shard.file
    return path.is_file() and path.stat().st_size == shard.size


def _clear(folder: Path) -> None:
    """Take out what a process of another state of things left here; an exchange that was cut short leaves a whole model."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _lay_out(folder: Path, plan: Plan) -> None:
    """Empty shards of full length, each with its header."""
    for shard in plan.shards:
        with (folder / shard.file).open("wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.size)


def _fill(state: tuple[Checkpoint, Plan, Path], task: Task) -> None:
    """Compute the pieces of one task and put them at their places. Runs in a worker."""
    import torch

    checkpoint, plan, folder = state
    descriptors: dict[str, int] = {}
    try:
        for name, start, stop in task.pieces:
            if stop == start:
                continue
            shard = plan.home[name]
            if shard.file not in descriptors:
                descriptors[shard.file] = os.open(folder / shard.file, os.O_WRONLY)
            values = checkpoint.read(name, start, stop)
            offset = shard.offsets[name] + start * values.element_size()
            _write_at(descriptors[shard.file], values.view(torch.uint8).numpy().data, offset)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, offset)
        else:  # no pwrite here: a descriptor of our own makes seek and write safe
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, data)
        data, offset = data[count:], offset + count


class _Journal:
    """Numbers of the tasks whose bytes are on the disk, under a first line that names the plan."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self.done: set[int] = set()
        lines = path.read_text(encoding="ascii", errors="replace").split("\n") if path.exists() else [""]
        if lines[0] == digest:
            self.done = {int(line) for line in lines[1:-1] if line.isdigit()}
            if lines[-1]:  # torn: the next number would be glued to it
                self._write()

    def start(self) -> None:
        self.done = set()
        self._write()

    def add(self, numbers: Sequence[int]) -> None:
        with self._path.open("a", encoding="ascii") as stream:
            stream.write("".join(f"{number}\n" for number in numbers))
            stream.flush()
            os.fsync(stream.fileno())

    def _write(self) -> None:
        self._path.write_text("\n".join([self._digest, *map(str, sorted(self.done)), ""]), encoding="ascii")


class _Flusher:
    """Brings written bytes to the disk beside the arithmetic, and journals a task only after its bytes are there."""

    def __init__(self, paths: Sequence[Path], journal: _Journal) -> None:
        self._paths = paths
        self._journal = journal
        self._waiting: list[Task] = []
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.join()
        died = kind is not None and issubclass(kind, WorkerDiedError)
        if kind is not None and issubclass(kind, Exception) and not died:
            return  # the folder is about to be removed
        if self._waiting and (died or self._bytes >= _JOURNAL_BYTES // 4) and self._error is None:
            self._flush(self._waiting)
        if self._error is not None:
            raise self._error

    def add(self, task: Task) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.append(task)
        self._bytes += task.bytes
        if self._bytes >= _JOURNAL_BYTES and (self._thread is None or not self._thread.is_alive()):
            batch, self._waiting, self._bytes = self._waiting, [], 0
            self._thread = threading.Thread(target=self._flush, args=(batch,), daemon=True)
            self._thread.start()

    def _flush(self, batch: Sequence[Task]) -> None:
        try:
            for path in self._paths:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            self._journal.add([task.number for task in batch])
        except OSError as error:  # raised where the merge is waiting for it
            self._error = error


def _check_space(folder: Path, plan: Plan) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    there = sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors"))
    need = sum(shard.size for shard in plan.shards) - there
    if need > free:
        raise RunError(
            f"{folder.parent}: the disk is full: the output needs {need:,} bytes and {free:,} are free. "
            "Free some space, or choose another disk; nothing was left behind."
        )


def _made_files(checkpoint: Checkpoint, plan: Plan, recipe: str, references: Mapping[str, str]) -> dict[str, bytes]:
    """What stands beside the weights and is not copied, made before they are: a broken config should not cost a merge.

    The index is the last, because its name means that all shards are there. The config keeps its order and what nobody knows in it.
    """
    made = {RECIPE_FILE: recipe.encode(), "README.md": model_card(checkpoint, recipe, references).encode()}
    if checkpoint.config:
        made["config.json"] = (json.dumps(dict(checkpoint.config), indent=2, ensure_ascii=False) + "\n").encode()
    if len(plan.shards) > 1:
        weight_map = {tensor: plan.home[tensor].file for tensor in sorted(plan.home)}
        made[INDEX] = json_bytes({"metadata": {"total_size": plan.tensor_bytes}, "weight_map": weight_map})
    return made


def _write_side_files(files: Mapping[str, SideFile], made: Mapping[str, bytes], folder: Path) -> None:
    for file, source in files.items():
        if isinstance(source, bytes):
            (folder / file).write_bytes(source)
            continue
        try:
            shutil.copyfile(source, folder / file)
        except OSError as error:
            if error.filename == str(source):
                raise CheckpointError(f"{source}: cannot be read ({error.strerror}). Check its permissions.") from error
            raise
    for file, data in made.items():
        (folder / file).write_bytes(data)


def _completion_record(directory: Path, folder: Path) -> Path:
    """Where it is remembered which recipe and inputs a finished folder came from; `folder` is what it is called before it is finished.

    Not inside the folder: inode and mtime of the inputs are part of it, and the folder's bytes are a function of contents only.
    """
    status = (folder / RECIPE_FILE).stat()
    name = f"{directory.absolute()}\0{status.st_ino}\0{status.st_mtime_ns}"
    return cache_dir() / "outputs" / hashlib.sha256(name.encode()).hexdigest()


def _is_complete(directory: Path, key: str, plan: Plan) -> bool:
    try:
        known = _completion_record(directory, directory).read_text(encoding="ascii")
        return known == key and all(_is_there(directory, shard) for shard in plan.shards)
    except (OSError, UnicodeDecodeError):
        return False


def _remember_complete(directory: Path, folder: Path, key: str) -> None:
    """A cache that cannot be written only means that a second call says "exists" instead of "complete"."""
    with contextlib.suppress(OSError):
        record = _completion_record(directory, folder)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(key, encoding="ascii")
