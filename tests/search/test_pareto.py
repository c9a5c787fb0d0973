"""Dominance, fronts, crowding, reference directions, hypervolume, and the two evolutionary searches on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.search.nsga import Nsga, Variation, maximise, polynomial_mutation, sbx, survivors_by_crowding, survivors_by_niche
from modelglue.search.pareto import crowding, dominates, fronts, hypervolume, non_dominated, reference_directions
from modelglue.search.randomness import draw, permutation, rng

POINTS = st.integers(1, 3).flatmap(
    lambda count: st.lists(st.lists(st.integers(0, 4).map(float), min_size=count, max_size=count), min_size=1, max_size=14)
)


# -- randomness ------------------------------------------------------------------------------------------------------------------


def test_random_numbers_depend_on_their_words_alone() -> None:
    """Frozen: a stored search is replayed by later versions."""
    assert rng(0, "nsga", 3, 1).random(3).tolist() == pytest.approx([0.2215687870248908, 0.8585437079259189, 0.3724764628192423], abs=0)
    assert rng(0, "nsga", 3, 1).random() != rng(0, "nsga", 31).random()


def test_draws_and_permutations() -> None:
    generator = rng("draws")
    assert {draw(generator, 3) for _ in range(60)} == {0, 1, 2}
    assert sorted(permutation(generator, 9)) == list(range(9))


# -- fronts ----------------------------------------------------------------------------------------------------------------------


def test_larger_dominates() -> None:
    assert dominates([2, 1], [1, 1])
    assert not dominates([1, 1], [1, 1])
    assert not dominates([2, 0], [1, 1])


def test_fronts_of_a_picture() -> None:
    values = [[3, 1], [1, 3], [2, 2], [1, 1], [2, 1], [2, 2]]
    assert [front.tolist() for front in fronts(values)] == [[0, 1, 2, 5], [4], [3]]
    assert non_dominated(values).tolist() == [0, 1, 2, 5]


@given(POINTS)
@settings(max_examples=30, deadline=None)
def test_fronts_are_what_is_left_when_the_better_ones_are_gone(values: list[list[float]]) -> None:
    found = [front.tolist() for front in fronts(values)]
    left = list(range(len(values)))
    for front in found:
        assert front == [one for one in left if not any(dominates(values[other], values[one]) for other in left)]
        left = [one for one in left if one not in front]
    assert left == []


def test_crowding_of_a_picture() -> None:
    found = crowding([[0, 10], [2, 6], [3, 5], [10, 0]])
    assert found.tolist() == [np.inf, pytest.approx(3 / 10 + 5 / 10), pytest.approx(8 / 10 + 6 / 10), np.inf]
    assert crowding([[1, 1], [2, 2]]).tolist() == [np.inf, np.inf]
    assert crowding([[1.0, 5.0]] * 4).tolist() == [np.inf, 0, 0, np.inf]  # a constant objective says nothing


def test_objectives_are_checked() -> None:
    with pytest.raises(UserError, match="NaN"):
        fronts([[np.nan, 1.0]])
    with pytest.raises(UserError, match="objectives of shape"):
        fronts([1.0, 2.0])


# -- reference directions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objectives", "divisions", "count"), [(2, 4, 5), (3, 12, 91), (4, 3, 20), (1, 5, 1)])
def test_reference_directions_cover_the_simplex(objectives: int, divisions: int, count: int) -> None:
    found = reference_directions(objectives, [divisions])
    assert found.shape == (count, objectives)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose((found * divisions).round() / divisions, found)


def test_layers_shrink_to_the_centre() -> None:
    found = reference_directions(3, [2, 1], [1.0, 0.5])
    assert len(found) == 6 + 3
    inner = found[found.min(axis=1) > 0]
    np.testing.assert_allclose(inner, 0.5 * np.eye(3) + 1 / 6, atol=1e-12)


# -- hypervolume -----------------------------------------------------------------------------------------------------------------


def test_hypervolume_of_a_picture() -> None:
    assert hypervolume([[3, 1], [1, 3], [2, 2]], [0, 0]) == 6
    assert hypervolume([[3, 1], [1, 3], [2, 2], [1, 1], [5, -1]], [0, 0]) == 6
    assert hypervolume([[1, 1, 1], [2, 0.5, 1]], [0, 0, 0]) == 1.5
    assert hypervolume([[2.0], [3.0]], [1.0]) == 2
    assert hypervolume([[0, 5]], [0, 0]) == 0
    with pytest.raises(UserError, match="allowed are 1 to 3"):
        hypervolume([[1, 1, 1, 1]], [0, 0, 0, 0])


@given(POINTS)
@settings(max_examples=30, deadline=None)
def test_hypervolume_counts_the_unit_cubes_below(values: list[list[float]]) -> None:
    """Whole-number points cover whole unit cubes."""
    F = np.array(values)
    corners = np.stack(np.meshgrid(*[np.arange(4)] * F.shape[1], indexing="ij"), axis=-1).reshape(-1, F.shape[1])
    covered = sum(bool((corner + 1 <= F).all(axis=1).any()) for corner in corners)
    assert hypervolume(F, np.zeros(F.shape[1])) == pytest.approx(covered)


# -- variation -------------------------------------------------------------------------------------------------------------------

BOX = (np.array([0.0, -1.0, 2.0]), np.array([1.0, 1.0, 2.0]))


@given(st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_children_stay_in_the_box(seed: int) -> None:
    low, high = BOX
    generator = rng(seed)
    a, b = (low + generator.random(3) * (high - low) for _ in range(2))
    variation = Variation(crossover=1.0, mutation=1.0)
    for child in sbx(a, b, low, high, variation, generator):
        assert ((child >= low) & (child <= high)).all()
        moved = polynomial_mutation(child, low, high, variation, generator)
        assert ((moved >= low) & (moved <= high)).all()
        assert moved[2] == 2.0


def test_crossover_keeps_the_middle_and_is_sometimes_left_out() -> None:
    """Far from the bounds SBX is symmetric: the children's mean is the parents' mean, coordinate by coordinate."""
    low, high = np.full(4, -1e6), np.full(4, 1e6)
    a, b = np.array([0.0, 1.0, 5.0, 2.0]), np.array([1.0, 0.0, 5.0, 4.0])
    changed = 0
    for number in range(200):
        first, second = sbx(a, b, low, high, Variation(crossover=0.9), rng(number))
        np.testing.assert_allclose(first + second, a + b, atol=1e-4)
        changed += bool((first != a).any() and (first != b).any())
    assert 140 < changed < 200
    assert all(np.array_equal(sbx(a, b, low, high, Variation(crossover=0.0), rng(number))[0], a) for number in range(20))


def test_spread_of_crossover_follows_its_index() -> None:
    """Density of the spread factor beta below 1 is (eta + 1) beta^eta / 2: half of the crossed children stand between the parents."""
    low, high = np.full(1, -1e9), np.full(1, 1e9)
    children = [sbx(np.zeros(1), np.ones(1), low, high, Variation(1.0, crossover_eta=2.0), rng(number))[0][0] for number in range(4000)]
    spread = np.array([abs(1 - 2 * child) for child in children if child not in (0.0, 1.0)])
    assert abs((spread < 1).mean() - 0.5) < 0.03
    assert abs((spread[spread < 1] < 0.5).mean() - 0.5**3) < 0.03


def test_mutation_moves_one_coordinate_on_average_and_mostly_little() -> None:
    low, high = np.zeros(10), np.ones(10)
    moved = np.stack([polynomial_mutation(np.full(10, 0.5), low, high, Variation(), rng(number)) for number in range(600)])
    assert abs((moved != 0.5).sum(axis=1).mean() - 1) < 0.15
    steps = np.abs(moved[moved != 0.5] - 0.5)
    assert steps.mean() < 0.06
    assert steps.max() > 0.06


# -- survival --------------------------------------------------------------------------------------------------------------------


def test_crowded_points_go_first() -> None:
    values = np.array([[0.0, 10.0], [5.0, 5.0], [5.1, 4.9], [5.2, 4.8], [10.0, 0.0], [1.0, 1.0]])
    assert sorted(survivors_by_crowding(values, 4).tolist()) == [0, 1, 3, 4]
    assert sorted(survivors_by_crowding(values, 6).tolist()) == [0, 1, 2, 3, 4, 5]


def test_niches_are_filled_evenly() -> None:
    """Nine points along one direction, one along each of the others: those two survive."""
    near = [[1 - 0.001 * step, 0.001 * step, 0.0] for step in range(9)]
    values = -np.array([*near, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    kept = survivors_by_niche(values, 4, np.eye(3), rng(0))
    assert {9, 10} <= set(kept.tolist())
    assert len(set(kept.tolist())) == 4


@given(POINTS, st.integers(1, 14))
@settings(max_examples=30, deadline=None)
def test_better_fronts_survive_first(values: list[list[float]], count: int) -> None:
    F = np.array(values)
    count = min(count, len(F))
    ranks = {int(one): number for number, front in enumerate(fronts(F)) for one in front}
    best = sorted(ranks[one] for one in range(len(F)))[:count]
    directions = reference_directions(F.shape[1], [3])
    for kept in (survivors_by_crowding(F, count), survivors_by_niche(F, count, directions, rng(1))):
        assert len(set(kept.tolist())) == count
        assert sorted(ranks[int(one)] for one in kept) == best


# -- the searches ----------------------------------------------------------------------------------------------------------------


def sphere(x: np.ndarray) -> np.ndarray:
    """DTLZ2 with three objectives: the front is an eighth of the unit sphere."""
    g = ((x[:, 2:] - 0.5) ** 2).sum(axis=1) + 1
    a, b = x[:, 0] * np.pi / 2, x[:, 1] * np.pi / 2
    return -np.stack([g * np.cos(a) * np.cos(b), g * np.cos(a) * np.sin(b), g * np.sin(a)], axis=1)


def test_nsga2_reaches_a_known_front() -> None:
    """ZDT1: f2 = 1 - sqrt(f1)."""

    def zdt1(x: np.ndarray) -> np.ndarray:
        g = 1 + 9 * x[:, 1:].mean(axis=1)
        return -np.stack([x[:, 0], g * (1 - np.sqrt(x[:, 0] / g))], axis=1)

    points, values = maximise(zdt1, Nsga(np.zeros(6), np.ones(6), 40, seed=1), 80)
    assert hypervolume(values, [-1.1, -1.1]) > 0.97 * (1.21 - 1 / 3)
    assert all(not dominates(a, b) for a in values for b in values)
    np.testing.assert_array_equal(zdt1(points), values)


def test_nsga3_spreads_better_over_three_objectives() -> None:
    volumes = []
    for directions in (None, reference_directions(3, [9])):
        search = Nsga(np.zeros(5), np.ones(5), 56, seed=2, directions=directions)
        volumes.append(hypervolume(maximise(sphere, search, 60)[1], [-1.1] * 3))
    assert volumes[1] > volumes[0]
    assert volumes[1] > 0.88 * (1.331 - np.pi / 6)


def test_one_objective_is_a_genetic_algorithm() -> None:
    search = Nsga(np.zeros(4), np.ones(4), 20, seed=3)
    points, values = maximise(lambda x: -((x - 0.3) ** 2).sum(axis=1, keepdims=True), search, 40)
    assert len(values) == 1
    np.testing.assert_allclose(points[0], 0.3, atol=0.02)


@pytest.mark.parametrize("directions", [None, [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]])
def test_a_search_is_replayed_from_what_it_was_told(directions: list[list[float]] | None) -> None:
    def told(generations: int) -> Nsga:
        search = Nsga(np.zeros(3), np.ones(3), 6, seed=5, directions=directions)
        for _ in range(generations):
            search.tell(np.stack([search.ask()[:, 0], 1 - search.ask()[:, 0] ** 2], axis=1))
        return search

    one, again = told(4), told(4)
    np.testing.assert_array_equal(one.ask(), again.ask())
    np.testing.assert_array_equal(one.ask(), one.ask())
    assert not np.array_equal(one.ask(), told(3).ask())


def test_given_points_come_first_and_failures_last() -> None:
    search = Nsga([0.0], [1.0], 4, start=[[0.25], [7.0]])
    assert search.ask()[:2].tolist() == [[0.25], [1.0]]
    search.tell([[1.0], [np.nan], [2.0], [np.nan]])
    search.tell([[3.0], [4.0], [np.nan], [np.nan]])
    assert search.values is not None
    assert sorted(search.values[:, 0].tolist()) == [1.0, 2.0, 3.0, 4.0]


def test_faults_of_a_search_are_named() -> None:
    with pytest.raises(UserError, match="needs a box"):
        Nsga([1.0], [0.0], 4)
    with pytest.raises(UserError, match="population of 1"):
        Nsga([0.0], [1.0], 1)
    with pytest.raises(UserError, match=r"allowed is \[points, 1\]"):
        Nsga([0.0], [1.0], 2, start=[[0.0, 1.0]])
    search = Nsga([0.0], [1.0], 2)
    with pytest.raises(UserError, match="no front"):
        search.front()
    with pytest.raises(UserError, match="for 2 points"):
        search.tell([[1.0]])
