"""The search loop: nothing twice, order, budgets, racing, failures, confirmation, resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from modelglue.errors import MergeError, RunError, UserError
from modelglue.recipe import Candidate, Cost, Scores
from modelglue.search import Budget, Needs, ReplayError, SearchSettings, Study, SyntheticEvaluator, run_study, warm_start
from modelglue.search.fitness import Everything
from modelglue.search.heuristics import HeuristicSearch
from modelglue.search.journal import Journal
from modelglue.search.objective import Objective
from modelglue.search.run import JOURNAL, candidate_of, progress_of, read_settings
from modelglue.search.searcher import Outcome, Proposal, finalists
from tests.search.doubles import Counting, Plain, Scripted

A, B, C = (Candidate.single(alias) for alias in ("m0", "m1", "m2"))
AB = Candidate.linear({"m0": 1, "m1": 1})


def synthetic(**fields: Any) -> SyntheticEvaluator:
    return SyntheticEvaluator(**{"models": 3, "task_count": 2, "size": 60, **fields})


def study(searcher: Any, evaluator: Any, **fields: Any) -> Study:
    return Study(searcher, evaluator, fields.pop("journal", None) or Journal(), **fields)


def settings(name: str = "random", *, members: int = 3, **fields: Any) -> SearchSettings:
    searcher = {"name": name, **fields.pop("options", {})}
    return SearchSettings(members=tuple(f"m{n}" for n in range(members)), base="o", searcher=searcher, **fields)


# -- asking -----------------------------------------------------------------------------------------------------------------------


def test_outcomes_come_in_the_order_of_asking_whoever_answers_first() -> None:
    searcher = Scripted([[A, B, C, AB]])
    study(searcher, Counting(synthetic(), workers=3)).run()
    (told,) = searcher.told
    assert [outcome.id for outcome in told] == [0, 1, 2, 3]
    assert [outcome.proposal.candidate for outcome in told] == [A, B, C, AB]
    assert [outcome.value for outcome in told] == [synthetic().evaluate(one).mean for one in (A, B, C, AB)]


def test_nothing_is_scored_twice_and_duplicates_are_told_all_the_same() -> None:
    evaluator = Counting(synthetic())
    searcher = Scripted([[A, B, A], [B, C], [A, B]])
    run = study(searcher, evaluator)
    run.run()
    assert [key for key, _ in evaluator.asked] == [A.key, B.key, C.key]
    assert [[outcome.id for outcome in told] for told in searcher.told] == [[0, 1, 2], [3, 4], [5, 6]]
    assert searcher.told[2][0].value == searcher.told[0][0].value == searcher.told[0][2].value
    assert run.counts == {"candidates": 3, "duplicates": 4, "replayed": 0}
    assert run.spent.items == 3 * 120


def test_parameters_that_give_no_model_cost_nothing() -> None:
    searcher = Scripted([[None, A]])
    evaluator = Counting(synthetic())
    study(searcher, evaluator).run()
    assert [outcome.status for outcome in searcher.told[0]] == ["invalid", "ok"]
    assert searcher.told[0][0].value == -math.inf
    assert len(evaluator.asked) == 1


def test_a_searcher_that_asks_for_nothing_new_is_stopped() -> None:
    class Stuck(Scripted):
        def ask(self, n: int) -> Any:
            return Scripted([[A]]).ask(n)

    run = study(Stuck([]), Counting(synthetic()))
    run.run()
    assert run.stopped == "the searcher asks for nothing new"
    assert run.counts["candidates"] == 1


# -- budgets ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "scored"),
    [
        (Budget(candidates=2), 2), (Budget(items=360), 3), (Budget(items=359), 2), (Budget(items=119), 0), (Budget(tokens=1), 1),
        (Budget(seconds=1e-9), 1),
    ],
)  # fmt: skip
def test_budgets(budget: Budget, scored: int) -> None:
    searcher = Scripted([[A], [A, B], [C], [AB]])
    run = study(searcher, Counting(synthetic()), budget=budget)
    if budget.seconds:
        assert run.run() == []  # time is up before it began
        assert run.stopped == "the time is up"
        return
    run.run()
    assert run.counts["candidates"] == scored
    assert run.stopped == "the budget is spent"
    assert run.spent.items == 120 * scored


def test_a_generation_that_the_budget_cuts_short_is_scored_and_not_told() -> None:
    evaluator = Counting(synthetic())
    searcher = Scripted([[A, B], [C, AB]])
    run = study(searcher, evaluator, budget=Budget(candidates=3))
    run.run()
    assert [key for key, _ in evaluator.asked] == [A.key, B.key, C.key]
    assert len(searcher.told) == 1
    assert [outcome.id for outcome in run.outcomes] == [0, 1, 2], "it counts all the same"


def test_a_budget_must_be_a_number_above_0() -> None:
    with pytest.raises(UserError, match="budget: items is 0"):
        Budget(items=0)


def test_a_raised_budget_goes_on_where_the_search_ended(tmp_path: Path) -> None:
    evaluator = Counting(synthetic())
    run_study(settings("cma", budget={"candidates": 9}), evaluator, tmp_path)
    before = len(evaluator.asked)
    longer = run_study(settings("cma", budget={"candidates": 20}), evaluator, tmp_path)
    once = run_study(settings("cma", budget={"candidates": 20}), synthetic(), None)
    assert len(evaluator.asked) > before
    assert [outcome.value for outcome in longer.outcomes] == [outcome.value for outcome in once.outcomes]


@pytest.mark.parametrize("kind", ["racing", "halving"])
@pytest.mark.parametrize("items", [130, 700, 1100])
def test_a_budget_that_cuts_a_batch_into_pieces_may_be_raised_too(tmp_path: Path, kind: str, items: int) -> None:
    """Who raced against whom is not decided anew: what was told stays true."""

    def with_budget(count: int) -> SearchSettings:
        return settings(fitness={"kind": kind, "chunk": 20}, batch=6, budget={"items": count}, options={"trials": 30})

    first = run_study(with_budget(items), synthetic(), tmp_path)
    longer = run_study(with_budget(4000), synthetic(), tmp_path)
    again = run_study(with_budget(5000), synthetic(), tmp_path)
    told = len(progress_of(tmp_path)) * 6
    kept = len(first.outcomes) // 6 * 6  # what stands in whole batches
    before, after = ([(one.id, one.value, one.status) for one in report.outcomes[:kept]] for report in (first, longer))
    assert before == after
    assert len(again.outcomes) == told > len(first.outcomes)
    assert first.spent["items"] <= items


# -- racing -----------------------------------------------------------------------------------------------------------------------


def test_who_is_surely_behind_is_given_up_with_an_estimate_and_a_bound() -> None:
    """m0 answers everything, m1 a fifth of what m0 does: after 25 items m1 is out, and told as so much worse."""
    right = Counting(synthetic(size=100, task_count=1))
    right.before = lambda one, number: _flat(right, number, 1.0) if one == A else _fifth(right, number)
    searcher = Scripted([[A], [B], [AB, C]], racing="incumbent")
    run = study(searcher, right)
    run.run()
    outcome = searcher.told[1][0]
    assert outcome.status == "pruned"
    assert outcome.value == pytest.approx(0.2)
    assert outcome.bound == pytest.approx(0.2 + 1.6448536 * math.sqrt(25 / 24 * 0.2 * 0.8 / 25 * (1 - 25 / 100)))  # 75 are left
    assert len(outcome.scores.items["t0"]) == 25
    assert run.spent.items == 100 + 3 * 25


def _fifth(counting: Counting, number: int) -> Scores:
    """Every fifth item right."""
    ids = (counting.asked[number][1].items or {})["t0"]
    return Scores({"t0": {item: float(place % 5 == 0) for place, item in enumerate(ids)}}, cost=Cost(items=len(ids)))


def _flat(counting: Counting, number: int, value: float) -> Scores:
    """The value on every item of the request that is being answered."""
    _, plan = counting.asked[number]
    items = plan.items or {"t0": tuple(counting.items("t0"))}
    return Scores({task: dict.fromkeys(ids, value) for task, ids in items.items()}, cost=Cost(items=sum(map(len, items.values()))))


def test_among_a_batch_only_the_best_must_be_known() -> None:
    values = {A.key: 0.2, B.key: 1.0, C.key: 0.6}
    evaluator = Counting(synthetic(size=100, task_count=1))
    evaluator.before = lambda one, number: _flat(evaluator, number, values[one.key])
    searcher = Scripted([[A, B, C]], racing="batch")
    study(searcher, evaluator).run()
    told = searcher.told[0]
    assert [outcome.status for outcome in told] == ["pruned", "ok", "pruned"]
    assert told[0].value < told[2].value < told[1].value


def test_who_lost_to_a_candidate_that_failed_later_keeps_its_own_score() -> None:
    """B is given up for A, and A fails on its last items: that says nothing of B, which may be asked for again."""
    evaluator = Counting(synthetic(size=100, task_count=1))

    def answer(one: Candidate, number: int) -> Scores:
        if one == A and len(evaluator.asked) > 2:
            return Scores({}, status="failed", error="the power was off", cost=Cost(items=25))
        return _flat(evaluator, number, {A.key: 1.0, B.key: 0.5}[one.key])

    evaluator.before = answer
    searcher = Scripted([[A, B], [B]], racing="batch")
    study(searcher, evaluator).run()
    first, second = searcher.told
    assert [(outcome.status, outcome.value) for outcome in first] == [("failed", -math.inf), ("pruned", 0.5)]
    assert [(outcome.status, outcome.value) for outcome in second] == [("ok", 0.5)]


@pytest.mark.parametrize("why", ["off", "worst", "no items", "switched off"])
def test_where_racing_makes_no_sense_scores_are_whole(why: str) -> None:
    evaluator = synthetic(models=2)
    values = evaluator.levels - ({"E2", "E3"} if why == "no items" else set())

    class Offers(Counting):
        levels = values  # type: ignore[assignment]

    counting = Offers(evaluator)
    run = study(
        Scripted([[A], [B, AB]], racing="off" if why == "off" else "batch"), counting,
        objective=Objective("worst" if why == "worst" else "mean"), fitness=Everything(racing=why != "switched off"),
    )  # fmt: skip
    run.run()
    assert all(outcome.status == "ok" for outcome in run.outcomes)
    assert run.spent.items == 3 * 120
    if why == "no items":
        assert all(plan.items is None for _, plan in counting.asked)


def test_racing_saves_items_and_finds_the_same() -> None:
    """At most 60 % of the items, and a winner that is as good, over ten problems and all four strategies' common core."""
    same = saved = 0
    for seed in range(10):
        problem, fresh = synthetic(seed=seed, models=4, size=100), synthetic(seed=seed, models=4, size=2000, split="fresh")
        runs = []
        for racing in (False, True):
            run = study(HeuristicSearch(problem.members, "coefficient"), problem, fitness=Everything(racing=racing))
            best = max((outcome for outcome in run.run() if outcome.whole), key=lambda outcome: (outcome.value, -outcome.id))
            assert best.proposal.candidate is not None
            runs.append((run.spent.items, fresh.truth(best.proposal.candidate)))
        saved += runs[1][0] <= 0.6 * runs[0][0]
        same += abs(runs[0][1] - runs[1][1]) < 0.02
    assert saved == 10
    assert same >= 8


