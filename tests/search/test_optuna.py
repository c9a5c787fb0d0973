"""TPE through Optuna, and the export to its storage."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelglue.errors import UserError
from modelglue.search import SearchSettings, SyntheticEvaluator, run_study
from modelglue.search.decode import MergeSpace
from modelglue.search.export import to_optuna
from modelglue.search.space import Choice, Float, Int, Simplex, Space, When
from modelglue.search.tpe import TpeSearch
from tests.search.test_searchers import by_chance, found, problem
from tests.search.test_searchers import told as outcome

optuna = pytest.importorskip("optuna")


def settings(**fields: Any) -> SearchSettings:
    return SearchSettings(members=("m0", "m1", "m2"), searcher={"name": "tpe", "trials": 30}, **fields)  # type: ignore[arg-type]


def test_beats_random_search_at_an_equal_budget() -> None:
    assert sum(found("tpe", problem(seed), 80) > by_chance(seed, 80) for seed in range(5)) >= 4


def test_the_same_seed_is_the_same_search_and_a_search_goes_on(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(3, 2, 60)
    whole = run_study(settings(batch=3), evaluator, None)
    part = run_study(settings(batch=3, budget={"candidates": 12}), evaluator, tmp_path)
    rest = run_study(settings(batch=3), evaluator, tmp_path)
    assert [one.proposal for one in part.outcomes] == [one.proposal for one in whole.outcomes][: len(part.outcomes)]
    assert [one.proposal for one in rest.outcomes] == [one.proposal for one in whole.outcomes]


class Conditional:
    """A space with every kind of parameter; what is no recipe is no candidate."""

    space = Space(
        (
            Choice("method", ("a", "b")), Float("x", 0, 1, when=When("method", ("a",))), Int("n", 1, 3), Choice("odd", ((1, 2), (3,))),
            Simplex("w", 2), Float("rate", 0.01, 1, log=True),
        )
    )  # fmt: skip

    def candidate(self, params: Any) -> None:
        return None


def test_conditional_spaces() -> None:
    start = {"method": "a", "x": 0.25, "n": 2, "odd": (3,), "w": [0.5, 0.5], "rate": 0.1}
    search = TpeSearch(Conditional(), trials=40, start=[start])
    seen = []
    while not search.done():
        batch = search.ask(2)
        seen += [proposal.params for proposal in batch]
        search.tell([outcome(proposal, float(proposal.params.get("x", 0))) for proposal in batch])
    assert seen[0] == start
    assert all(("x" in params) == (params["method"] == "a") for params in seen)
    assert {params["odd"] for params in seen} == {(1, 2), (3,)}
    assert len(seen) == 40


def test_the_dashboard_reads_what_was_exported(tmp_path: Path) -> None:
    report = run_study(settings(), SyntheticEvaluator(3, 2, 60), None)
    path = tmp_path / "optuna.db"
    assert to_optuna(report, path) == len(report.outcomes)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.load_study(study_name="modelglue", storage=storage)
    assert [trial.value for trial in study.trials] == [one.value for one in report.outcomes]
    states = {"ok": "COMPLETE", "pruned": "PRUNED"}
    assert [trial.state.name for trial in study.trials] == [states[one.status] for one in report.outcomes]
    assert study.trials[0].params["weight[0]"] == report.outcomes[0].proposal.params["weight"][0]
    assert study.trials[0].user_attrs["task t0"] == report.outcomes[0].tasks["t0"]
    storage.remove_session()
    storage.engine.dispose()
    with pytest.raises(UserError, match="has a study 'modelglue' already"):
        to_optuna(report, path)


def test_parameters_of_every_kind_are_exported_as_they_are(tmp_path: Path) -> None:
    """Also where trials have other choices, or other parameters."""
    report = run_study(settings(), SyntheticEvaluator(3, 2, 60), None)
    params: list[dict[str, Any]] = [
        {"method": "ties", "x": 0.25, "n": 3, "on": True, "mixed": "a"}, {"method": "linear", "x": -4.0, "on": False, "mixed": 0.5},
        {"method": "ties", "w": [0.1, 0.9], "none": None},
    ]  # fmt: skip
    outcomes = [replace(one, proposal=replace(one.proposal, params=found)) for one, found in zip(report.outcomes, params, strict=False)]
    to_optuna(replace(report, outcomes=outcomes), tmp_path / "o.db", "mine")
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'o.db'}")
    trials = optuna.load_study(study_name="mine", storage=storage).trials
    assert [trial.params for trial in trials] == [params[0], params[1], {"method": "ties", "w[0]": 0.1, "w[1]": 0.9}]
    assert [trial.user_attrs["id"] for trial in trials] == [one.id for one in outcomes]
    storage.remove_session()
    storage.engine.dispose()


def test_a_file_that_is_no_storage_is_left_alone(tmp_path: Path) -> None:
    report = run_study(SearchSettings(members=("m0", "m1"), searcher={"name": "average"}), SyntheticEvaluator(2, 1, 10), None)  # type: ignore[arg-type]
    (tmp_path / "o.db").write_text("these are my notes" * 100)
    for path in (tmp_path / "o.db", tmp_path / "missing" / "o.db"):
        with pytest.raises(UserError, match=r"cannot be used as a storage of Optuna .*Choose another file"):
            to_optuna(report, path)
    assert (tmp_path / "o.db").read_text() == "these are my notes" * 100


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("optuna"):
            raise ImportError("no optuna")
        return real(name, *rest)

    report = run_study(SearchSettings(members=("m0", "m1"), searcher={"name": "average"}), SyntheticEvaluator(2, 1, 10), None)  # type: ignore[arg-type]
    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: TpeSearch(MergeSpace("linear", ("a", "b"))), lambda: to_optuna(report, tmp_path / "x")):
        with pytest.raises(UserError, match=r'needs the extra "optuna": pip install "modelglue\[optuna\]"'):
            call()
