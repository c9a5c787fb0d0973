"""Is an output still what was written? Its record says what every tensor was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint.engine.workers import run_tasks
from modelglue.checkpoint.identity import tensor_digest
from modelglue.checkpoint.output.record import RECORD_FILE, RECORD_FORMAT
from modelglue.checkpoint.output.writer import RECIPE_FILE
from modelglue.checkpoint.protocol import Checkpoint, TensorInfo
from modelglue.checkpoint.reference import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.settings import SMALL_OUTPUT_BYTES, default_workers

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """Contents of modelglue_record.json: SHA-256 (hex) of the recipe's bytes, and (info, SHA-256 of its bytes) of every tensor."""

    recipe: str
    tensors: Mapping[str, tuple[TensorInfo, str]]


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `faults`: (name of the tensor or file, what is wrong with it), in order; empty if all is well."""

    tensors: int
    bytes: int
    faults: tuple[tuple[str, str], ...]


def read_record(folder: Path) -> Record:
    """The record of an output folder. UserError if there is none, CheckpointError if it is not one."""
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: holds no {RECORD_FILE}, so nothing says what its tensors should be. Only what `modelglue merge` (or `save`) "
            "wrote can be verified; write it again, or compare it with its source by `modelglue diff`."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != RECORD_FORMAT:
            raise ValueError(f"format {value['format']!r}, allowed is {RECORD_FORMAT!r}")
        tensors = {
            str(name): (TensorInfo(tuple(int(size) for size in one["shape"]), str(one["dtype"])), str(one["sha256"]))
            for name, one in value["tensors"].items()
        }
        digests = [value["recipe"], *(digest for _, digest in tensors.values())]
        if not all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in digests):
            raise ValueError("a hash that is not 64 hexadecimal digits")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no record of an output ({error}). Restore the file, or write the output again.") from error
    return Record(value["recipe"], tensors)


def verify(
    folder: Path, *, quick: bool = False, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Compare an output folder with its own record: recipe, names, dtypes, shapes and, unless `quick`, the hash of every tensor.

    Time: one read of every byte, at the speed of the disk or of SHA-256 (about 1.5 GB/s and core), in `workers` processes; `quick` reads
    headers. `progress(done, total)` counts bytes. UserError if there is no record.
    """
    record = read_record(folder)
    faults = _recipe_faults(folder, record)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:  # cut off, a shard lost: the folder is damaged, however it came
        return Verification(len(record.tensors), 0, (*faults, (folder.name, str(error))))
    found = set(checkpoint.names())
    faults += [(name, "is missing") for name in sorted(set(record.tensors) - found)]
    faults += [(name, "is not in the record") for name in sorted(found - set(record.tensors))]
    sound = []
    for name in sorted(found & set(record.tensors)):
        expected, actual = record.tensors[name][0], checkpoint.info(name)
        if actual != expected:
            faults.append((name, f"is {_kind(actual)}, recorded as {_kind(expected)}"))
        else:
            sound.append(name)
    if not quick:
        digests = _digests(checkpoint, sound, workers, progress)
        faults += [(name, "holds other numbers than were written") for name in sound if digests[name] != record.tensors[name][1]]
    return Verification(len(record.tensors), sum(checkpoint.info(name).nbytes for name in sound), tuple(faults))


def _recipe_faults(folder: Path, record: Record) -> list[tuple[str, str]]:
    path = folder / RECIPE_FILE
    if not path.is_file():
        return [(RECIPE_FILE, "is missing")]
    if hashlib.sha256(path.read_bytes()).hexdigest() != record.recipe:
        return [(RECIPE_FILE, "is not the recipe that the output was made by")]
    return []


def _digests(checkpoint: Checkpoint, names: list[str], workers: int | None, progress: Callable[[int, int], None] | None) -> dict[str, str]:
    total = sum(checkpoint.info(name).nbytes for name in names)
    if workers is None:
        workers = 1 if total < SMALL_OUTPUT_BYTES else default_workers()
    found: dict[str, str] = {}
    done = 0

    def on_done(name: str, digest: str) -> None:
        nonlocal done
        found[name] = digest
        done += checkpoint.info(name).nbytes
        if progress is not None:
            progress(done, total)

    largest_first = sorted(names, key=lambda name: -checkpoint.info(name).nbytes)
    run_tasks(tensor_digest, checkpoint, largest_first, workers=workers, on_done=on_done)
    return found


def _kind(info: TensorInfo) -> str:
    return f"{info.dtype} of {' x '.join(map(str, info.shape)) or 'no dimensions'}"
