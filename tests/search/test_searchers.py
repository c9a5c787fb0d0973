"""Every searcher on a problem whose best candidate is known: better than chance, as its paper sets it, and its corner cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Scores
from modelglue.recipe.dataflow import FlowSpace, Hop
from modelglue.search import Facts, HeuristicSearch, Outcome, Proposal, SearchSettings, Study, SyntheticEvaluator, run_study, select
from modelglue.search.cma import CmaSearch, StagedSearch, population_for
from modelglue.search.dataflow import DataFlowSearch, PathSpace, path_candidate
from modelglue.search.decode import MergeSpace
from modelglue.search.evolution import EvolutionSearch
from modelglue.search.fitness import Everything
from modelglue.search.grid import GridSearch
from modelglue.search.journal import Journal
from modelglue.search.kinship_greedy import KinshipGreedySearch
from modelglue.search.map import MapSearch
from modelglue.search.pareto import hypervolume
from modelglue.search.randomness import rng
from tests.search.doubles import Plain
from tests.search.evaluators import Landscape, bowl


def problem(seed: int, models: int = 5, tasks: int = 1, **fields: Any) -> SyntheticEvaluator:
    return SyntheticEvaluator(models, tasks, **{"size": 40, "seed": seed, "noise": False, **fields})


def settings(name: str, evaluator: SyntheticEvaluator, budget: int, **fields: Any) -> SearchSettings:
    searcher = {"name": name, **fields.pop("options", {})}
    return SearchSettings(
        members=tuple(evaluator.members), base="o", searcher=searcher, budget={"candidates": budget},  # type: ignore[arg-type]
        fitness={"kind": "everything"}, **{"seed": evaluator.seed, **fields},  # type: ignore[arg-type]
    )  # fmt: skip


@cache
def by_chance(seed: int, budget: int) -> float:
    return found("random", problem(seed), budget)


def found(name: str, evaluator: SyntheticEvaluator, budget: int, **fields: Any) -> float:
    """Expected score of what a searcher finds."""
    report = run_study(settings(name, evaluator, budget, **fields), evaluator, None)
    assert report.best is not None
    assert report.best.proposal.candidate is not None
    return evaluator.truth(report.best.proposal.candidate)


# -- better than chance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "budget", "options"),
    [
        ("cma", 120, {"trials": None}),
        ("evolution", 240, {"population": 20}),
        ("recycling", 120, {"trials": 110}),
        ("cma", 120, {"init": "heuristic"}),
        ("coefficient", 120, {}),
    ],
)
def test_beats_random_search_at_an_equal_budget(name: str, budget: int, options: dict[str, Any]) -> None:
    wins = 0
    for seed in range(10):
        evaluator = problem(seed)
        wins += found(name, evaluator, budget, options=options) > by_chance(seed, budget)
    assert wins >= 8


def test_map_beats_random_search_and_reaches_the_front_of_ten_times_the_evaluations() -> None:
    wins = 0
    volumes = []
    space = {"method": "task_arithmetic"}
    for seed in range(10):
        evaluator = problem(seed, models=3)
        wins += found("map", evaluator, 30, options={"generations": 10}) > found("random", evaluator, 30, space=space)
    for seed in range(3):
        evaluator = problem(seed, models=3, tasks=3)
        worst = np.array(
            [min(evaluator.evaluate(Candidate.single(one)).tasks()[task] for one in evaluator.members) for task in evaluator.tasks]
        )
        fronts = []
        for name, budget, options in (
            ("map", 30, {"points": 20, "verify": 10, "generations": 40}),
            ("evolution", 300, {"objectives": "all", "population": 30}),
        ):
            report = run_study(settings(name, evaluator, budget, options=options, space=space), evaluator, None)
            fronts.append(hypervolume(np.array([list(one.tasks.values()) for one in report.front]), worst))
        volumes.append(fronts[0] / fronts[1])
    assert wins >= 8
    assert min(volumes) >= 0.9


# -- CMA-ES -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimensions", "population"), [(4, 8), (8, 10), (12, 11), (16, 12), (24, 14), (60, 16), (396, 22)])
def test_the_population_of_the_published_settings(dimensions: int, population: int) -> None:
    assert population_for(dimensions) == population


@pytest.mark.parametrize("models", [2, 4, 8, 12])
def test_a_concave_score_is_approached_within_200_trials(models: int) -> None:
    members = [f"m{number}" for number in range(models)]
    shares = rng(models, "target").random(models)
    target = dict(zip(members, shares / shares.sum(), strict=True))
    value = bowl(target, members)
    report = run_study(SearchSettings(members=tuple(members)), Plain(value), None)
    again = run_study(SearchSettings(members=tuple(members)), Plain(value), None)
    assert report.best is not None
    assert report.best.value > 1 - 2e-3
    assert report.best.value == max(outcome.value for outcome in report.outcomes)
    assert report.counts["candidates"] + report.counts["duplicates"] <= 200
    assert [outcome.proposal for outcome in again.outcomes] == [outcome.proposal for outcome in report.outcomes]


def test_the_first_trial_is_random_and_told_to_nobody() -> None:
    batches = []
    for value in (0.0, 1.0):
        search = CmaSearch(MergeSpace("linear", ("a", "b", "c")))
        first = search.ask(1)
        assert [proposal.tag for proposal in first] == ["random", *["child"] * 7]
        search.tell([told(proposal, value if number == 0 else number / 10) for number, proposal in enumerate(first)])
        batches.append(search.ask(1))
    assert batches[0] == batches[1]


def told(proposal: Proposal, value: float, id_: int = 0) -> Outcome:
    return Outcome(id_, proposal, "ok", value, {"t": value}, Scores({"t": {"a": value}}))


def test_one_parameter_is_enough() -> None:
    search = CmaSearch(MergeSpace("slerp", ("a", "b")), trials=60)
    best = 0.0
    while not search.done():
        batch = search.ask(1)
        values = [1 - (proposal.params["t"] - 0.3) ** 2 for proposal in batch]
        best = max([best, *values])
        search.tell([told(proposal, value) for proposal, value in zip(batch, values, strict=True)])
    assert best > 1 - 1e-4


def test_the_heuristic_start_is_never_worse_than_the_heuristic_and_stays_near() -> None:
    for seed in range(5):
        evaluator = problem(seed, models=4, tasks=2)
        report = run_study(settings("cma", evaluator, 500, options={"init": "heuristic"}), evaluator, None)
        heuristic = run_study(settings("coefficient", evaluator, 500), evaluator, None)
        assert report.best is not None
        assert heuristic.best is not None
        assert report.best.value >= heuristic.best.value
        children = [one for one in report.outcomes if one.proposal.tag == "child"]
        assert children
        assert all(-0.1 <= delta <= 0.1 for one in children for delta in one.proposal.params.values())
        stages = report.to_json()["searcher"]["stages"]
        assert len(stages) == 2


def test_the_heuristic_start_goes_on_while_it_finds_better_ones_and_comes_near_the_vanilla_search() -> None:
    """71 trials of the walk, 50 more at least, and no more than a vanilla search altogether; a coarse walk takes 43 at most."""
    for seed in range(4):
        evaluator = problem(seed, models=8, tasks=2)
        vanilla = run_study(settings("cma", evaluator, 200), evaluator, None)
        for options, walk in (({"init": "heuristic"}, 71), ({"init": "heuristic", "coarse": True}, 43)):
            started = run_study(settings("cma", evaluator, 500, options=options), evaluator, None)
            assert vanilla.best is not None
            assert started.best is not None
            assert vanilla.best.value - started.best.value < (0.004 if walk == 71 else 0.01)
            tags = [one.proposal.tag for one in started.outcomes]
            assert tags.count("member") + tags.count("coefficient") <= walk
            assert tags.count("init") + tags.count("child") - 1 >= 50
            assert started.counts["candidates"] <= 200


def test_the_heuristic_start_is_for_linear_merges() -> None:
    evaluator = problem(0)
    with pytest.raises(UserError, match="a heuristic start is for linear merges of whole models"):
        run_study(settings("cma", evaluator, 10, options={"init": "heuristic"}, space={"method": "ties"}), evaluator, None)
    with pytest.raises(UserError, match="init is 'heuristics'; allowed are vanilla, random and heuristic"):
        run_study(settings("cma", evaluator, 10, options={"init": "heuristics"}), evaluator, None)


# -- Model-GLUE's strategies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True])
def test_the_searcher_and_the_function_are_one(coarse: bool) -> None:
    members = [f"m{number}" for number in range(4)]
    value = bowl({"m0": 0.5, "m1": 0.2, "m3": 0.3}, members, 50)
    direct = select(members, Landscape(value), coarse=coarse, similarity_to=lambda weights, other: float(other[-1]))
    searcher = HeuristicSearch(members, "all", coarse=coarse, similarity_to=lambda weights, other: float(other[-1]))
    Study(searcher, Plain(value), Journal()).run()
    mine = [selection.to_json() for selection in searcher.selections()]
    theirs = [{**selection.to_json(), "warnings": []} for selection in direct.selections]
    for one in (*mine, *theirs):
        one["tasks"] = list(one["tasks"].values())
    assert mine == theirs


def test_a_coarse_grid_asks_for_half_and_finds_the_same_on_smooth_scores() -> None:
    members = [f"m{number}" for number in range(5)]
    value = bowl({"m0": 0.55, "m1": 0.25, "m2": 0.2}, members)
    fine, coarse = (select(members, Landscape(value), strategy="coefficient", coarse=coarse) for coarse in (False, True))
    assert coarse.chosen.weights == fine.chosen.weights
    assert fine.chosen.evaluations == 36
    assert 16 <= coarse.chosen.evaluations <= 20
    assert list(coarse.chosen.rounds[0].scores or {}) == sorted(coarse.chosen.rounds[0].scores or {})


def test_racing_changes_no_strategy_of_a_clear_problem() -> None:
    """Each strategy races against its own merge, not against what another strategy has found."""
    evaluator = SyntheticEvaluator(4, 2, 150, seed=3)
    facts = Facts(similarity_to=lambda weights, other: float(other[-1]))
    reports = []
    for kind in ("everything", "racing"):
        config = SearchSettings(
            members=tuple(evaluator.members),
            searcher={"name": "all"},
            fitness={"kind": kind},  # type: ignore[arg-type]
        )
        reports.append(run_study(config, evaluator, None, facts=facts))
    whole, raced = reports
    assert raced.spent["items"] < 0.6 * whole.spent["items"]
    for one, other in zip(whole.searcher["strategies"], raced.searcher["strategies"], strict=True):
        assert one["rounds"][0]["candidate"] == other["rounds"][0]["candidate"]
        assert other["score"] > one["score"] - 0.03


# -- random and grid --------------------------------------------------------------------------------------------------------------


def test_a_grid_asks_for_every_point_once() -> None:
    search = GridSearch(MergeSpace("linear", ("a", "b", "c")), steps=4)
    asked = [proposal for batch in iter(lambda: search.ask(4), []) for proposal in batch]
    assert search.done()
    assert len({proposal.candidate for proposal in asked}) == len(asked) == 15
    with pytest.raises(UserError, match="too many points"):
        GridSearch(MergeSpace("linear", tuple(f"m{n}" for n in range(40))), steps=5)


# -- evolution --------------------------------------------------------------------------------------------------------------------


def test_evolution_on_all_tasks_finds_a_front() -> None:
    evaluator = problem(1, models=3, tasks=2)
    report = run_study(settings("evolution", evaluator, 200, options={"objectives": "all", "population": 20}), evaluator, None)
    values = [tuple(one.tasks.values()) for one in report.front]
    assert len(values) > 5
    assert all(not (a[0] >= b[0] and a[1] >= b[1] and a != b) for a in values for b in values)
    assert report.hypervolume is not None
    for task in evaluator.tasks:
        assert report.by_task[task].tasks[task] == max(one.tasks[task] for one in report.front)


def test_evolution_survives_failures_and_needs_one_success() -> None:
    space = MergeSpace("linear", ("a", "b"))
    search = EvolutionSearch(space, population=4, objectives="all")
    batch = search.ask(1)
    failed = [Outcome(number, proposal, "failed", -math.inf, {}) for number, proposal in enumerate(batch)]
    search.tell([*failed[:3], told(batch[3], 0.5, 3)])
    assert len(search.ask(1)) == 4
    with pytest.raises(UserError, match="no candidate of the first generation could be scored"):
        tell_of(EvolutionSearch(space, population=4, objectives="all"), failed)


def tell_of(search: EvolutionSearch, outcomes: list[Outcome]) -> None:
    search.ask(1)
    search.tell(outcomes)


# -- recycling --------------------------------------------------------------------------------------------------------------------


def test_recycling_starts_with_uniform_singles_and_the_greedy_soup() -> None:
    evaluator = problem(2, models=4)
    report = run_study(settings("recycling", evaluator, 200, options={"trials": 30}), evaluator, None)
    asked = [outcome.proposal for outcome in report.outcomes]
    assert asked[0].candidate == Candidate.linear(dict.fromkeys(evaluator.members, 1.0))
    assert [proposal.candidate for proposal in asked[1:5]] == [Candidate.single(alias) for alias in evaluator.members]
    assert [proposal.tag for proposal in asked[5:8]] == ["average"] * 3
    assert asked[8].tag == "init"
    assert sum(proposal.tag in ("init", "child") for proposal in asked[1:]) == 30


def test_recycling_finds_the_optimum_of_a_quadratic_to_a_percent() -> None:
    members = [f"m{number}" for number in range(8)]
    shares = rng(0, "target").random(8)
    report = run_study(
        SearchSettings(members=tuple(members), searcher={"name": "recycling", "trials": 180}),  # type: ignore[arg-type]
        Plain(bowl(dict(zip(members, shares / shares.sum(), strict=True)), members)), None,
    )  # fmt: skip
    assert report.best is not None
    assert report.best.value > 0.99


def test_recycling_with_negative_coefficients() -> None:
    members = ("a", "b", "c")
    report = run_study(
        SearchSettings(members=members, searcher={"name": "recycling", "allow_negative": True, "trials": 150}),  # type: ignore[arg-type]
        Plain(bowl({"a": 0.9, "b": 0.4, "c": -0.3}, members)), None,
    )  # fmt: skip
    assert report.best is not None
    assert report.best.value > 0.99


# -- kinship ----------------------------------------------------------------------------------------------------------------------

VECTORS = {f"m{number}": rng(number, "vector").random(6) - 0.3 for number in range(5)}


def kin(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    x, y = (sum(weight * VECTORS[alias] for alias, weight in weights.items()) for weights in (a, b))
    return float(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))


def family(search: KinshipGreedySearch, value: Any) -> list[list[Proposal]]:
    generations: list[list[Proposal]] = []
    number = 0
    while not search.done():
        batch = search.ask(1)
        if not batch:
            break
        generations.append(batch)
        search.tell([told(proposal, value(proposal), number + place) for place, proposal in enumerate(batch)])
        number += len(batch)
    return generations


def linear_value(proposal: Proposal) -> float:
    assert proposal.candidate is not None
    weights = dict(zip(proposal.candidate.members, proposal.candidate.weights, strict=True))
    return bowl({"m0": 0.5, "m1": 0.3, "m2": 0.2}, list(VECTORS))(weights)


def test_the_best_are_merged_in_pairs_and_the_best_with_its_most_distant_relative() -> None:
    search = KinshipGreedySearch(list(VECTORS), kinship=kin, k=3, method="linear", stop_kinship=1.1)
    generations = family(search, linear_value)
    assert len(generations[0]) == 5
    values = {number: linear_value(proposal) for number, proposal in enumerate(generations[0])}
    best = sorted(values, key=lambda number: -values[number])[:3]
    assert [proposal.parents for proposal in generations[1] if proposal.tag == "child"] == [
        (best[0], best[1]), (best[0], best[2]), (best[1], best[2])
    ]  # fmt: skip
    first = {f"m{best[0]}": 1.0}
    distant = min((number for number in range(5) if number != best[0]), key=lambda number: kin(first, {f"m{number}": 1.0}))
    assert [proposal.parents for proposal in generations[1] if proposal.tag == "explore"] in ([(best[0], distant)], [])
    assert all(len(generation) <= 4 for generation in generations[1:])
    pairs = [frozenset(proposal.parents) for generation in generations[1:] for proposal in generation]
    assert len(pairs) == len(set(pairs))
    report = search.report()
    assert len(report["family"]) <= sum(map(len, generations))
    tops = [generation["best"] for generation in report["generations"]]
    assert tops[-1] == tops[-2], "it ends when the best did not change"


def test_it_ends_when_the_best_are_alike() -> None:
    search = KinshipGreedySearch(["m0", "m1", "m2"], kinship=lambda a, b: 0.96, k=2, method="linear")
    assert len(family(search, linear_value)) == 1


def test_merges_of_merges_are_recipes_in_recipes() -> None:
    search = KinshipGreedySearch(["m0", "m1"], k=2, explore=False)
    search.tell([told(proposal, 0.5 + number / 10, number) for number, proposal in enumerate(search.ask(1))])
    (child,) = search.ask(1)
    search.tell([told(child, 0.9, 2)])
    (grandchild,) = search.ask(1)
    assert child.candidate is not None
    assert grandchild.candidate is not None
    inner = {"method": "slerp", "base": "m1", "models": [{"model": "m0"}], "parameters": {"t": 0.5}}
    assert child.candidate == Candidate.of(inner)
    assert grandchild.candidate == Candidate.of({"method": "slerp", "base": inner, "models": [{"model": "m1"}], "parameters": {"t": 0.5}})
    assert grandchild.parents == (2, 1)


def test_a_relative_that_equals_the_base_is_not_explored() -> None:
    def none_to_m2(a: Mapping[str, float], b: Mapping[str, float]) -> float:
        return math.nan if "m2" in (*a, *b) else 0.1

    search = KinshipGreedySearch(["m0", "m1", "m2"], kinship=none_to_m2, k=2, method="linear")
    generations = family(search, linear_value)
    assert all(2 not in proposal.parents for generation in generations for proposal in generation if proposal.tag == "explore")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"members": ["a"]}, "allowed are 2 or more of 2 or more"),
        ({"members": ["a", "b"]}, "exploring needs the kinship"),
        ({"members": ["a", "b"], "explore": False, "method": "nearswap"}, "does not merge two models"),
        ({"members": ["a", "b"], "explore": False, "method": "ties"}, "ties needs a base"),
    ],
)
def test_kinship_greedy_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KinshipGreedySearch(**arguments)


# -- MAP --------------------------------------------------------------------------------------------------------------------------


def map_run(search: MapSearch, score: Any) -> list[tuple[Proposal, dict[str, float]]]:
    asked = []
    while not search.done():
        batch = search.ask(1)
        outcomes = []
        for number, proposal in enumerate(batch):
            tasks = score([proposal.params[f"weight/{alias}"] for alias in ("a", "b", "c")[: len(proposal.params)]])
            outcomes.append(Outcome(number, proposal, "ok", sum(tasks.values()), tasks, Scores({})))
            asked.append((proposal, tasks))
        search.tell(outcomes)
    return asked


def quadratics(c: Sequence[float]) -> dict[str, float]:
    return {f"t{k}": 0.8 - 0.3 * sum((x - (i == k)) ** 2 for i, x in enumerate(c)) for k in range(len(c))}


@pytest.mark.parametrize("variant", ["plain", "bayesian"])
def test_map_predicts_its_front(variant: Any) -> None:
    search = MapSearch(["a", "b"], "o", variant=variant, points=14, verify=4, generations=30, link="identity")
    asked = map_run(search, quadratics)
    report = search.report()
    assert [proposal.tag for proposal, _ in asked] == ["design"] * 14 + ["verify"] * 4
    assert asked[0][0].candidate == Candidate.of({"method": "task_arithmetic", "base": "o", "models": [{"model": "a", "weight": 1.0}]})
    assert min(report["r2"].values()) > 0.999
    for entry in report["verified"]:
        assert entry["scored"] == pytest.approx(entry["predicted"], abs=1e-4)
    for entry in report["front"]:
        a, b = entry["scalings"]["a"], entry["scalings"]["b"]
        assert a + b == pytest.approx(1, abs=0.2)  # the front lies between the two optima


def test_map_refuses_a_front_of_noise_and_keeps_the_best_point() -> None:
    generator = np.random.default_rng(0)
    search = MapSearch(["a", "b"], "o")
    asked = map_run(search, lambda c: {"t0": float(generator.random())})
    assert len(asked) == 12
    assert "points that were left out are not predicted" in search.report()["refused"]


def test_map_with_failures_says_so() -> None:
    search = MapSearch(["a", "b"], "o", points=6)
    batch = search.ask(1)
    outcomes = [told(proposal, 0.5, number) for number, proposal in enumerate(batch)]
    search.tell([Outcome(0, batch[0], "failed", -math.inf, {}), *outcomes[1:]])
    assert search.done()
    assert search.report()["refused"] == "5 points could be scored, a quadratic needs 6"


def test_nested_map_joins_two_at_a_time() -> None:
    search = MapSearch(["a", "b", "c"], "o", variant="nested", generations=30, link="identity")
    asked = map_run(search, quadratics)
    report = search.report()
    assert [proposal.tag for proposal, _ in asked] == ["member"] * 3 + ["design"] * 40 + ["verify"]
    assert [join["pair"] for join in report["joins"]] == [[0, 1], [0, 1]]
    final = asked[-1][1]
    assert min(final.values()) > max(min(tasks.values()) for _, tasks in asked[:3])
    assert all(0.1 < scaling < 0.7 for scaling in report["scalings"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "bayes"}, "variant is 'bayes'; allowed are plain, bayesian, nested.*Did you mean 'bayesian'"),
        ({"points": 5}, "5 points for 2 models; allowed is 6 or more"),
    ],
)
def test_map_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MapSearch(["a", "b"], "o", **arguments)


# -- data flow --------------------------------------------------------------------------------------------------------------------


def test_the_path_of_the_first_model_is_the_first_model() -> None:
    space = PathSpace(FlowSpace({"a": 3, "b": 2}, 2))
    assert space.candidate(space.start()) == path_candidate([Hop("a", 0), Hop("a", 1), Hop("a", 2)], "a")
    both = path_candidate([Hop("b", 1), Hop("b", 0, 0.5)], "a")
    assert (both.members, both.aliases, both.alone) == (("b",), ("b", "a"), None)


def test_paths_that_are_no_models() -> None:
    space = PathSpace(FlowSpace({"a": 3, "b": 2}, 2), max_layers=4, scales=(1.0, 1.0))
    names = [parameter.name for parameter in space.space.parameters]
    assert len(names) == 10
    assert space.candidate(dict.fromkeys(names, False)) is None
    assert space.candidate(dict.fromkeys(names, True)) is None
    some = {**dict.fromkeys(names, False), "use/0004": True, "use/0005": True}
    assert space.candidate(some) == path_candidate([Hop("b", 1), Hop("a", 0)], "a")


def test_data_flow_search_finds_a_path() -> None:
    """One point for every hop of the hidden path that is there, less for hops too many."""
    target = [("a", 0), ("b", 1), ("a", 2)]

    def value(proposal: Proposal) -> float:
        if proposal.candidate is None:
            return -math.inf
        path = [(hop["model"], hop["layer"]) for hop in proposal.candidate.recipe["hops"]]
        return sum(hop in path for hop in target) - 0.3 * abs(len(path) - len(target))

    search = DataFlowSearch({"a": 3, "b": 2}, repeats=1, scales=(1.0, 1.0), trials=300, max_layers=5)
    best: list[float] = []
    while not search.done():
        batch = search.ask(1)
        if not best:
            assert batch[0].candidate == path_candidate([Hop("a", 0), Hop("a", 1), Hop("a", 2)], "a")
        values = [value(proposal) for proposal in batch]
        best.append(max(values))
        search.tell(
            [
                told(proposal, one) if proposal.candidate else Outcome(0, proposal, "invalid", -math.inf, {})
                for proposal, one in zip(batch, values, strict=True)
            ]
        )
    assert max(best) == 3.0


def test_scales_stay_in_their_range() -> None:
    search = DataFlowSearch({"a": 2}, repeats=2, scales=(0.5, 2.0), trials=30)
    for proposal in search.ask(1):
        assert all(0.5 <= value <= 2 for name, value in proposal.params.items() if name.startswith("scale"))
        assert {name for name in proposal.params if name.startswith("scale")} == {
            name.replace("use", "scale") for name, used in proposal.params.items() if name.startswith("use") and used
        }


def test_a_data_flow_search_needs_the_numbers_of_layers() -> None:
    with pytest.raises(UserError, match="the number of layers of m1 is not known"):
        run_study(
            SearchSettings(members=("m0", "m1"), searcher={"name": "dataflow"}),  # type: ignore[arg-type]
            Plain(lambda weights: 0.0), None, facts=Facts(depths={"m0": 2}),
        )  # fmt: skip


# -- stages -----------------------------------------------------------------------------------------------------------------------


def test_stages_follow_each_other() -> None:
    seen: list[int] = []

    def second(outcomes: Sequence[Outcome]) -> GridSearch:
        seen.append(len(outcomes))
        return GridSearch(MergeSpace("linear", ("a", "b")), steps=2)

    search = StagedSearch(lambda _: GridSearch(MergeSpace("linear", ("a", "b")), steps=1), second)
    batches = []
    while not search.done():
        batch = search.ask(5)
        batches.append(len(batch))
        search.tell([told(proposal, 0.5) for proposal in batch])
    assert batches == [2, 3]
    assert seen == [2]
    assert search.report() == {"stages": [{"points": 2}, {"points": 3}]}


def test_everything_needs_items() -> None:
    class Empty(Plain):
        def items(self, task: str) -> Sequence[str]:
            return ()

    with pytest.raises(UserError, match="task score: has no items"):
        Everything().parts(Empty(lambda weights: 0.0))