@pytest.mark.parametrize("then", ["a weaker rival", "no racing"])
def test_a_candidate_that_was_given_up_may_return(then: str) -> None:
    """Pruned by a strong rival, asked again where a weak one is to beat or all must be known: scoring goes on where it stopped."""
    values = {A.key: 1.0, B.key: 0.5, C.key: 0.0}
    evaluator = Counting(synthetic(size=100, task_count=1))
    evaluator.before = lambda one, number: _flat(evaluator, number, values[one.key])

    class Rivals(Scripted):
        @property
        def needs(self) -> Needs:
            if len(self.told) < 3:
                return Needs(racing="incumbent" if self.told else "off")
            return Needs(racing="off") if then == "no racing" else Needs(racing="batch", rival=1)

    searcher = Rivals([[A, C], [B], [B], [B, AB]])
    values[AB.key] = 0.25
    run = study(searcher, evaluator)
    run.run()
    assert [[outcome.status for outcome in told] for told in searcher.told[:3]] == [["ok", "ok"], ["pruned"], ["pruned"]]
    last = searcher.told[3]
    assert (last[0].status, last[0].value, last[0].id) == ("ok", 0.5, 4)
    assert len(last[0].scores.items["t0"]) == 100
    asked = [item for key, plan in evaluator.asked if key == B.key for item in (plan.items or {})["t0"]]
    assert len(asked) == len(set(asked)) == 100
    assert run.counts["candidates"] == 4
    assert run.spent.items == evaluator.items_asked


