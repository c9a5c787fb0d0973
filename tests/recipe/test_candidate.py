"""What search and evaluation pass to each other: keys of candidates, and intervals from items."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Cost, Plan, Scores, interval, paired_interval

# -- candidates -------------------------------------------------------------------------------------------------------------------


def models(**weights: float) -> list[dict[str, object]]:
    return [{"model": alias, "weight": weight} for alias, weight in weights.items()]


def test_linear_normalises_and_keeps_the_order() -> None:
    found = Candidate.linear({"b": 3, "a": 1})
    assert found == Candidate.of({"method": "linear", "models": models(b=0.75, a=0.25)})
    assert (found.method, found.members, found.weights) == ("linear", ("b", "a"), (0.75, 0.25))
    assert found.key == '{"method": "linear", "models": [{"model": "b", "weight": 0.75}, {"model": "a", "weight": 0.25}]}'


def test_weights_without_effect_are_dropped_after_normalisation() -> None:
    """What counts is the share, not the number that was given: the key cannot tell shares below its resolution from 0."""
    assert Candidate.linear({"a": 1, "b": 0, "c": 1e-9}) == Candidate.single("a")
    assert Candidate.linear({"a": 1e9, "b": 1}) == Candidate.single("a")
    assert Candidate.linear({"a": 1e-9, "b": 1e-9}) == Candidate.linear({"a": 1, "b": 1})
    assert Candidate.linear({"a": 1e-9}) == Candidate.single("a")


def test_a_single_member_is_the_linear_merge_with_all_weight() -> None:
    assert Candidate.single("a") == Candidate.linear({"a": 0.3})
    assert Candidate.single("a").key == Candidate.linear({"a": 7, "b": 0}).key


def test_negative_weights_are_kept() -> None:
    assert Candidate.linear({"a": 2, "b": -1}).weights == (2.0, -1.0)
    assert Candidate.linear({"a": -1, "b": -3}).weights == (0.25, 0.75)


@pytest.mark.parametrize(
    "weights", [{}, {"a": 0}, {"a": 1, "b": -1}, {"a": 1e9, "b": -1e9, "c": 1e-3}, {"a": math.nan}, {"a": math.inf, "b": 1}]
)
def test_weights_that_cannot_be_normalised(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match="a candidate needs finite weights that do not sum to 0"):
        Candidate.linear(weights)


def test_keys_round_to_a_millionth_and_know_no_negative_zero() -> None:
    third = Candidate.linear({"a": 1, "b": 1, "c": 1})
    nearly = Candidate.of({"method": "linear", "models": models(a=0.3333331, b=0.3333334, c=0.3333335)})
    assert third.key != nearly.key  # 0.333333 and 0.333334
    assert third.key == Candidate.of({"method": "linear", "models": models(a=0.3333332, b=0.3333333, c=0.3333334)}).key
    zeros = [Candidate.of({"method": "x", "models": [{"model": "a", "weight": zero}]}) for zero in (-0.0, 0.0, 0, -1e-9)]
    assert len({zero.key for zero in zeros}) == 1
    assert Candidate.of({"method": "x", "models": models(a=True)}).key != Candidate.of({"method": "x", "models": models(a=1)}).key


def test_keys_tell_everything_apart() -> None:
    def ties(density: float | None = 0.2, method: str = "ties", **weights: float) -> Candidate:
        parameters = {} if density is None else {"parameters": {"density": density, "lambda": 1.0}}
        return Candidate.of({"method": method, "base": "o", "models": models(**(weights or {"a": 0.5, "b": 0.5})), **parameters})

    found = [ties(), ties(method="linear"), ties(b=0.5, a=0.5), ties(a=0.5, b=0.500001), ties(0.3), ties(None)]
    assert len({candidate.key for candidate in found}) == 6
    assert found[0] == ties()
    assert json.loads(found[0].key)["parameters"] == {"density": 0.2, "lambda": 1}


def test_names_of_a_recipe_in_which_merges_are_inputs() -> None:
    inner = {"method": "slerp", "base": "b", "models": [{"model": "c"}], "parameters": {"t": 0.5}}
    slices = [{"models": [{"model": "d", "layers": [0, 2]}, {"model": inner, "layers": [0, 2]}], "base": "e"}]
    found = Candidate.of({"method": "ties", "base": "a", "slices": slices, "modules": {"text": {"models": [{"model": "f"}]}}})
    assert found.members == ("f", "d", "c")
    assert sorted(found.aliases) == ["a", "b", "c", "d", "e", "f"]
    assert found.alone is None
    assert found.describe() == "ties of f, d, c"
    with pytest.raises(UserError, match="method 'ties' has no list of coefficients"):
        _ = found.weights
    renamed = json.loads(found.key_over({"a": "A", "c": "C", "f": "F"}))
    assert renamed["base"] == "A"
    assert renamed["modules"] == {"text": {"models": [{"model": "F"}]}}
    nested = {"model": {**inner, "models": [{"model": "C"}]}, "layers": [0, 2]}
    assert renamed["slices"] == [{"base": "e", "models": [{"model": "d", "layers": [0, 2]}, nested]}]


def test_a_candidate_is_plain_data() -> None:
    with pytest.raises(UserError, match="plain data with finite numbers"):
        Candidate.of({"method": "linear", "models": models(a=math.nan)})
    with pytest.raises(UserError, match="plain data"):
        Candidate.of({"method": "linear", "models": {1, 2}})


names = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=5, unique=True)


@settings(max_examples=150, deadline=None)
@given(names, st.data())
def test_normalising_again_changes_nothing(members: list[str], data: st.DataObject) -> None:
    weights = {member: data.draw(st.floats(0, 1e6)) for member in members}
    if sum(weights.values()) < 1e-300:
        return
    once = Candidate.linear(weights)
    again = Candidate.linear(dict(zip(once.members, once.weights, strict=True)))
    assert (again.members, again.key) == (once.members, once.key)
    assert math.isclose(sum(once.weights), 1.0)
    assert all(weight >= 4.9e-7 for weight in once.weights)
    scaled = Candidate.linear({member: 8 * weight for member, weight in weights.items()})
    assert scaled == once


# -- scores -----------------------------------------------------------------------------------------------------------------------

SCORES = Scores({"x": {"1": 1.0, "2": 0.0, "3": 0.5}, "y": {"1": 0.25}}, ("careful",))


def test_means_count_tasks_alike() -> None:
    assert SCORES.tasks() == {"x": 0.5, "y": 0.25}
    assert SCORES.mean == 0.375


def test_only() -> None:
    found = SCORES.only(["y"])
    assert (found.items, found.warnings, found.mean) == ({"y": {"1": 0.25}}, ("careful",), 0.25)
    assert list(SCORES.only(["y", "x"]).items) == ["y", "x"]
    with pytest.raises(KeyError):
        SCORES.only(["z"])


def test_losses_are_a_mean_of_means_too() -> None:
    assert SCORES.loss is None
    assert Scores(SCORES.items, losses={"x": {"1": 1.0, "2": 2.0}, "y": {"1": 0.5}}).loss == 1.0


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3, 0.5) + Cost(10, 20, 30, 1.0) == Cost(11, 22, 33, 1.5)


def test_a_prefix_takes_the_first_items_of_each_task() -> None:
    class Three:
        def items(self, task: str) -> list[str]:
            return [f"{task}{number}" for number in (2, 0, 1)]

    plan = Plan.prefix(Three(), {"x": 2, "y": 5, "z": 0})  # type: ignore[arg-type]
    assert plan.items == {"x": ("x2", "x0"), "y": ("y2", "y0", "y1")}


# -- intervals --------------------------------------------------------------------------------------------------------------------


def coins(seed: int, chances: dict[str, float], items: dict[str, int]) -> Scores:
    """Right or wrong on every item, by chance."""
    generator = np.random.default_rng(seed)
    return Scores({task: {str(n): float(generator.random() < chances[task]) for n in range(items[task])} for task in chances})


def test_the_paired_interval_is_a_stratified_bootstrap_of_the_gaps() -> None:
    """Written down plainly: one resample after the other, item by item, with the same draws."""
    sizes = {"x": 7, "y": 3}
    a, b = coins(1, {"x": 0.8, "y": 0.5}, sizes), coins(2, {"x": 0.4, "y": 0.6}, sizes)
    resamples = 300
    generator = np.random.default_rng(5)
    drawn = {task: generator.integers(0, size, size=(resamples, size)) for task, size in sizes.items()}
    means = []
    for number in range(resamples):
        by_task = []
        for task, size in sizes.items():
            gaps = [a.items[task][str(item)] - b.items[task][str(item)] for item in drawn[task][number]]
            by_task.append(sum(gaps) / size)
        means.append(sum(by_task) / len(by_task))
    difference, low, high = paired_interval(a, b, level=0.9, resamples=resamples, seed=5)
    assert difference == a.mean - b.mean
    assert low == pytest.approx(float(np.percentile(means, 5)), abs=1e-12)
    assert high == pytest.approx(float(np.percentile(means, 95)), abs=1e-12)
    assert low < difference < high


def test_equal_scores_and_constant_gaps_have_no_width() -> None:
    a = coins(1, {"x": 0.5}, {"x": 20})
    assert paired_interval(a, a) == (0.0, 0.0, 0.0)
    better = Scores({"x": {item: value + 0.25 for item, value in a.items["x"].items()}})
    assert paired_interval(better, a) == (0.25, 0.25, 0.25)


def test_pairing_takes_the_shared_difficulty_out() -> None:
    """The gaps of the pair vary little although the items vary much: the paired interval is far narrower than either one's own."""
    generator = np.random.default_rng(0)
    hard = generator.random(50)
    a = Scores({"x": {str(n): float(value) for n, value in enumerate(hard)}})
    b = Scores({"x": {str(n): float(value) - 0.05 + 0.01 * generator.random() for n, value in enumerate(hard)}})
    _, low, high = paired_interval(a, b)
    own = interval(a)
    assert 0 < low < high < 0.06
    assert high - low < 0.05 * (own[1] - own[0])


