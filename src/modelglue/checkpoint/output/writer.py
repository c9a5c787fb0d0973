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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint.formats.folder import INDEX, SafetensorsCheckpoint
from modelglue.checkpoint.identity import remember_identity
from modelglue.checkpoint.merged import ENGINE_VERSION
from modelglue.checkpoint.output.card import model_card
from modelglue.checkpoint.output.execution import Execution, execution_of
from modelglue.checkpoint.output.fill import Digest, Filling
from modelglue.checkpoint.output.hashing import Hashing
from modelglue.checkpoint.output.journal import Entry, Flusher, Journal
from modelglue.checkpoint.output.plan import Plan, Shard, Task, plan_output
from modelglue.checkpoint.output.record import RECORD_FILE, record
from modelglue.checkpoint.output.staging import JOURNAL, LOCK, check_apart, json_bytes, staged
from modelglue.checkpoint.output.yaml_text import yaml_text
from modelglue.checkpoint.protocol import Checkpoint, SideFile
from modelglue.checkpoint.reference import REFERENCE_KEYS, reference_from
from modelglue.errors import CheckpointError, RunError
from modelglue.settings import cache_dir

RECIPE_FILE = "modelglue_recipe.yaml"


@dataclass(frozen=True)
class SaveReport:
    """What `save` did."""

    directory: Path
    tensors: int
    bytes: int
    shards: int
    resumed_bytes: int
    already_complete: bool


def save(
    checkpoint: Checkpoint,
    directory: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int = 5_000_000_000,
    chunk: int | None = None,
    memory: int | None = None,
    device: str | None = None,
    executor: str | None = None,
    recipe_text: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SaveReport:
    """Write `checkpoint` as an ordinary Hugging Face folder; equal inputs give equal bytes, whatever `workers`, `chunk` and `memory`.

    Time: every input byte is read as often as the expression's method needs it (once for linear), every output byte is written
    once and hashed for the record (about 0.5 s a gigabyte, beside the writing). Memory: O(chunk x inputs) in each worker, whatever the
    size of the model: below `memory` bytes of private memory over all processes, by default below a gigabyte for methods that need no
    whole matrices, and for those below (inputs + 3) times the largest matrix if that is more. `progress(done, total)` gets bytes.

    `device`: "cuda", "cuda:0,cuda:1", ... merges there, in chunks of 16 Mi elements, one worker for each device; results equal the
    processor's within one rounding. `executor`: "ray" or "ray://HOST:PORT" spreads tasks over a Ray cluster on a shared disk.

    The recipe in the folder (unless `recipe_text` is given) refers to local models by paths that are relative to the folder;
    absolute paths and hub ids stay as they are.

    A killed save continues when it is called again with the same inputs; a finished one is recognised and left alone.
    Raises UserError for an existing other folder, for one that is, holds or lies in an input's folder, or for missing permission,
    RunError for a full disk, MergeError for what the merge finds in the weights; none of these leaves anything behind.
    WorkerDiedError leaves what was finished to the next call.
    """
    directory = Path(directory)
    plan = plan_output(checkpoint, shard_bytes=shard_bytes)
    check_apart(directory, [(source.describe()["model"], place) for source in checkpoint.sources() for place in source.places])
    references = _references_from(checkpoint, directory)
    recipe = recipe_text if recipe_text is not None else yaml_text(renamed(checkpoint.describe(), references))
    key = hashlib.sha256(f"{ENGINE_VERSION}\n{plan.digest}\n{checkpoint.stamp}\n{recipe}".encode()).hexdigest()
    if _is_complete(directory, key, plan):
        return SaveReport(directory, len(plan.home), plan.tensor_bytes, len(plan.shards), 0, True)
    execution = execution_of(checkpoint, plan, workers=workers, chunk=chunk, memory=memory, device=device, executor=executor)
    made = _made_files(checkpoint, plan, recipe, references)
    with staged(directory, key=key, overwrite=overwrite) as folder:
        resumed, digests = _write_shards(execution.filling(checkpoint, plan, folder), execution, progress)
        made[RECORD_FILE] = record(checkpoint, made[RECIPE_FILE], digests)
        _write_side_files(checkpoint.files, made, folder)
        _remember_complete(directory, folder, key)
    remember_identity(SafetensorsCheckpoint(directory), digests)
    return SaveReport(directory, len(plan.home), plan.tensor_bytes, len(plan.shards), resumed, False)


def _references_from(checkpoint: Checkpoint, directory: Path) -> dict[str, str]:
    """How a file in `directory` refers to the local models that the checkpoint calls by relative paths."""
    found: dict[str, set[str]] = {}
    for source in checkpoint.sources():
        if source.places:
            reference = str(source.describe()["model"])
            found.setdefault(reference, set()).add(reference_from(reference, source.places, directory))
    # One name for two models can only be made in Python, and no text could tell them apart.
    return {reference: seen.pop() for reference, seen in found.items() if len(seen) == 1 and seen != {reference}}


def renamed(description: Any, references: Mapping[str, str]) -> Any:
    """A checkpoint's description with its models called by other references."""
    if isinstance(description, list):
        return [renamed(value, references) for value in description]
    if not isinstance(description, dict):
        return description
    return {
        key: references.get(value, value) if key in REFERENCE_KEYS and isinstance(value, str) else renamed(value, references)
        for key, value in description.items()
    }


def _write_shards(filling: Filling, execution: Execution, progress: Callable[[int, int], None] | None) -> tuple[int, dict[str, str]]:
    """Fill the preallocated shards; return the bytes that an earlier process had already written, and every tensor's SHA-256."""
    checkpoint, plan, folder = filling.checkpoint, filling.plan, filling.folder
    journal = Journal(folder / JOURNAL, plan.digest)
    afresh = not (journal.done or journal.digests) or not all(_is_there(folder, shard) for shard in plan.shards)
    if afresh:
        _clear(folder)
    _check_space(folder, plan)
    if afresh:
        _lay_out(folder, plan)
        journal.start()
    waiting = [task for task in plan.tasks if task.number not in journal.done]
    resumed = plan.tensor_bytes - sum(task.bytes for task in waiting)
    written = resumed
    digests = {name: value for name, value in journal.digests.items() if name in plan.home}
    hashing = Hashing(checkpoint, plan, waiting, digests)
    if progress:
        progress(written, plan.tensor_bytes)
    if waiting:
        execution.prepare(checkpoint, sorted({name for task in waiting for name, _, _ in task.spans}))
    with Flusher([folder / shard.file for shard in plan.shards], journal) as flusher:

        def on_done(task: Task | Digest, result: dict[str, str]) -> Sequence[Digest]:
            nonlocal written
            digests.update(result)
            if isinstance(task, Digest):
                flusher.add(Entry(None, 0, result))
                return ()
            written += task.bytes
            flusher.add(Entry(task.number, task.bytes, result))
            if progress:
                progress(written, plan.tensor_bytes)
            return hashing.after(task)

        execution.run(filling, [*hashing.ready(), *waiting], on_done)
    return resumed, digests


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

    The config keeps its order and what nobody knows in it.
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
    for file in sorted(made, key=lambda file: file == INDEX):  # the index last: its name means that all else is there
        (folder / file).write_bytes(made[file])


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