# -- failures ---------------------------------------------------------------------------------------------------------------------


def broken(error: Exception | Scores, *, when: Callable[[int], bool]) -> Counting:
    def before(candidate: Candidate, number: int) -> Scores | None:
        if when(number):
            if isinstance(error, Exception):
                raise error
            return error
        return None

    return Counting(synthetic(), before=before)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MemoryError(), "failed", "m1: MemoryError"),
        (TimeoutError("after 30 s"), "failed", "m1: TimeoutError: after 30 s"),
        (ValueError("what?"), "failed", "m1: ValueError: what?"),
        (MergeError("shapes differ."), "invalid", "m1: shapes differ."),
        (Scores({}, status="failed", error="a worker was killed"), "failed", "a worker was killed"),
        (Scores({"t0": {"a": math.nan}}), "invalid", "a score is NaN or infinite"),
        (Scores({"t0": {"a": math.inf}}), "invalid", "a score is NaN or infinite"),
    ],
)
def test_what_happens_to_one_candidate_happens_to_it_alone(error: Any, status: str, said: str) -> None:
    searcher = Scripted([[A, B, C], [B]])
    evaluator = broken(error, when=lambda number: False)
    evaluator.before = _only(B, error)
    study(searcher, evaluator).run()
    told = searcher.told[0]
    assert [outcome.status for outcome in told] == ["ok", status, "ok"]
    assert told[1].value == -math.inf
    assert told[1].scores.error == said
    assert searcher.told[1][0].status == status  # not tried again
    assert sum(key == B.key for key, _ in evaluator.asked) <= 2


