"""Selection inside a family: invariants, counts, tie rules, refusals."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import RunError, UserError
from modelglue.recipe import Candidate, Scores
from modelglue.search import STRATEGIES, Selection, SelectResult, select
from tests.search.evaluators import Landscape, Weights, bowl

if TYPE_CHECKING:
    from collections.abc import Mapping

GRID = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
few = settings(max_examples=30, deadline=None)


def names(count: int) -> list[str]:
    return [f"m{number}" for number in range(count)]


def cosine(vectors: Mapping[str, torch.Tensor]) -> Any:
    def similarity_to(weights: Weights, other: str) -> float:
        merge = torch.stack([weight * vectors[alias] for alias, weight in weights.items()]).sum(0)
        return float(torch.nn.functional.cosine_similarity(merge, vectors[other], dim=0))

    return similarity_to


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[str], Landscape, Any]:
    """A family of up to six with a score in coarse steps, so that ties happen, and similarities."""
    members = names(draw(st.integers(1, 6)))
    target = {alias: draw(st.floats(-0.3, 0.8)) for alias in members}
    evaluator = Landscape(bowl(target, members, draw(st.sampled_from([None, 20, 200]))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    vectors = {alias: torch.randn(5, generator=generator, dtype=torch.float64) for alias in members}
    return members, evaluator, cosine(vectors)


@few
@given(problem=problems(), accept=st.sampled_from([">=", ">", "significant"]))
def test_invariants_of_every_strategy(problem: tuple[list[str], Landscape, Any], accept: str) -> None:
    members, evaluator, similarity_to = problem
    result = select(members, evaluator, similarity_to=similarity_to, accept=accept)  # type: ignore[arg-type]
    assert [found.strategy for found in result.selections] == list(STRATEGIES)
    for found in result.selections:
        assert list(found.weights) == members
        assert all(weight >= 0 for weight in found.weights.values())
        assert math.fsum(found.weights.values()) == pytest.approx(1, abs=1e-12)
        assert sorted(found.order) == sorted(members)
        assert [found.individual[alias] for alias in found.order] == sorted(found.individual.values(), reverse=True)
        current = found.individual[found.order[0]]
        for one in found.rounds:
            rule = {">=": one.score >= current, ">": one.score > current, "significant": one.interval[1] > 0}
            assert one.accepted == rule[accept]
            assert one.current == (one.score if one.accepted else current)
            assert one.current >= current
            assert one.interval[0] == pytest.approx(one.score - current, abs=1e-12)
            assert (found.weights[one.candidate] > 0) == one.accepted
            if one.scores is not None:
                assert list(map(float, one.scores)) == GRID
                assert one.score == max(one.scores.values())
                largest = max(c for c in GRID if one.scores[str(c)] == one.score)
                assert one.coefficient == (largest if one.accepted else 1.0)
            current = one.current
        assert found.score == current
        assert sorted(one.candidate for one in found.rounds) == sorted(found.order[1:])
        assert evaluator.evaluate(Candidate.linear(found.weights)).mean == found.score
        assert found.tasks == {"task": found.score}
        json.dumps(found.to_json())
    assert result.chosen.score == max(found.score for found in result.selections)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numbers_of_evaluations(strategy: str, count: int) -> None:
    """n - 1 for the average, 9 (n - 1) for the others, besides the n members; no candidate twice; runs repeat."""
    members = names(count)
    target = {alias: 1 / (number + 2) for number, alias in enumerate(members)}
    similarity_to = cosine({alias: torch.arange(5.0).roll(number) for number, alias in enumerate(members)})
    runs = []
    for _ in range(2):
        evaluator = Landscape(bowl(target, members))
        result = select(members, evaluator, strategy=strategy, similarity_to=similarity_to)  # type: ignore[arg-type]
        new = count - 1 if strategy == "average" else 9 * (count - 1)
        assert len(evaluator.asked) == len(set(evaluator.asked)) == count + new
        assert result.chosen.evaluations == new
        assert result.evaluations == count + new
        runs.append((evaluator.asked, result.to_json()))
    assert runs[0] == runs[1]


def test_strategies_share_what_coincides() -> None:
    members = names(4)
    similarity_to = cosine({alias: torch.arange(5.0).roll(number) for number, alias in enumerate(members)})
    evaluator = Landscape(bowl({"m0": 0.6, "m1": 0.3, "m2": 0.2}, members))
    result = select(members, evaluator, similarity_to=similarity_to)
    assert len(evaluator.asked) == len(set(evaluator.asked)) == result.evaluations
    assert [found.evaluations for found in result.selections] == [3, 27, 27, 27]
    assert result.evaluations < 4 + 3 + 3 * 27


@few
@given(target=st.lists(st.floats(-0.3, 1), min_size=2, max_size=2), steps=st.sampled_from([None, 10]))
def test_for_two_models_similarity_equals_coefficient(target: list[float], steps: int | None) -> None:
    members = names(2)
    evaluator = Landscape(bowl(dict(zip(members, target, strict=True)), members, steps))
    result = select(members, evaluator, similarity_to=lambda weights, other: 0.5)
    traces = [{**found.to_json(), "strategy": ""} for found in result.selections[1:]]
    assert traces[0] == traces[1] == traces[2]


@few
@given(seed=st.integers(0, 1000), target=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_flattened_equals_sequential_merging(seed: int, target: list[float]) -> None:
    """Merging the accepted candidates one after the other, in float64, gives the flattened combination."""
    members = names(4)
    generator = torch.Generator().manual_seed(seed)
    vectors = {alias: torch.randn(7, generator=generator, dtype=torch.float64) for alias in members}
    evaluator = Landscape(bowl(dict(zip(members, target, strict=True)), members))
    for found in select(members, evaluator, similarity_to=cosine(vectors)).selections[1:]:
        merge = vectors[found.order[0]]
        for one in found.rounds:
            assert one.coefficient is not None
            merge = one.coefficient * merge + (1 - one.coefficient) * vectors[one.candidate]
        flat = torch.stack([found.weights[alias] * vectors[alias] for alias in members]).sum(0)
        torch.testing.assert_close(flat, merge, rtol=1e-12, atol=1e-12)


class TestTies:
    """A score that nothing changes: an equal score merges, and of equal coefficients the largest wins."""

    def run(self, strategy: str, accept: str = ">=") -> Selection:
        evaluator = Landscape(lambda weights: 0.5)
        result = select(names(3), evaluator, strategy=strategy, accept=accept, similarity_to=lambda w, o: 1.0)  # type: ignore[arg-type]
        return result.chosen

    def test_average_takes_everybody(self) -> None:
        assert self.run("average").weights == dict.fromkeys(names(3), 1 / 3)

    @pytest.mark.parametrize("strategy", STRATEGIES[1:])
    def test_the_grid_ends_at_nine_tenths(self, strategy: str) -> None:
        found = self.run(strategy)
        assert [one.coefficient for one in found.rounds] == [0.9, 0.9]
        assert found.weights == pytest.approx({"m0": 0.81, "m1": 0.09, "m2": 0.1})

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("accept", [">", "significant"])
    def test_strict_rules_reject_everybody(self, strategy: str, accept: str) -> None:
        found = self.run(strategy, accept)
        assert found.weights == {"m0": 1.0, "m1": 0.0, "m2": 0.0}
        assert not any(one.accepted for one in found.rounds)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_it_is_said(self, strategy: str) -> None:
        assert self.run(strategy).warnings == ("proxy cannot tell these models apart: every candidate scores 0.5000.",)

    def test_one_difference_is_enough_to_tell(self) -> None:
        evaluator = Landscape(lambda weights: 0.5 + 0.1 * (len(weights) > 1))
        assert select(names(3), evaluator, strategy="average").chosen.warnings == ()

    def test_equal_members_keep_the_order_of_the_family(self) -> None:
        evaluator = Landscape(lambda weights: 0.5 + 0.1 * ("m2" in weights))
        assert select(names(4), evaluator, strategy="average").chosen.order == ("m2", "m0", "m1", "m3")

    def test_of_equal_coefficients_the_largest_even_when_strict(self) -> None:
        evaluator = Landscape(lambda weights: 0.9 if 0.25 < weights.get("m0", 0) < 0.65 else 0.5)
        for accept in (">=", ">"):
            found = select(names(2), evaluator, strategy="coefficient", accept=accept).chosen  # type: ignore[arg-type]
            assert found.rounds[0].coefficient == 0.6
            assert found.weights == pytest.approx({"m0": 0.6, "m1": 0.4})


class TestSimilarity:
    SIMILAR: Mapping[str, float] = {"m1": 0.2, "m2": 0.9, "m3": 0.9, "m4": float("nan")}

    def order(self, strategy: str) -> list[str]:
        evaluator = Landscape(lambda weights: sum(weights.values()) * (0.5 + 0.1 * ("m0" in weights)))
        seen: list[Weights] = []

        def similarity_to(weights: Weights, other: str) -> float:
            seen.append(weights)
            return self.SIMILAR[other]

        found = select(names(5), evaluator, strategy=strategy, similarity_to=similarity_to).chosen  # type: ignore[arg-type]
        assert all(weight > 0 for weights in seen for weight in weights.values())
        return [one.candidate for one in found.rounds]

    def test_highest_first_ties_by_ranking_and_the_incomparable_last(self) -> None:
        assert self.order("similarity_highest") == ["m2", "m3", "m1", "m4"]

    def test_lowest_first(self) -> None:
        assert self.order("similarity_lowest") == ["m1", "m2", "m3", "m4"]

    def test_it_is_asked_for_the_current_merge(self) -> None:
        """After m1 has joined, m2 is nearer than m3; to m0 alone it was not."""
        vectors = {"m0": [1.0, 0, 0], "m1": [1.0, 0.5, 0], "m2": [0.2, 1, 0], "m3": [0.25, 0, 1]}
        similarity_to = cosine({alias: torch.tensor(value) for alias, value in vectors.items()})
        evaluator = Landscape(lambda weights: 0.6 if len(weights) > 1 else 0.5 + 0.01 * ("m0" in weights))
        found = select(names(4), evaluator, strategy="similarity_highest", similarity_to=similarity_to).chosen
        assert [one.candidate for one in found.rounds][:2] == ["m1", "m2"]
        assert similarity_to({"m0": 1.0}, "m3") > similarity_to({"m0": 1.0}, "m2")

    def test_it_is_needed(self) -> None:
        for strategy in ("all", "similarity_lowest"):
            with pytest.raises(UserError, match="Give similarity_to"):
                select(names(2), Landscape(lambda weights: 0.5), strategy=strategy)  # type: ignore[arg-type]


def test_all_rejected_leaves_the_best_single() -> None:
    evaluator = Landscape(lambda weights: 0.1 if len(weights) > 1 else 0.5 + 0.1 * ("m1" in weights))
    for found in select(names(3), evaluator, similarity_to=lambda w, o: 0.5).selections:
        assert found.weights == {"m0": 0.0, "m1": 1.0, "m2": 0.0}
        assert found.score == 0.6
        assert {one.coefficient for one in found.rounds} <= {1.0, None}


def test_a_family_of_one() -> None:
    evaluator = Landscape(lambda weights: 0.5)
    result = select(["only"], evaluator, similarity_to=lambda w, o: 0.5)
    assert len(evaluator.asked) == 1
    for found in result.selections:
        assert (found.weights, found.rounds, found.evaluations, found.warnings) == ({"only": 1.0}, (), 0, ())


def test_identical_models_merge_and_harm_nothing() -> None:
    """m0 and m1 are copies: every blend of the two scores the same."""
    evaluator = Landscape(lambda weights: 0.5 + 0.2 * (weights.get("m0", 0) + weights.get("m1", 0)))
    found = select(names(3), evaluator, strategy="coefficient").chosen
    assert found.score == pytest.approx(0.7)
    assert found.weights == pytest.approx({"m0": 0.9, "m1": 0.1, "m2": 0.0})


class TestChoice:
    """`average` ends at 1/2 + 1/2, the grid at 0.6 and 0.4."""

    @staticmethod
    def run(confirm: Any = None, value: Any = None) -> SelectResult:
        proxy = Landscape(value or (lambda weights: 1 - (weights.get("m0", 0) - 0.6) ** 2))
        return select(names(2), proxy, similarity_to=lambda w, o: 0.5, confirm=confirm)

    def test_best_score_ties_to_the_earlier(self) -> None:
        result = self.run()
        assert result.chosen.strategy == "coefficient"
        assert [found.score for found in result.selections] == pytest.approx([0.99, 1, 1, 1])
        assert [found.confirmation for found in result.selections] == [None] * 4

    def test_confirmation_decides(self) -> None:
        confirm = Landscape(lambda weights: 0.9 if weights["m0"] == 0.5 else 0.4)
        result = self.run(confirm)
        assert result.chosen.strategy == "average"
        assert [found.confirmation for found in result.selections] == pytest.approx([0.9, 0.4, 0.4, 0.4])
        assert len(set(confirm.asked)) == 2

    def test_equal_confirmations_go_to_the_better_search_score(self) -> None:
        assert self.run(Landscape(lambda weights: 0.5)).chosen.strategy == "coefficient"

    def test_one_strategy_is_confirmed_too(self) -> None:
        confirm = Landscape(lambda weights: 0.25)
        result = select(names(2), Landscape(lambda weights: 0.5), strategy="average", confirm=confirm)
        assert result.chosen.confirmation == 0.25
        assert len(confirm.asked) == 1


class TestSignificance:
    @staticmethod
    def scores(right: int, total: int = 100) -> Scores:
        return Scores({"t": {str(item): float(item < right) for item in range(total)}})

    def run(self, merged: int, accept: str) -> Selection:
        class Counted:
            tasks = ("t",)

            def evaluate(_self, candidate: Candidate) -> Scores:  # noqa: N805
                return self.scores(merged if len(candidate.members) > 1 else 50)

        return select(names(2), Counted(), strategy="average", accept=accept).chosen  # type: ignore[arg-type]

    def test_a_small_gain_is_not_significant(self) -> None:
        assert self.run(51, ">").rounds[0].accepted
        found = self.run(51, "significant").rounds[0]
        assert not found.accepted
        assert found.interval[0] == pytest.approx(0.01)
        assert found.interval[1] <= 0 < found.interval[2]

    def test_a_large_gain_is(self) -> None:
        found = self.run(70, "significant").rounds[0]
        assert found.accepted
        assert found.interval[1] > 0.1


class TestNaN:
    def test_counts_as_zero_and_is_said(self) -> None:
        evaluator = Landscape(lambda weights: float("nan") if "m1" in weights else 0.5)
        found = select(names(3), evaluator, strategy="average").chosen
        assert found.individual == {"m0": 0.5, "m1": 0.0, "m2": 0.5}
        assert found.weights == {"m0": 0.5, "m1": 0.0, "m2": 0.5}
        assert found.warnings == (
            "'m1': its score is NaN; it counts as 0.",
            "0.3333 m0 + 0.3333 m1 + 0.3333 m2: its score is NaN; it counts as 0.",
        )

    def test_for_the_first_model_is_an_error(self) -> None:
        with pytest.raises(RunError, match="'m0': its score is NaN"):
            select(names(2), Landscape(lambda weights: float("nan")), strategy="average")

    def test_warnings_of_the_evaluator_are_kept_once(self) -> None:
        class Talkative(Landscape):
            def evaluate(self, candidate: Candidate) -> Scores:
                return Scores(super().evaluate(candidate).items, ("non-finite logits",))

        found = select(names(3), Talkative(bowl({"m0": 1}, names(3))), strategy="average").chosen
        assert found.warnings == ("non-finite logits",)


def test_events_tell_every_round() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    evaluator = Landscape(bowl({"m0": 0.6, "m1": 0.4}, names(3)))
    select(names(3), evaluator, similarity_to=lambda w, o: 0.5, on_event=lambda name, fields: events.append((name, fields)))
    assert {name for name, _ in events} == {"select"}
    assert events[0][1] == {
        "strategy": None,
        "round": 0,
        "of": 0,
        "candidate": "m0",
        "score": evaluator.value({"m0": 1}),
    }
    assert [(fields["strategy"], fields["round"], fields["of"]) for _, fields in events[1:]] == [
        (strategy, number, 2) for strategy in STRATEGIES for number in (1, 2)
    ]
    json.dumps(events)


def test_the_trace_is_json_with_the_documented_keys() -> None:
    evaluator = Landscape(bowl({"m0": 0.6, "m1": 0.4}, names(2)), tasks=("x", "y"))
    found = select(names(2), evaluator, strategy="coefficient", coefficients=[0.75, 0.25]).chosen.to_json()
    assert list(found) == [
        "strategy", "order", "individual", "weights", "score", "tasks", "evaluations", "rounds",
        "confirmation", "warnings",
    ]  # fmt: skip
    (one,) = found["rounds"]
    assert list(one) == ["candidate", "scores", "coefficient", "score", "accepted", "current", "interval"]
    assert list(one["scores"]) == ["0.25", "0.75"]
    assert set(found["tasks"]) == {"x", "y"}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "averag"}, r"strategy is 'averag'.*Did you mean 'average'"),
        ({"coefficients": []}, "between 0 and 1"),
        ({"coefficients": [0.5, 1.0]}, "between 0 and 1"),
        ({"accept": "=>"}, r"accept is '=>'.*allowed are >=, >, significant"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    evaluator = Landscape(lambda weights: 0.5)
    with pytest.raises(UserError, match=message):
        select(names(2), evaluator, **{"strategy": "average", **arguments})
    assert evaluator.asked == []


def test_members_are_checked() -> None:
    for members in ([], ["a", "a"]):
        with pytest.raises(UserError, match="each named once"):
            select(members, Landscape(lambda weights: 0.5), strategy="average")
