"""The JSON files of a run folder, as far as the run has come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.errors import UserError
from modelglue.zoo import Similarity

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "modelglue-run/1"
#: file -> the keys that a page is made of
_KEYS = {
    "zoo.json": ("name", "base", "models", "warnings"),
    "families.json": ("threshold", "linkage", "families", "strongest_across", "warnings"),
    "decisions.json": ("tasks", "ranking", "families", "experts", "router", "outcome"),
    "results.json": ("split", "skills", "models", "comparisons", "routing", "cost"),
}


@dataclass(frozen=True)
class RunData:
    """What a report is made of; None stands for a step that has not been finished."""

    complete: bool
    zoo: Mapping[str, Any]
    similarity: Similarity | None
    families: Mapping[str, Any] | None
    decisions: Mapping[str, Any] | None
    results: Mapping[str, Any] | None
    log: tuple[Mapping[str, Any], ...]

    @property
    def aliases(self) -> list[str]:
        """Members of the zoo in its order; the base is no member."""
        return [model["alias"] for model in self.zoo["models"]]

    @property
    def family_of(self) -> dict[str, int]:
        found = self.families["families"] if self.families else []
        return {alias: family["id"] for family in found for alias in family["members"]}


def read_run(run: Path) -> RunData:
    """Read the small files of `run`. Raises UserError for a folder that is no run, or where nothing was measured yet."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder. Give the folder that `modelglue glue` wrote.")
    marker = _json(run / "run.json")
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        found = "no run.json" if marker is None else "a run.json of another format"
        raise UserError(f"{run}: holds {found}, so it is no {FORMAT} folder. Give the folder that `modelglue glue` wrote.")
    zoo = _part(run, "zoo.json")
    if zoo is None:
        raise UserError(
            f"{run}: nothing was measured here (zoo.json is missing): the run was stopped at once, or rebuilt from a recipe. "
            "Run `modelglue glue` with a glue file, or report on the run that the recipe comes from."
        )
    matrix = run / "similarity.safetensors"
    return RunData(
        complete=bool(marker.get("complete")),
        zoo=zoo,
        similarity=Similarity.load(matrix) if matrix.is_file() else None,
        families=_part(run, "families.json"),
        decisions=_part(run, "decisions.json"),
        results=_part(run, "results.json"),
        log=_log(run / "log.jsonl"),
    )


def _part(run: Path, name: str) -> Mapping[str, Any] | None:
    """One step's file; None when the step has not been finished."""
    value = _json(run / name)
    missing = _KEYS[name] if not isinstance(value, dict) else [key for key in _KEYS[name] if key not in value]
    if value is not None and missing:
        raise UserError(
            f"{run / name}: holds no {', '.join(missing)}, so this version of modelglue did not write it. "
            "Remove the file and continue the run; it writes it again."
        )
    return value


def _json(path: Path) -> Any | None:
    if not path.is_file():
        return None
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}). Remove the file and continue the run; it writes it again.") from error


def _log(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Lines that are whole; the last one of a killed run may be torn."""
    if not path.is_file():
        return ()
    found = []
    for line in _text(path, errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("event"), str):
            found.append(value)
    return tuple(found)


def _text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Make it readable, then report again.") from error
