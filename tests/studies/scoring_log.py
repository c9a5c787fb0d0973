"""A log of what is looked up, scored and committed, by as many processes as like."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from modelglue.evaluation import ScoreStore
from modelglue.evaluation.items import Mark
from modelglue.evaluation.scoring import Asked


def noted(patch: pytest.MonkeyPatch, log: Path) -> None:
    """Lines of (what, model, item): `look` before the store is asked, `score` for what it lacked, `done` after it was committed.

    Lines are appended whole, so where `done` stands before `look`, the score was there to be found.
    """
    unscored, add = Asked.unscored, ScoreStore.add

    def note(what: str, model: str, items: Sequence[str]) -> None:
        with log.open("ab", buffering=0) as file:
            file.write("".join(f"{what} {os.getpid()} {model} {item}\n" for item in items).encode())

    def looking(self: Asked, batch: Sequence[object]) -> list[object]:
        note("look", self._identity, [item.key for item in batch])  # type: ignore[attr-defined]
        found = unscored(self, batch)  # type: ignore[arg-type]
        note("score", self._identity, [item.key for item in found])
        return found  # type: ignore[return-value]

    def adding(self: ScoreStore, model: str, description: str, marks: Mapping[str, Mark]) -> None:
        add(self, model, description, marks)
        note("done", model, list(marks))

    patch.setattr(Asked, "unscored", looking)
    patch.setattr(ScoreStore, "add", adding)


def scored_again(log: Path) -> int:
    """How many item scores were computed that had been committed before the store was asked for them."""
    done: set[str] = set()
    was_there: dict[tuple[str, str], bool] = {}
    again = 0
    for line in log.read_text().splitlines():
        what, process, score = line.split(" ", 2)
        if what == "done":
            done.add(score)
        elif what == "look":
            was_there[process, score] = score in done
        else:
            again += was_there[process, score]
    return again
