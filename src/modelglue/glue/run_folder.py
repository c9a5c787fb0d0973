"""The run folder: every arrow of the recipe leaves a file here, and a killed run continues from them.

All files but `log.jsonl` are functions of inputs and seeds, so two runs of one glue file end with equal bytes. Times are
kept in the log alone.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import write_json_atomic
from modelglue.errors import UserError

MARKER = "run.json"
LOCK = ".lock"
SCORES = "scores.sqlite"


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run; `key` names inputs and settings."""

    root: Path
    key: str

    def path(self, name: str) -> Path:
        return self.root / name

    def read_json(self, name: str) -> Any | None:
        """The parsed file, or None when this step has not been finished yet."""
        path = self.root / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:  # ours are written whole: somebody else was here
            raise UserError(f"{path}: is not JSON any more ({error}). Remove it, and the run makes it again.") from error

    def write_json(self, name: str, value: Any) -> None:
        write_json_atomic(self.root / name, value)

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """The content of `name`, computed and written (atomically) only when it is not there yet."""
        found = self.read_json(name)
        if found is None:
            with self.timed(name):
                self.write_json(name, compute())
            found = self.read_json(name)
        return found

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl; a torn last line of a killed run does no harm."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, sort_keys=True)
        with (self.root / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    @property
    def complete(self) -> bool:
        """Whether an earlier call finished this very run."""
        marker = self.read_json(MARKER)
        return bool(marker and marker.get("complete"))

    def finish(self) -> None:
        """Written last: from now on the run is only read."""
        self.write_json(MARKER, {"format": "modelglue-run/1", "key": self.key, "complete": True})

    @contextmanager
    def timed(self, event: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.log(event, seconds=round(time.monotonic() - start, 3))


@contextmanager
def open_run(root: Path, key: str, *, overwrite: bool) -> Iterator[RunFolder]:
    """Create or continue the run folder `root`, held by one writer.

    A folder of another run (other inputs or settings) is an error unless `overwrite`, which keeps nothing but the scores: their keys are
    contents, so what still fits is not scored again. A folder that is no run folder is never touched. What a killed process was about to
    write is removed.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file; a run needs a folder. Choose another path.")
    marker = root / MARKER
    if root.is_dir() and not marker.is_file() and not all(entry.name == LOCK or _is_torn(entry) for entry in root.iterdir()):
        raise UserError(
            f"{root}: the folder exists and holds no modelglue run ({MARKER} is missing). Choose a new path; it will not be overwritten."
        )
    with _locked(root):
        for entry in [entry for entry in root.iterdir() if _is_torn(entry)]:
            entry.unlink()
        if marker.is_file() and (found := _key_of(marker)) != key:
            if not overwrite:
                raise UserError(
                    f"{root}: holds a run of other inputs or settings (key {found[:12]}, this run has {key[:12]}). "
                    "Choose another folder, or pass --overwrite to start afresh in this one; scores that still fit are kept."
                )
            _empty(root)
        run = RunFolder(root, key)
        if not marker.is_file():
            run.write_json(MARKER, {"format": "modelglue-run/1", "key": key, "complete": False})
        yield run


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("a")
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}). Choose a folder you may write to.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{root}: another process is running here. Wait for it, or choose another folder.") from error
        yield


def _empty(root: Path) -> None:
    """Remove an earlier run but its scores; its marker goes last, so that a kill in between leaves a run folder and nothing strange."""
    for entry in sorted(root.iterdir()):
        if entry.name in (LOCK, MARKER) or entry.name.startswith(SCORES):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (root / MARKER).unlink()


def _is_torn(entry: Path) -> bool:
    """A file that was being written, under its temporary name, when its process was killed."""
    return entry.name.startswith(".") and entry.name.endswith(".partial") and entry.is_file()


def _key_of(marker: Path) -> str:
    try:
        return str(json.loads(marker.read_text())["key"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"
