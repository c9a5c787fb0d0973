"""Quadratic surrogates of a few scored merges, the front that they promise, and where they want to see more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.search.nsga import Nsga, maximise
from modelglue.search.pareto import dominates, hypervolume
from modelglue.search.randomness import rng
from modelglue.search.surrogate import (
    LINKS,
    Quadratic,
    coefficient_count,
    design_matrix,
    first_points,
    fit,
    fit_from_ones,
    poor_fits,
    preferred,
    surrogate_front,
)
from modelglue.search.surrogate_design import (
    bin_scores,
    bins_per_angle,
    cartesian,
    closest_pair,
    hyperspherical,
    joined,
    leaves,
    next_points,
)


def link(name: str, z: np.ndarray) -> np.ndarray:
    return {"identity": z, "softplus": np.log1p(np.exp(z)), "sigmoid": 1 / (1 + np.exp(-z))}[name]


def test_order_of_coefficients() -> None:
    assert design_matrix([[2.0, 3.0, 5.0]]).tolist() == [[4, 9, 25, 6, 10, 15, 2, 3, 5, 1]]
    assert [coefficient_count(models) for models in (1, 2, 3)] == [3, 6, 10]
    q = Quadratic(np.array([1.0, 0, 0, 0, 0, -1.0]), "identity", 1.0)
    assert q([[3.0, 7.0]]).tolist() == [8.0]


@pytest.mark.parametrize("name", LINKS)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(0, 1000))
def test_a_quadratic_is_recovered_where_there_is_no_noise(name: str, models: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = first_points(models, 3 * coefficient_count(models), seed)
    truth = generator.uniform(-2, 2, coefficient_count(models))
    y = link(name, design_matrix(points) @ truth)
    found = fit(points, y, name)  # type: ignore[arg-type]
    np.testing.assert_allclose(found(points), y, atol=2e-3)
    assert found.r2 > 0.99
    fresh = generator.random((20, models))
    np.testing.assert_allclose(found(fresh), link(name, design_matrix(fresh) @ truth), atol=2e-2)


def test_steep_tasks_are_fitted() -> None:
    """Accuracies from 0.0001 to 0.3, most of them where the sigmoid is flat."""
    points = first_points(2, 20)
    y = link("sigmoid", design_matrix(points) @ np.array([-14.0, -12.0, 3.0, 9.0, 8.0, -4.0]))
    found = fit(points, y, "sigmoid")
    assert found.r2 > 0.99
    np.testing.assert_allclose(found(points), y, atol=2e-3)


def test_official_fit_finds_a_plain_optimum() -> None:
    points = first_points(2, 20)
    truth = np.array([-2.0, -1.5, 0.3, 2.0, 1.5, -1.0])
    np.testing.assert_allclose(fit_from_ones(points, design_matrix(points) @ truth, "identity"), truth, atol=1e-8)


@pytest.mark.parametrize("name", LINKS)
def test_a_constant_metric_gives_a_constant(name: str) -> None:
    found = fit(first_points(2, 12), np.full(12, 0.4), name)  # type: ignore[arg-type]
    assert found.r2 == 1
    np.testing.assert_allclose(found([[0.1, 0.9], [5.0, -3.0]]), 0.4)


@pytest.mark.parametrize(("name", "y"), [("sigmoid", [0.0, 1.0] * 5), ("softplus", [0.0, 30.0] * 5)])
def test_metrics_at_the_ends_of_their_range_are_fitted(name: str, y: list[float]) -> None:
    found = fit(first_points(1, 10), y, name)  # type: ignore[arg-type]
    assert np.isfinite(found.coefficients).all()


def test_noise_is_told_by_points_that_were_left_out() -> None:
    points = first_points(3, 20)
    found = fit(points, np.random.default_rng(0).random(20), "sigmoid")
    assert found.r2 < 0.5
    good = Quadratic(np.zeros(10), "sigmoid", 0.9)
    assert poor_fits([good, found]) == [1]
    with pytest.raises(UserError, match=r"surrogates of task 1 \(R\^2 .*more points"):
        surrogate_front([good, found], np.zeros(3), np.ones(3))


def test_leave_one_out_is_what_it_says() -> None:
    """Identity link: each point predicted by the least squares fit to the others."""
    points = first_points(1, 8)
    y = np.random.default_rng(1).random(8)
    X = design_matrix(points)
    predicted = []
    for number in range(8):
        rest = np.arange(8) != number
        predicted.append(X[number] @ np.linalg.solve(X[rest].T @ X[rest] + 1e-6 * np.eye(3), X[rest].T @ y[rest]))
    r2 = 1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert fit(points, y, "identity").r2 == pytest.approx(r2, abs=1e-5)


def test_faults_of_a_fit_are_named() -> None:
    with pytest.raises(UserError, match="5 points for a quadratic with 6 coefficients"):
        fit(np.random.default_rng(0).random((5, 2)), np.zeros(5), "identity")
    with pytest.raises(UserError, match="one finite number per point"):
        fit(first_points(1, 4), [0.0, 1.0, np.nan, 2.0], "identity")
    with pytest.raises(UserError, match="allowed are sigmoid"):
        fit(first_points(1, 4), np.zeros(4), "logit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="allowed is 6 or more"):
        first_points(2, 5)


def test_first_points_are_each_model_alone_and_then_spread() -> None:
    points = first_points(3, 24, seed=5)
    assert points[:3].tolist() == np.eye(3).tolist()
    assert ((points >= 0) & (points <= 1)).all()
    assert len(np.unique(points, axis=0)) == 24
    np.testing.assert_array_equal(points, first_points(3, 24, seed=5))
    halves = (points[3:19] < 0.5).sum(axis=0)
    assert halves.tolist() == [8, 8, 8]  # Sobol: every half of every axis has half of 16 points
    assert first_points(1, 3).shape == (3, 1)


# -- fronts ----------------------------------------------------------------------------------------------------------------------


def quadratic_tasks(count: int) -> list[Quadratic]:
    """Task k is best where model k has all the weight: 0.9 - |c - e_k|^2 / 2, sigmoid of it."""
    found = []
    for task in range(count):
        linear = np.where(np.arange(count) == task, 1.0, 0.0)
        products = np.zeros(count * (count - 1) // 2)
        found.append(Quadratic(np.concatenate([np.full(count, -0.5), products, linear, [0.4]]), "sigmoid", 1.0))
    return found


def test_front_points_do_not_dominate_each_other_and_stay_in_the_box() -> None:
    tasks = quadratic_tasks(3)
    points, values = surrogate_front(tasks, np.zeros(3), np.ones(3), population=60, generations=30)
    assert len(points) > 20
    assert ((points >= 0) & (points <= 1)).all()
    assert not any(dominates(a, b) for a in values for b in values)
    np.testing.assert_allclose(values, np.stack([task(points) for task in tasks], axis=1))


def test_front_of_one_task_is_its_best_point() -> None:
    points, _ = surrogate_front([Quadratic(np.array([-1.0, 0.6, 0.0]), "identity", 1.0)], [0.0], [1.0], population=20, generations=30)
    np.testing.assert_allclose(points, [[0.3]], atol=1e-3)


def test_thirty_evaluations_and_a_surrogate_reach_what_three_hundred_do() -> None:
    """Hypervolume on the true tasks: MAP with 30 scored points at least 90% of NSGA-II with 300."""
    tasks = quadratic_tasks(3)
    noise = np.random.default_rng(3)

    def score(points: np.ndarray) -> np.ndarray:
        return np.stack([task(points) for task in tasks], axis=1)

    design = first_points(3, 25)
    observed = score(design) + noise.normal(0, 0.005, (25, 3))
    front, _ = surrogate_front(
        [fit(design, column, "sigmoid") for column in observed.T], np.zeros(3), np.ones(3), population=40, generations=40
    )
    chosen = front[np.linspace(0, len(front) - 1, 5).astype(int)]
    ours = hypervolume(score(np.concatenate([design, chosen])), [0.3] * 3)
    search = Nsga(np.zeros(3), np.ones(3), 20, seed=1)
    _, theirs = maximise(score, search, 15)
    assert ours > 0.9 * hypervolume(theirs, [0.3] * 3)


def test_more_points_do_not_make_the_front_worse() -> None:
    """Verified hypervolume of fronts from 12, 24 and 48 noisy points: equal to within the noise, or growing."""
    tasks = quadratic_tasks(2)
    noise = np.random.default_rng(8)
    volumes = []
    for count in (12, 24, 48):
        design = first_points(2, count)
        scores = np.stack([task(design) for task in tasks], axis=1) + noise.normal(0, 0.005, (count, 2))
        front, _ = surrogate_front([fit(design, column, "sigmoid") for column in scores.T], [0, 0], [1, 1], population=40, generations=30)
        volumes.append(hypervolume(np.stack([task(front) for task in tasks], axis=1), [0.3, 0.3]))
    assert volumes[1] > volumes[0] - 0.002
    assert volumes[2] > volumes[1] - 0.002


def test_preference_chooses() -> None:
    front = [[1.0, 0.0], [0.7, 0.7], [0.0, 1.0]]
    assert [preferred(front, p) for p in ([1, 0], [1, 1], [0, 5], [10, 1])] == [0, 1, 2, 0]
    with pytest.raises(UserError, match="other than 0"):
        preferred(front, [0, 0])


# -- directions ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=6))
def test_hyperspherical_coordinates_there_and_back(points: list[list[float]]) -> None:
    radius, angles = hyperspherical(points)
    np.testing.assert_allclose(cartesian(radius, angles), points, atol=1e-12)
    np.testing.assert_allclose(radius, np.linalg.norm(points, axis=1))
    assert ((angles >= 0) & (angles <= np.pi / 2)).all()


def test_hyperspherical_coordinates_keep_signs() -> None:
    points = np.array([[0.5, -0.5], [-1.0, -2.0], [0.0, 0.0]])
    np.testing.assert_allclose(cartesian(*hyperspherical(points)), points, atol=1e-12)
    assert [bins_per_angle(models) for models in (2, 3, 4)] == [4, 4, 2]


def test_bins_with_large_residuals_score_high_and_empty_ones_as_the_highest() -> None:
    angle = np.repeat([0.1, 0.5, 0.9], 5)  # bins 0, 1 and 2 of 4
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    residuals = np.repeat([0.1, 0.5, 0.0], 5)
    np.testing.assert_allclose(bin_scores(points, residuals, rng(0)), [0.1, 0.5, 0.0, 0.5])
    spread = bin_scores(points, np.tile([0.0, 0.0, 0.0, 0.0, 1.0], 3), rng(0))
    assert (spread[:3] > 0.2).all()
    assert (spread[:3] < 0.2 + 0.5 * 0.25).all()


def test_next_points_go_where_the_surrogate_errs() -> None:
    angle = np.linspace(0.05, 1.5, 20)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    residuals = np.where(angle < np.pi / 8, 1.0, 0.0)
    chosen = next_points(points, residuals, 50, rng(1))
    radius, angles = hyperspherical(chosen)
    assert ((radius >= 0.2) & (radius <= 0.8)).all()
    assert (angles[:, 0] < np.pi / 8).mean() > 0.95
    assert next_points(np.random.default_rng(0).random((9, 4)), np.zeros(9), 7, rng(1)).shape == (7, 4)


# -- nested ----------------------------------------------------------------------------------------------------------------------


def test_nested_pairs_end_in_one_merge() -> None:
    nodes = leaves([0.9, 0.5, 0.6, 0.1], [1, 2, 3, 4])
    assert closest_pair([node.score for node in nodes]) == (1, 2)
    nodes = joined(nodes, (1, 2), (0.25, 0.5), 0.8)
    assert [node.score for node in nodes] == [0.9, 0.8, 0.1]
    nodes = joined(nodes, closest_pair([node.score for node in nodes]), (1.0, 2.0), 0.95)
    nodes = joined(nodes, (0, 1), (0.5, 0.3), 1.0)
    assert len(nodes) == 1
    np.testing.assert_allclose(nodes[0].scalings, [0.5, 0.25, 0.5, 0.3])
    assert nodes[0].preference == 10


def test_ties_and_faults_of_pairs() -> None:
    assert closest_pair([0.5, 0.5, 0.5]) == (0, 1)
    with pytest.raises(UserError, match="two scores"):
        closest_pair([0.5])
    with pytest.raises(UserError, match="two positions in order"):
        joined(leaves([0.1, 0.2]), (1, 0), (0.5, 0.5), 0.3)
    with pytest.raises(UserError, match="1 preferences for 2 models"):
        leaves([0.1, 0.2], [1.0])