def test_the_order_of_the_second_ones_items_does_not_matter() -> None:
    a, b = coins(1, {"x": 0.6}, {"x": 12}), coins(2, {"x": 0.4}, {"x": 12})
    turned = Scores({"x": dict(reversed(b.items["x"].items()))})
    assert paired_interval(a, turned) == paired_interval(a, b)


def test_swapping_the_two_mirrors_the_interval() -> None:
    a, b = coins(1, {"x": 0.7, "y": 0.3}, {"x": 15, "y": 9}), coins(2, {"x": 0.4, "y": 0.4}, {"x": 15, "y": 9})
    difference, low, high = paired_interval(a, b)
    assert paired_interval(b, a) == pytest.approx((-difference, -high, -low), abs=1e-12)


def test_a_higher_level_is_wider_and_a_seed_is_all_the_chance_there_is() -> None:
    a, b = coins(1, {"x": 0.7}, {"x": 40}), coins(2, {"x": 0.4}, {"x": 40})
    widths = [paired_interval(a, b, level=level) for level in (0.5, 0.8, 0.95)]
    assert all(inner[1] > outer[1] and inner[2] < outer[2] for inner, outer in itertools.pairwise(widths))
    smooth = Scores({"x": {item: value + 0.001 * int(item) ** 0.5 for item, value in a.items["x"].items()}})
    assert paired_interval(smooth, b, seed=3) == paired_interval(smooth, b, seed=3)
    assert paired_interval(smooth, b, seed=3) != paired_interval(smooth, b, seed=4)


