"""Tasks that are defined here and not by the harness: YAML files with a `kind`, in the user's folder or shipped beside this file.

Keys of every kind: `task` (its name), `task_alias` (its skill; default: the name), `kind`, and where its documents are: `data`, names of
files without suffix, taken from the YAML file's folder and then from the folder in MODELGLUE_DATA. `source` says where they can be had.
A file with `group` and a list under `task` stands for several skills.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from modelglue.errors import UserError, did_you_mean
from modelglue.evaluation.documents import Document, find_data, missing_data, read_documents

SHIPPED = Path(__file__).parent / "configs"
_KINDS = ("harness", "program", "bits_per_byte")


@dataclass(frozen=True)
class Definition:
    """One YAML file."""

    path: Path
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.values["task"])

    @property
    def alias(self) -> str:
        return str(self.values.get("task_alias", self.name))

    @property
    def place(self) -> str:
        """How messages begin."""
        return f"task '{self.name}' ({self.path})"

    @property
    def folders(self) -> list[Path]:
        """Where data is looked for."""
        given = os.environ.get("MODELGLUE_DATA")
        shipped = self.path.parent == SHIPPED
        return [*([] if shipped else [self.path.parent]), *([Path(given)] if given else [])]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A setting. UserError if it is not of its kind, or missing without a default."""
        value = self.values.get(key, default)
        if value is None or not isinstance(value, kind):
            said = "is missing" if key not in self.values else f"is {value!r}"
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{self.place}: {key} {said}; allowed is a {names}.")
        return value

    def only(self, *allowed: str) -> None:
        """UserError for a key that is none of these nor of every kind's."""
        known = ("task", "task_alias", "kind", "source", *allowed)
        for key in self.values:
            if key not in known:
                raise UserError(f"{self.place}: unknown key '{key}'.{did_you_mean(str(key), known)}")

    def documents(self) -> dict[str, list[Document]]:
        """Documents of every split under `data`. UserError that names what is missing, where it was looked for, and where it can be had."""
        data = self.get("data", dict)
        files = {split: find_data(str(name), self.folders) for split, name in data.items()}
        absent = [str(data[split]) for split, found in files.items() if not found]
        if absent:
            source = self.values.get("source")
            remedy = "Put it there" if self.folders else "Name the folder that has it in the environment variable MODELGLUE_DATA"
            looked = "; ".join(missing_data(name, self.folders) for name in absent)
            more = f" It is published as {source}." if source else ""
            raise UserError(f"{self.place}: its data is not there: {looked}.{more} {remedy}.")
        return {str(split): read_documents(found) for split, found in files.items()}


def find_definitions(names: Sequence[str], include: Path | None) -> dict[str, list[Definition]]:
    """Of the names in a task list those that are defined here: name -> its definition, or those of its group."""
    own = {**_in_folder(SHIPPED), **(_in_folder(include.resolve()) if include is not None else {})}
    found: dict[str, list[Definition]] = {}
    for name in names:
        if name in own:
            values = own[name].values
            members = [str(member) for member in values["task"]] if "group" in values else [name]
            unknown = [member for member in members if member not in own]
            if unknown:
                raise UserError(f"group '{name}' ({own[name].path}): there is no task '{unknown[0]}'.{did_you_mean(unknown[0], own)}")
            found[name] = [own[member] for member in members]
    return found


def shipped_names() -> list[str]:
    """Tasks and groups that come with the package."""
    return sorted(_in_folder(SHIPPED))


def _in_folder(folder: Path) -> dict[str, Definition]:
    return {name: Definition(path, values) for path in _files(folder) for name, values in _read(path, path.stat().st_mtime_ns)}


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.yaml")):
        if path.is_file():
            yield path


@cache
def _read(path: Path, changed: int) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, values) of a file, if it is one of ours; what is wrong with other files is for others to say."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if "kind:" not in text:
        return []
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if "!function" in text:
            return []
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: is not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict) or "kind" not in values or "task" not in values:
        return []
    if values["kind"] == "group" and isinstance(values["task"], list) and "group" in values:
        return [(str(values["group"]), values)]
    if values["kind"] not in _KINDS:
        raise UserError(
            f"{path}: kind is {values['kind']!r}; allowed are {', '.join(_KINDS)} and group.{did_you_mean(str(values['kind']), _KINDS)}"
        )
    return [(str(values["task"]), values)]