def _only(who: Candidate, error: Any) -> Callable[[Candidate, int], Scores | None]:
    def before(candidate: Candidate, number: int) -> Scores | None:
        if candidate != who:
            return None
        if isinstance(error, Exception):
            raise error
        found: Scores = error
        return found

    return before


def test_an_error_that_concerns_all_candidates_is_raised() -> None:
    for error in (RunError("the disk is full"), UserError("the data is gone")):
        with pytest.raises(type(error), match=str(error)):
            study(Scripted([[A, B]]), broken(error, when=lambda number: True)).run()


def test_too_many_failures_in_a_row_end_the_search_and_it_can_be_resumed(tmp_path: Path) -> None:
    config = settings("random", budget={"candidates": 12}, max_failures=3)
    evaluator = broken(MemoryError("no room"), when=lambda number: number >= 4)
    with pytest.raises(RunError, match=r"3 candidates in a row could not be scored; the last one: .*MemoryError: no room Mend the cause"):
        run_study(config, evaluator, tmp_path)
    evaluator.before = lambda _candidate, _number: None
    found = run_study(config, evaluator, tmp_path)
    assert found.counts["failed"] == 3
    assert found.counts["candidates"] == 12
    assert found.best is not None
    assert found.best.status == "ok"


def test_failures_between_successes_end_nothing_and_do_not_win() -> None:
    evaluator = broken(MemoryError("no room"), when=lambda number: number % 10 in (3, 4))
    found = run_study(settings("cma", budget={"candidates": 60}, fitness={"kind": "everything"}), evaluator, None)
    assert found.counts["failed"] > 5
    assert found.best is not None
    assert found.best.value == max(outcome.value for outcome in found.outcomes)
    assert any("candidates failed; the last one" in text for text in found.warnings)


