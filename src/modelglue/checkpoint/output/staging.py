"""A final name means complete: everything is built in a temporary sibling and renamed once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from modelglue.errors import MENDABLE, RunError, UserError, WorkerDiedError

LOCK = ".lock"
#: what a half-done folder holds to be continued; gone when it gets its final name
JOURNAL = ".journal"
#: a folder with one of these is an output that may be replaced; any other may be somebody's work
_OUTPUTS = (
    "config.json", "modelglue_recipe.yaml", "mixture.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json",
)  # fmt: skip
#: seconds to wait for a lock: the workers of a process that was just killed hold it until they are dead too
_PATIENCE = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(directory: Path, *, key: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield the temporary sibling in which `directory` is built; on success it is flushed and renamed.

    The sibling is named by `key` (hex), so a process that was killed finds its half-done work again; it is locked by one
    writer. A ModelGlueError or an OSError removes it; Ctrl-C, SIGKILL and a worker that died leave it for the next run. With
    `overwrite` the old folder is exchanged for the new one in one step where the system can, so that neither is ever missing;
    where `directory` is a link, the folder that it points to is. What earlier writers with other keys left half done is removed
    when the folder appears.

    UserError, before anything is written, for what must not be replaced: without `overwrite` whatever exists, with it a file, a
    link to nothing, and a folder with files that is no model and no mixture.
    """
    directory = _followed(directory)
    _check_free(directory, overwrite)
    sibling = directory.parent / f".{directory.name}.{key[:16]}.partial"
    with _locked(sibling, directory, _PATIENCE):
        try:
            yield sibling
            _flush_tree(sibling)
            _check_free(directory, overwrite)
            for name in (JOURNAL, LOCK):
                (sibling / name).unlink(missing_ok=True)
            _move(sibling, directory)
            _flush(directory.parent)
        except WorkerDiedError:
            raise
        except (Exception, SystemExit) as error:
            shutil.rmtree(sibling, ignore_errors=True)
            if isinstance(error, OSError):
                raise io_error(directory, error) from error
            raise
    _sweep(directory)


def check_apart(directory: Path, places: Iterable[tuple[str, Path]]) -> None:
    """UserError if writing `directory` would touch one of the `places`, (what it is called, where it is on disk), that are read for it."""
    target = Path(os.path.realpath(directory))
    for name, place in places:
        path = Path(os.path.realpath(place))
        if target == path:
            relation = "is"
        elif target in path.parents:
            relation = "holds"
        elif path in target.parents:
            relation = "lies in"
        else:
            continue
        raise UserError(f"{directory}: {relation} the model '{name}' ({place}), which is read here. Choose another path.")


def _followed(directory: Path) -> Path:
    """The folder itself where `directory` is a link to it: the link stays, and the half-done sibling is on the folder's disk."""
    if not directory.is_symlink():
        return directory.absolute()
    target = Path(os.path.realpath(directory))
    if not target.exists():
        raise UserError(f"{directory}: is a link to {target}, which does not exist. Make that folder, or remove the link.")
    return target


def check_free(directory: Path, overwrite: bool) -> None:
    """Raise the UserError that `staged` would raise for what must not be replaced: for callers with much to do before they write."""
    _check_free(_followed(directory), overwrite)


def _check_free(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: exists already and is a file, not a folder. Choose another path, or remove it.")
    if not overwrite:
        raise UserError(f"{directory}: exists already. Choose another path, or pass --overwrite to replace it.")
    try:
        found = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise io_error(directory, error) from error
    if found and not set(found) & set(_OUTPUTS):
        raise UserError(
            f"{directory}: holds '{found[0]}' and is neither a model nor a mixture nor an adapter, so it is not replaced. "
            "Choose another path, or remove the folder by hand."
        )


@contextmanager
def _locked(sibling: Path, directory: Path, patience: float) -> Iterator[None]:
    """Make `sibling` and hold its lock; UserError if another process still does after `patience` seconds."""
    made = False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            sibling.mkdir()
            made = True
        lock = (sibling / LOCK).open("w")
    except OSError as error:
        if made:
            sibling.rmdir()
        raise io_error(directory, error) from error
    with lock:
        deadline = time.monotonic() + patience
        while not _take(lock, sibling, directory):
            if time.monotonic() >= deadline:
                raise UserError(f"{directory}: another process is writing it. Wait for it, or choose another path.")
            time.sleep(0.02)
        yield


def _take(lock: IO[str], sibling: Path, directory: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have ended in between and taken the folder away; then this lock locks nothing.
        return os.fstat(lock.fileno()).st_ino == (sibling / LOCK).stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise io_error(directory, error) from error


def _sweep(directory: Path) -> None:
    """Remove half-done siblings of other keys that nobody holds: once `directory` is there, no run will continue them."""
    for sibling in directory.parent.glob(f".{glob.escape(directory.name)}.{'[0-9a-f]' * 16}.partial"):
        with contextlib.suppress(OSError, UserError), _locked(sibling, directory, 0):
            shutil.rmtree(sibling)


def io_error(path: Path, error: OSError) -> Exception:
    """An operating system's error in our words."""
    if error.errno in _FULL:
        return RunError(f"{path}: the disk is full ({error.strerror}). Free some space and run it again; nothing was left behind.")
    if error.errno in MENDABLE:
        return UserError(f"{path}: cannot be written ({error.strerror}). Choose a folder you may write to.")
    return RunError(f"{path}: {error}. Nothing was left behind.")


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write one file so that its name never shows anything but the whole content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise io_error(path, error) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """The same for JSON: keys sorted, two blanks of indent, so that equal values give equal bytes."""
    write_bytes_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            _flush(path)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _flush(path)
    _flush(folder)


def _move(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    if not _exchange(source, target):
        retired = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(retired)
        source.rename(target)
        source = retired
    shutil.rmtree(source)


def _exchange(source: Path, target: Path) -> bool:
    """Swap two names in one step (renameat2 on Linux); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return function is not None and function(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), exchange) == 0
