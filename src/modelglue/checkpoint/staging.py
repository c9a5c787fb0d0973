"""A final name means complete: everything is built in a temporary sibling and renamed once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelglue.errors import RunError, UserError

LOCK = ".lock"


@contextmanager
def staged(directory: Path, *, key: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield the temporary sibling in which `directory` is built; on success it is flushed and renamed.

    The sibling is named by `key` (hex), so a process that was killed finds its half-done work again; it is locked by one
    writer. A ModelGlueError or an OSError removes it; Ctrl-C and SIGKILL leave it for the next run. With `overwrite` the old
    folder is exchanged for the new one in one step where the system can, so that neither is ever missing.
    """
    directory = directory.absolute()
    if directory.exists() and not overwrite:
        raise UserError(f"{directory}: exists already. Choose another path, or pass --overwrite to replace it.")
    sibling = directory.parent / f".{directory.name}.{key[:16]}.partial"
    try:
        sibling.mkdir(parents=True, exist_ok=True)
        lock = (sibling / LOCK).open("w")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}). Choose a folder you may write to.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{directory}: another process is writing it. Wait for it, or choose another path.") from error
        try:
            yield sibling
            (sibling / LOCK).unlink()
            _flush_tree(sibling)
            _move(sibling, directory)
            _flush(directory.parent)
        except (Exception, SystemExit) as error:
            shutil.rmtree(sibling, ignore_errors=True)
            if isinstance(error, OSError):
                raise io_error(directory, error) from error
            raise


def io_error(path: Path, error: OSError) -> Exception:
    """An operating system's error in our words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(f"{path}: the disk is full ({error.strerror}). Free some space and run it again; nothing was left behind.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
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