# -- confirmation -----------------------------------------------------------------------------------------------------------------


def test_the_best_are_scored_again_on_items_that_the_search_has_not_seen() -> None:
    problem, fresh = Counting(synthetic()), Counting(synthetic(split="confirm"))
    run = study(Scripted([[A, B, C, AB, A]]), problem, confirm=fresh, finalists=2)
    run.run()
    best = sorted({outcome.proposal.candidate: outcome.value for outcome in run.outcomes}.items(), key=lambda pair: -pair[1])[:2]
    assert [key for key, _ in fresh.asked] == [candidate.key for candidate, _ in best if candidate]
    assert {item for _, plan in problem.asked for ids in (plan.items or {}).values() for item in ids}.isdisjoint(
        item for task in fresh.tasks for item in fresh.items(task)
    )


def test_confirmation_decides(tmp_path: Path) -> None:
    config = settings("random", budget={"candidates": 20})
    found = run_study(config, synthetic(), tmp_path, confirm=synthetic(split="confirm"))
    assert len(found.confirmed) == 5
    assert found.best is not None
    assert found.confirmed[found.best.id].mean == max(scores.mean for scores in found.confirmed.values())
    assert found.bias is not None
    assert 0 < found.bias < 0.5
    without = run_study(config, synthetic(), None)
    assert any("it is too high; confirm it on others" in text for text in without.warnings)


@pytest.mark.parametrize(
    ("other", "message"),
    [(synthetic(), "60 items are both searched and confirmed on"), (synthetic(task_count=1, split="c"), "the confirmation tasks are t0")],
)
def test_confirmation_items_are_others_of_the_same_tasks(other: SyntheticEvaluator, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(Scripted([]), synthetic(), confirm=other).run()


# -- what does not fit is said before anything is scored -----------------------------------------------------------------------------


def test_levels_are_checked_first() -> None:
    plain = Plain(lambda weights: 1.0)
    for config, message in [
        (settings("map"), "MapSearch needs an evaluator of level E1; this one offers E0"),
        (settings("random", fitness={"kind": "item_response"}), "need an evaluator of level E2, E3"),
        (settings("random", fitness={"kind": "everything", "limit": 5}), "need an evaluator of level E3"),
    ]:
        with pytest.raises(UserError, match=message):
            run_study(config, plain, None)
    assert plain.asked == []


def test_one_number_per_candidate_is_enough_for_most() -> None:
    plain = Plain(lambda weights: 1 - sum((weights.get(f"m{n}", 0) - 1 / 3) ** 2 for n in range(3)))
    found = run_study(settings("cma", budget={"candidates": 80}), plain, None)
    assert found.best is not None
    assert found.best.value > 0.999
    assert found.bias is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": {"weights": {"t9": 1.0}, "rule": "weighted"}}, "objective: there is no task 't9', but t0, t1"),
        ({"objective": {"weights": {"t0": 0.0, "t1": 0.0}, "rule": "weighted"}}, "not all 0"),
        ({"options": {"trails": 5}}, "searcher 'random': got an unexpected keyword argument 'trails'"),
        ({"name": "cmaes"}, "searcher 'cmaes'; allowed are .*Did you mean 'cma'"),
        ({"space": {"method": "ties", "parameters": {"density": "abc"}}}, "ties: density is 'abc', allowed is a number"),
        ({"space": {"method": "ties", "parameters": {"weight": {"low": "a", "high": 1}}}}, "weight/m0 is .*allowed are .low, high."),
        ({"space": {"method": "ties", "parameters": {"weight": {"choices": 3}}}}, "weight/m0 is .*allowed are .low, high."),
    ],
)
def test_settings_are_checked_first(fields: dict[str, Any], message: str) -> None:
    evaluator = Counting(synthetic())
    with pytest.raises(UserError, match=message):
        run_study(settings(**fields), evaluator, None)
    assert evaluator.asked == []


