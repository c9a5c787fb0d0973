"""Estimates from few items as the fitness of a search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelglue.errors import UserError
from modelglue.recipe import Candidate
from modelglue.search import Facts, SearchSettings, SyntheticEvaluator, run_study
from modelglue.search.estimators import Estimator
from modelglue.search.item_response import ItemParameters
from modelglue.search.merge3 import ItemResponseFitness
from tests.search.doubles import Counting

PROBLEM = SyntheticEvaluator(3, 2, 150, seed=4)


def parameters(evaluator: SyntheticEvaluator = PROBLEM) -> dict[str, ItemParameters]:
    """The problem's own item parameters, in the order in which the evaluator visits items."""
    found = {}
    for task in evaluator.tasks:
        a, b = evaluator._parameters[task]
        order = evaluator._order(task)
        found[task] = ItemParameters(a[order][:, None], (a * b)[order][:, None])
    return found


def settings(**fitness: Any) -> SearchSettings:
    return SearchSettings(
        members=tuple(PROBLEM.members), searcher={"name": "evolution", "population": 7, "generations": 5},  # type: ignore[arg-type]
        fitness={"kind": "item_response", **fitness},  # type: ignore[arg-type]
    )  # fmt: skip


def test_members_are_scored_on_everything_and_candidates_on_the_extract_alone() -> None:
    evaluator = Counting(PROBLEM)
    report = run_study(settings(items=20), evaluator, None, facts=Facts(items=parameters()))
    first, rest = evaluator.asked[:3], evaluator.asked[3:]
    assert [key for key, _ in first] == [Candidate.single(alias).key for alias in PROBLEM.members]
    assert all(plan.items is None for _, plan in first)
    assert len({tuple(map(tuple, (plan.items or {}).values())) for _, plan in rest}) == 1, "the same items for every candidate"
    assert [len(ids) for ids in (rest[0][1].items or {}).values()] == [20, 20]
    assert report.spent["items"] == 3 * 300 + 40 * report.counts["candidates"] - 3 * 40
    assert report.counts["candidates"] == 3 + len({key for key, _ in rest})


def test_estimates_are_nearer_to_the_truth_than_means() -> None:
    errors = {}
    for mode in ("mean", "gmpirt"):
        report = run_study(settings(items=20, mode=mode), PROBLEM, None, facts=Facts(items=parameters()))
        gaps = [abs(one.value - PROBLEM.truth(one.proposal.candidate)) for one in report.outcomes if one.proposal.candidate]
        errors[mode] = float(np.mean(gaps))
    assert errors["gmpirt"] < 0.75 * errors["mean"]


def test_answers_of_many_models_stand_in_for_published_parameters() -> None:
    """Forty merges that somebody scored on everything; the estimate needs no more."""
    generator = np.random.default_rng(0)
    rows: dict[str, list[list[float]]] = {task: [] for task in PROBLEM.tasks}
    for _ in range(40):
        weights = generator.dirichlet([0.5] * 3)
        scores = PROBLEM.evaluate(Candidate.linear(dict(zip(PROBLEM.members, map(float, weights), strict=True))))
        for task in PROBLEM.tasks:
            rows[task].append([scores.items[task][item] for item in PROBLEM.items(task)])
    fitness = ItemResponseFitness(PROBLEM.members, size=20, responses=rows)
    assert fitness.mode == "gmpirt"
    endpoints = [PROBLEM.evaluate(candidate) for candidate in fitness.endpoints()]
    fitness.prepare(PROBLEM, endpoints)
    (part,) = fitness.parts(PROBLEM)
    gaps = {"estimate": 0.0, "mean": 0.0}
    for seed in range(30):
        weights = np.random.default_rng(seed + 100).dirichlet([1.0] * 3)
        candidate = Candidate.linear(dict(zip(PROBLEM.members, map(float, weights), strict=True)))
        from modelglue.recipe import Plan

        seen = PROBLEM.evaluate(candidate, Plan(dict(part)))
        truth = PROBLEM.truth(candidate)
        gaps["estimate"] += abs(float(np.mean(list(fitness.tasks(seen).values()))) - truth)
        gaps["mean"] += abs(seen.mean - truth)
    assert gaps["estimate"] < gaps["mean"]


def test_without_parameters_the_mean_stands_for_the_rest() -> None:
    evaluator = Counting(PROBLEM)
    report = run_study(settings(items=30), evaluator, None)
    assert report.spent["items"] == 60 * report.counts["candidates"]
    outcome = report.outcomes[0]
    assert outcome.value == pytest.approx(outcome.scores.mean)


def test_anchors_carry_the_weight_of_their_clusters() -> None:
    report = run_study(settings(items=15, extract="anchors", mode="weighted"), PROBLEM, None, facts=Facts(items=parameters()))
    outcome = report.outcomes[0]
    assert 0 <= outcome.value <= 1
    assert outcome.value != pytest.approx(outcome.scores.mean, abs=1e-9)


@pytest.mark.parametrize(
    ("fitness", "facts", "message"),
    [
        ({"mode": "gmpirt"}, Facts(), "the estimate gmpirt needs item parameters, or the answers of 30 models"),
        ({"extract": "anchors"}, Facts(), "anchors are chosen by item parameters"),
        ({}, Facts(items={"t0": parameters()["t0"]}), "task 't1': has no item parameters"),
        ({}, Facts(items=parameters(SyntheticEvaluator(3, 2, 10))), "task 't0': 10 item parameters for 150 items"),
    ],
)
def test_what_is_missing_is_said(fitness: dict[str, Any], facts: Facts, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_study(settings(**fitness), PROBLEM, None, facts=facts)


def test_gpirt_trusts_the_prediction_by_its_errors_for_models_that_are_known() -> None:
    """c = b^2 / (v + b^2) with the errors b and variances v of the members; a share that is said counts as said."""
    known = parameters()
    fitness = ItemResponseFitness(PROBLEM.members, size=20, mode="gpirt", parameters=known)
    endpoints = [PROBLEM.evaluate(candidate) for candidate in fitness.endpoints()]
    assert len(endpoints) == 3
    fitness.prepare(PROBLEM, endpoints)
    fitness.parts(PROBLEM)
    for task in PROBLEM.tasks:
        found = fitness._estimators[task]
        rows = [np.array([one.items[task][item] for item in PROBLEM.items(task)]) for one in endpoints]
        classic = Estimator(found.extract, "pirt", known[task])
        b = float(np.mean([abs(classic(y[found.extract.positions]) - y.mean()) for y in rows]))
        v = float(np.mean([y.var() for y in rows])) / (4 * 20)
        assert found.share == pytest.approx(b**2 / (v + b**2))
        assert 0 < found.share < 1
    said = ItemResponseFitness(PROBLEM.members, size=20, mode="gpirt", parameters=known, share=0.25)
    said.prepare(PROBLEM, endpoints)
    said.parts(PROBLEM)
    assert {estimator.share for estimator in said._estimators.values()} == {0.25}
