"""Racing: the schedule, the paired comparison, and what giving up costs and saves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.recipe import Scores
from modelglue.search.objective import Objective
from modelglue.search.racing import Crowd, compare, leader_of, schedule

MEAN = Objective()
few = settings(max_examples=30, deadline=None)


def scores(**tasks: list[float]) -> Scores:
    return Scores({task: {str(number): value for number, value in enumerate(values)} for task, values in tasks.items()})


@few
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 300), min_size=1), st.integers(1, 60))
def test_the_schedule_grows_in_step_to_the_end(sizes: dict[str, int], chunk: int) -> None:
    rounds = schedule(sizes, chunk)
    assert rounds[-1] == sizes
    assert len(rounds) <= math.ceil(sum(sizes.values()) / chunk)
    before = dict.fromkeys(sizes, 0)
    for counts in rounds:
        assert all(before[task] <= counts[task] <= sizes[task] for task in sizes)
        assert counts != before
        share = sum(counts.values()) / sum(sizes.values())
        assert all(abs(counts[task] - size * share) <= len(sizes) + 1 for task, size in sizes.items())
        before = counts


def test_a_task_of_one_item_is_there_from_the_first_round() -> None:
    assert schedule({"a": 1, "b": 99})[0] == {"a": 1, "b": 25}
    assert schedule({"*": 1}) == [{"*": 1}]


def test_before_fifty_items_an_exact_sign_test_decides() -> None:
    """Five losses and no win: 1/32 < 5 %. Four losses: 1/16. What is equal says nothing."""
    for losses, behind in ((4, False), (5, True)):
        a = scores(t=[0.0] * losses + [1.0] * 20)
        b = scores(t=[1.0] * losses + [1.0] * 20)
        assert compare(a, b, MEAN).behind is behind
    lost, won = [0.0] * 7 + [1.0], [1.0] * 7 + [0.0]  # seven losses to one win: 9 / 256 < 5 %
    assert compare(scores(t=lost), scores(t=won), MEAN).behind
    assert not compare(scores(t=won), scores(t=lost), MEAN).behind
    assert not compare(scores(t=[0.0] * 6 + [1.0]), scores(t=[1.0] * 6 + [0.0]), MEAN).behind  # 8 / 128


def test_from_fifty_items_the_upper_bound_of_the_paired_mean_decides() -> None:
    a = [0.0] * 30 + [1.0] * 30
    b = [1.0] * 20 + [0.0] * 10 + [1.0] * 30
    gap = compare(scores(t=a), scores(t=b), MEAN)
    gaps = np.array(a) - np.array(b)
    assert gap.difference == pytest.approx(gaps.mean())
    assert gap.upper == pytest.approx(gaps.mean() + 1.6448536 * gaps.std(ddof=1) / math.sqrt(60))
    assert gap.behind


def test_tasks_count_as_the_objective_has_it() -> None:
    a, b = scores(x=[0.0] * 40, y=[1.0] * 40), scores(x=[1.0] * 40, y=[0.0] * 40)
    assert compare(a, b, MEAN).difference == 0
    assert not compare(a, b, MEAN).behind
    heavy = Objective("weighted", {"x": 3.0, "y": 1.0})
    assert compare(a, b, heavy).difference == pytest.approx(-0.5)
    assert compare(a, b, heavy).behind


def test_only_common_items_are_compared() -> None:
    a, b = scores(t=[1.0, 0.0]), scores(t=[1.0, 1.0, 1.0, 1.0])
    assert compare(a, b, MEAN).difference == -0.5


def test_the_leader_leads_on_what_all_have_scored() -> None:
    standing = [(7, scores(t=[1.0, 1.0, 0.0, 0.0])), (8, scores(t=[1.0, 1.0])), (9, scores(t=[0.0, 1.0]))]
    assert leader_of(standing, MEAN) == 0  # 7 and 8 are equal on the first two items
    assert leader_of(standing[1:], MEAN) == 0


def test_equally_good_candidates_are_seldom_given_up() -> None:
    """Under no difference, comparing after every chunk of 200 items errs in less than a quarter of the races."""
    generator = np.random.default_rng(0)
    lost = 0
    for _ in range(200):
        a, b = (generator.random(200) < 0.6).astype(float), (generator.random(200) < 0.6).astype(float)
        lost += any(compare(scores(t=list(a[:n])), scores(t=list(b)), MEAN).behind for n in range(25, 200, 25))
    assert lost < 50


def test_what_is_scored_already_is_certain() -> None:
    """Of 120 items 60 are known: the bound is as wide as the other 60 allow, and after all of them there is none."""
    a, b = [0.0] * 30 + [1.0] * 30, [1.0] * 10 + [0.0] * 10 + [1.0] * 40
    endless = compare(scores(t=a), scores(t=b), MEAN)
    half = compare(scores(t=a), scores(t=b), MEAN, {"t": 120})
    assert half.difference == endless.difference == pytest.approx(-1 / 3)
    assert half.upper - half.difference == pytest.approx((endless.upper - endless.difference) * math.sqrt(0.5))
    done = compare(scores(t=a), scores(t=b), MEAN, {"t": 60})
    assert done.upper == done.difference < 0


def test_a_candidate_is_compared_with_the_crowd_where_that_says_more() -> None:
    """The leader is better by luck on odd items; the crowd answers as the candidate does, so the leader's mean alone matters."""
    generator = np.random.default_rng(1)
    hard = (generator.random(200) < 0.5).astype(float)
    leader = np.where(generator.random(200) < 0.3, 1.0, hard)
    crowd = Crowd()
    for _ in range(4):
        crowd.add(scores(t=list(hard)))
    candidate = scores(t=list(hard[:60]))
    direct = compare(candidate, scores(t=list(leader)), MEAN, {"t": 200})
    gap = compare(candidate, scores(t=list(leader)), MEAN, {"t": 200}, crowd.scores)
    assert gap.difference == gap.upper == pytest.approx(hard.mean() - leader.mean())
    assert direct.upper > direct.difference
    again = compare(candidate, scores(t=list(leader[:60])), MEAN, {"t": 200}, crowd.scores)  # a leader that is not whole
    assert again.upper > again.difference


@few
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=40))
def test_the_whole_difference_is_what_a_whole_candidate_is_estimated_at(pairs: list[tuple[float, float]]) -> None:
    """Whatever the crowd, an estimate after all items is the difference itself."""
    mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    crowd = Crowd()
    crowd.add(scores(t=theirs))
    crowd.add(scores(t=[1.0] * len(pairs)))
    gap = compare(scores(t=mine), scores(t=theirs), MEAN, {"t": len(pairs)}, crowd.scores)
    assert gap.difference == pytest.approx(np.mean(mine) - np.mean(theirs))
    assert gap.upper == gap.difference