def test_options_of_the_wrong_kind_are_all_named() -> None:
    options = {"trials": "abc", "sigma": float("nan"), "coarse": 1, "population": 2.5, "generations": 0, "kinship": "x"}
    with pytest.raises(ValidationError) as caught:
        settings(options=options)
    text = str(caught.value)
    assert "trials is 'abc'; allowed is a whole number from 1; sigma is nan; allowed is a number; coarse is 1" in text
    assert "population is 2.5; allowed is a whole number from 1; generations is 0" in text
    assert "kinship is no option of a searcher" in text
    with pytest.raises(ValidationError, match="finite number"):
        settings(objective={"rule": "weighted", "weights": {"t0": float("nan")}})


# -- going on ---------------------------------------------------------------------------------------------------------------------

SEARCHERS: dict[str, dict[str, Any]] = {
    "average": {}, "coefficient": {"coarse": True}, "cma": {"trials": 25}, "evolution": {"population": 6, "generations": 4},
    "random": {"trials": 20}, "grid": {"steps": 4}, "recycling": {"trials": 15}, "map": {"points": 20, "generations": 5},
    "kinship_greedy": {"explore": False},
}  # fmt: skip


def content(report: Any) -> str:
    found = report.to_json()
    del found["spent"], found["counts"]["replayed"]
    return json.dumps(found, sort_keys=True)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_finished_search_is_read_and_not_run(tmp_path: Path, name: str) -> None:
    evaluator, fresh = Counting(synthetic()), Counting(synthetic(split="confirm"))
    first = run_study(settings(name, options=SEARCHERS[name]), evaluator, tmp_path, confirm=fresh)
    asked = len(evaluator.asked), len(fresh.asked)
    again = run_study(settings(name, options=SEARCHERS[name]), evaluator, tmp_path, confirm=fresh)
    assert (len(evaluator.asked), len(fresh.asked)) == asked
    assert content(again) == content(first)
    assert again.spent == first.spent


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("name", SEARCHERS)
def test_the_number_of_workers_changes_nothing(name: str, workers: int) -> None:
    config = settings(name, options=SEARCHERS[name], batch=4)
    one, several = Counting(synthetic()), Counting(synthetic(), workers=workers)
    assert content(run_study(config, several, None)) == content(run_study(config, one, None))
    assert sorted(one.asked, key=str) == sorted(several.asked, key=str)


