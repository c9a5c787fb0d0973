"""Two searches at once over one store of scores: each finds what it finds alone, and nothing that was committed is scored again."""

from __future__ import annotations

import multiprocessing
import warnings
from pathlib import Path

import pytest

from modelglue.studies import run_search
from tests.checkpoint.killing import forked
from tests.small_zoo import write_yaml
from tests.studies.conftest import journal_of, search_file, stored
from tests.studies.scoring_log import noted, scored_again


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
    assert scored_again(log) == 0
    assert len({line.split(" ", 2)[2] for line in log.read_text().splitlines() if line.startswith("done")}) == len(stored(store))
