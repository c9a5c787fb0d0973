"""What of an output is on the disk already: a kill costs no more than what was not yet journaled."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from modelglue.errors import WorkerDiedError

#: bytes that may be written but not yet journaled: what a kill can cost
JOURNAL_BYTES = 512_000_000


@dataclass(frozen=True)
class Entry:
    """A finished task (None: nothing was written, only hashed), its bytes, and the SHA-256 of the tensors that it completed."""

    task: int | None
    bytes: int
    digests: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """Finished tasks whose bytes are on the disk and hashes of tensors, a line of JSON each, under a first line that names the plan."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self.done: set[int] = set()
        self.digests: dict[str, str] = {}
        lines = path.read_text(encoding="ascii", errors="replace").split("\n") if path.exists() else [""]
        if lines[0] == digest:
            for line in lines[1:-1]:
                self._believe(line)
            if lines[-1]:  # torn: the next entry would be glued to it
                self._write()

    def start(self) -> None:
        self.done, self.digests = set(), {}
        self._write()

    def add(self, entries: Sequence[Entry]) -> None:
        with self._path.open("a", encoding="ascii") as stream:
            stream.write("".join(f"{json.dumps([entry.task, entry.digests])}\n" for entry in entries))
            stream.flush()
            os.fsync(stream.fileno())

    def _believe(self, line: str) -> None:
        try:
            task, digests = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            return
        if isinstance(digests, dict) and all(isinstance(value, str) and len(value) == 64 for value in digests.values()):
            if isinstance(task, int) and not isinstance(task, bool):
                self.done.add(task)
            self.digests |= digests

    def _write(self) -> None:
        lines = [json.dumps([task, {}]) for task in sorted(self.done)]
        lines += [json.dumps([None, {name: value}]) for name, value in sorted(self.digests.items())]
        self._path.write_text("\n".join([self._digest, *lines, ""]), encoding="ascii")


class Flusher:
    """Brings written bytes to the disk beside the arithmetic, and journals a task only after its bytes are there."""

    def __init__(self, paths: Sequence[Path], journal: Journal) -> None:
        self._paths = paths
        self._journal = journal
        self._waiting: list[Entry] = []
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.join()
        died = kind is not None and issubclass(kind, WorkerDiedError)
        if kind is not None and issubclass(kind, Exception) and not died:
            return  # the folder is about to be removed
        if self._waiting and (died or self._bytes >= JOURNAL_BYTES // 4) and self._error is None:
            self._flush(self._waiting)
        if self._error is not None:
            raise self._error

    def add(self, entry: Entry) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.append(entry)
        self._bytes += entry.bytes
        if self._bytes >= JOURNAL_BYTES and (self._thread is None or not self._thread.is_alive()):
            batch, self._waiting, self._bytes = self._waiting, [], 0
            self._thread = threading.Thread(target=self._flush, args=(batch,), daemon=True)
            self._thread.start()

    def _flush(self, batch: Sequence[Entry]) -> None:
        try:
            for path in self._paths:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            self._journal.add(batch)
        except OSError as error:  # raised where the merge is waiting for it
            self._error = error
