"""Two searches at once over one store of scores: each finds what it finds alone, and nothing that was committed is scored again."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from modelglue.evaluation import ScoreStore
from modelglue.evaluation.items import Mark
from modelglue.evaluation.scoring import Asked
from modelglue.studies import run_search
from tests.checkpoint.killing import forked
from tests.small_zoo import write_yaml
from tests.studies.conftest import journal_of, search_file, stored


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


@forked
def test_two_searches_share_a_store(home: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is the search that was run alone, the other has half of its candidates."""
    other = write_yaml(home / "other.yaml", search_file(searcher={"name": "random", "trials": 6}))
    expected = run_search(other, tmp_path / "other-alone").folder
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    store, log = tmp_path / "shared.sqlite", tmp_path / "log"

    def search(file: Path, folder: Path, workers: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            noted(patch, log)
            gate.wait()
            run_search(file, folder, store=store, workers=workers)

    jobs = [(home / "search.yaml", tmp_path / "a", 1), (other, tmp_path / "b", 2)]
    processes = [context.Process(target=search, args=job) for job in jobs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for folder, single in ((tmp_path / "a", alone), (tmp_path / "b", expected)):
        assert journal_of(folder) == journal_of(single)
        assert (folder / "result.json").read_text() == (single / "result.json").read_text()
    assert stored(store) == sorted({*stored(alone / "scores.sqlite"), *stored(expected / "scores.sqlite")})
    done: set[str] = set()
    known_at_look: dict[tuple[str, str], bool] = {}
    scored = again = 0
    for line in log.read_text().splitlines():
        what, process_id, score = line.split(" ", 2)
        if what == "done":
            done.add(score)
        elif what == "look":
            known_at_look[process_id, score] = score in done
        else:
            scored += 1
            again += known_at_look[process_id, score]
    assert again == 0, "what was committed is not scored again"
    assert len(done) == len(stored(store)) <= scored
