"""Documents of tasks from files on this machine, in the formats in which data sets are published: JSON lines, JSON, Parquet, text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.errors import UserError

Document = Mapping[str, Any]

#: in this order; the last is how the hub names the parts of a split
_FORMS = ("", ".jsonl", ".json", ".parquet", "-*-of-*.parquet")


def find_data(name: str, folders: Sequence[Path]) -> list[Path]:
    """The files of `name` ("arc_challenge/test": test.jsonl, test.json, test.parquet or test-00000-of-00001.parquet there), [] if none.

    Looked for in the folders, in order; an absolute name is itself.
    """
    for folder in folders:
        for form in _FORMS:
            place = folder / f"{name}{form}"
            found = sorted(place.parent.glob(place.name)) if "*" in form else [place]
            if files := [path for path in found if path.is_file()]:
                return files
    return []


def missing_data(name: str, folders: Sequence[Path]) -> str:
    """What was looked for, and where."""
    return f"{name}(.jsonl, .json or .parquet) is not in {' or '.join(str(folder) for folder in folders) or 'any folder that is named'}"


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """All documents of some files, in order. UserError naming file and line for what is none."""
    found: list[Document] = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                found += _parquet(path)
            elif path.suffix == ".json":
                found += _whole(path, json.loads(path.read_text(encoding="utf-8")))
            else:
                found += _lines(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Restore the file.") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error.msg}). Restore the file.") from error
    return found


def _lines(path: Path) -> Sequence[Document]:
    found: list[Document] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: is not valid JSON ({error.msg}); allowed is one JSON object per line.") from error
            if not isinstance(value, dict):
                raise UserError(f"{path}:{number}: is {str(value)[:40]!r}; allowed is one JSON object per line.")
            found.append(value)
    return found


def _whole(path: Path, value: Any) -> Sequence[Document]:
    rows = value.get("data", value.get("rows")) if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: allowed is a list of JSON objects (or an object with that list under 'data').")
    return rows


def _parquet(path: Path) -> Sequence[Document]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f'{path}: reading Parquet needs the extra "eval": pip install "modelglue[eval]" ({error}).') from error
    try:
        rows: list[Document] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: is no Parquet file that can be read ({str(error).splitlines()[0]}). Restore the file.") from error
    return rows