def test_the_interval_of_one_result() -> None:
    a = coins(3, {"x": 0.7, "y": 0.2}, {"x": 30, "y": 10})
    low, high = interval(a)
    assert 0 <= low < a.mean < high <= 1
    zero = Scores({task: dict.fromkeys(values, 0.0) for task, values in a.items.items()})
    assert (low, high) == paired_interval(a, zero)[1:]


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 300 experiments with a known difference, 95 % intervals should hold it in 285; percentile bootstraps fall a little short."""
    chances_a, chances_b, sizes = {"x": 0.7, "y": 0.5}, {"x": 0.6, "y": 0.5}, {"x": 60, "y": 40}
    held = 0
    for number in range(300):
        a, b = coins(2 * number, chances_a, sizes), coins(2 * number + 1, chances_b, sizes)
        _, low, high = paired_interval(a, b, resamples=300, seed=number)
        held += low <= 0.05 <= high
    assert 268 <= held <= 297


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": {"1": 1.0}}, "task 'x': the two results were not scored on the same items"),
        ({"x": {"1": 1.0, "3": 0.0}}, "task 'x': the two results were not scored on the same items"),
        ({"y": {"1": 1.0, "2": 0.0}}, r"different tasks \(x and y\)"),
        ({"x": {"1": 1.0, "2": 0.0}, "y": {"1": 1.0}}, r"different tasks \(x and x, y\)"),
        ({}, "different tasks"),
    ],
)
def test_what_cannot_be_paired(other: dict[str, dict[str, float]], message: str) -> None:
    a = Scores({"x": {"1": 1.0, "2": 0.0}})
    with pytest.raises(UserError, match=message):
        paired_interval(a, Scores(other))
    with pytest.raises(UserError, match="cannot be paired"):
        paired_interval(Scores(other), a)