class Killed(BaseException):
    """As a signal would: nothing in the loop may catch it."""


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_search_that_ends_anywhere_goes_on_and_finds_the_same(tmp_path: Path, name: str) -> None:
    config = settings(name, options=SEARCHERS[name], batch=3)
    whole = Counting(synthetic())
    expected = content(run_study(config, whole, None))
    total = len(whole.asked)
    for point in sorted({0, 1, total // 3, total // 2, total - 1}):
        folder = tmp_path / str(point)
        first, second = Counting(synthetic()), Counting(synthetic())

        def die(candidate: Candidate, number: int, point: int = point) -> None:
            if number == point:
                raise Killed

        first.before = die
        with pytest.raises(Killed):
            run_study(config, first, folder)
        assert content(run_study(config, second, folder)) == expected
        assert len(first.asked) - 1 + len(second.asked) == total, "what was committed is not scored again"
        assert progress_of(folder)


def test_other_settings_or_another_evaluator_are_refused(tmp_path: Path) -> None:
    config = settings("random", options={"trials": 5})
    run_study(config, synthetic(), tmp_path)
    with pytest.raises(UserError, match=r"begun with other settings: seed was 0, is 1\. Restore them"):
        run_study(settings("random", options={"trials": 5}, seed=1), synthetic(), tmp_path)
    with pytest.raises(UserError, match="begun with other models, items or another way of scoring"):
        run_study(config, synthetic(seed=5), tmp_path)
    assert read_settings(tmp_path) == config


def test_an_evaluator_that_answers_otherwise_is_noticed(tmp_path: Path) -> None:
    """What is stored is believed; what a searcher then asks must be what it asked."""
    config = settings("random", options={"trials": 5})
    run_study(config, synthetic(), tmp_path)
    with Journal(tmp_path / JOURNAL) as journal, pytest.raises(ReplayError, match="candidate 0 of this search was"):
        study(Scripted([[AB]]), synthetic(), journal=journal).run()


def test_a_new_search_starts_from_what_an_old_one_found(tmp_path: Path) -> None:
    found = run_study(settings("cma", options={"trials": 30}), synthetic(), tmp_path)
    start = warm_start(tmp_path, 3)
    assert found.best is not None
    assert len(start) == 3
    assert start[0] == found.best.proposal.params
    for name, options in (("random", {"trials": 4}), ("evolution", {"population": 4, "generations": 1}), ("cma", {"trials": 4})):
        fresh = run_study(settings(name, options=options, start=start), synthetic(), None)
        first = fresh.outcomes[0].proposal.candidate
        assert first is not None
        assert found.best.proposal.candidate is not None
        assert first.key == found.best.proposal.candidate.key


def test_a_candidate_by_its_number(tmp_path: Path) -> None:
    found = run_study(settings("random", options={"trials": 3}), synthetic(), tmp_path)
    assert candidate_of(tmp_path, 2) == found.outcomes[2].proposal.candidate
    with pytest.raises(UserError, match="there is no candidate 3; the search asked for 3"):
        candidate_of(tmp_path, 3)


def test_populations_that_race_take_half_of_the_items_and_find_no_worse() -> None:
    """With half of the items to spend, CMA-ES and a genetic search end within two points of those that scored everything."""
    gaps = []
    for name in ("cma", "evolution"):
        for seed in range(4):
            problem, fresh = synthetic(seed=seed, size=100), synthetic(seed=seed, size=2000, split="fresh")
            found = []
            for kind, share in (("everything", 1.0), ("racing", 0.5)):
                config = settings(name, seed=seed, fitness={"kind": kind}, budget={"items": int(share * 60 * 200)})
                best = run_study(config, problem, None).best
                assert best is not None
                assert best.proposal.candidate is not None
                found.append(fresh.truth(best.proposal.candidate))
            gaps.append(found[1] - found[0])
    assert sum(gaps) / len(gaps) > -0.02


def test_those_given_up_on_are_finalists_where_too_few_are_whole() -> None:
    whole, other = Outcome(0, Proposal(A), "ok", 0.5, {}), Outcome(1, Proposal(B), "pruned", 0.7, {})
    again, worse = Outcome(2, Proposal(B), "pruned", 0.4, {}), Outcome(3, Proposal(C), "pruned", 0.1, {})
    nothing = Outcome(4, Proposal(None), "invalid", -math.inf, {})
    assert [one.id for one in finalists([worse, again, other, nothing, whole], 5)] == [0, 1, 3]
    assert [one.id for one in finalists([worse, again, other, nothing, whole], 2)] == [0, 1]
