"""Abilities, item parameters and the accuracies that are estimated from a few answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.search.estimators import (
    Estimator,
    Extract,
    anchor_extract,
    balance_weights,
    gpirt_share,
    item_vectors,
    pirt,
    random_extract,
    weighted_mean,
)
from modelglue.search.item_fit import binarised, choose_dimensions, fit_items
from modelglue.search.item_response import ItemParameters, fit_ability, fit_mixture, negative_log_likelihood, probabilities
from modelglue.search.randomness import rng


def some_items(count: int, dimensions: int, seed: int) -> ItemParameters:
    generator = np.random.default_rng(seed)
    return ItemParameters(np.exp(generator.normal(0, 0.4, (count, dimensions))), generator.normal(0, 1, (count, dimensions)) / dimensions)


def answers(items: ItemParameters, ability: np.ndarray, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(items)) < probabilities(items, ability)).astype(np.float64)


# -- the curve -------------------------------------------------------------------------------------------------------------------


def test_probability_of_the_two_parameter_logistic_model() -> None:
    items = ItemParameters(np.array([[2.0, 0.5], [1.0, 1.0]]), np.array([[1.0, -0.5], [0.25, 0.25]]))
    expected = 1 / (1 + np.exp(-np.array([2 * 0.3 - 1 + 0.5 * -0.2 + 0.5, 0.3 - 0.2 - 0.5])))
    np.testing.assert_allclose(probabilities(items, [0.3, -0.2]), expected, rtol=1e-14)


def test_one_difficulty_counts_once_per_dimension() -> None:
    a = np.array([[1.0, 2.0, 0.5]])
    one, three = ItemParameters(a, np.array([[0.4]])), ItemParameters(a, np.full((1, 3), 0.4))
    assert probabilities(one, [0.1, 0.2, 0.3]) == probabilities(three, [0.1, 0.2, 0.3])


def test_every_dimension_is_clipped_for_itself() -> None:
    items = ItemParameters(np.array([[1.0, 1.0]]), np.zeros((1, 2)))
    np.testing.assert_allclose(probabilities(items, [100.0, -29.0]), [1 / (1 + np.exp(-1.0))])


@pytest.mark.parametrize(
    ("a", "b"), [((3, 2), (3, 3)), ((3, 2), (2, 2)), ((3,), (3, 1))], ids=["more difficulties", "fewer items", "no dimensions"]
)
def test_parameters_must_fit_each_other(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"allowed are discriminations \[items, D\]"):
        ItemParameters(np.ones(a), np.ones(b))


def test_parameters_must_be_finite() -> None:
    with pytest.raises(UserError, match="NaN or infinity"):
        ItemParameters(np.array([[np.nan]]), np.zeros((1, 1)))


# -- abilities -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 10_000))
def test_the_fitted_ability_is_the_likeliest(dimensions: int, seed: int) -> None:
    items = some_items(60, dimensions, seed)
    generator = np.random.default_rng(seed)
    y = answers(items, generator.normal(size=dimensions), seed + 1)
    found = fit_ability(y, items)
    best = negative_log_likelihood(y, items, found)
    assume(best > 0.1)  # below, the answers can be separated, the likelihood has no maximum, and a prior decides
    for _ in range(20):
        assert best <= negative_log_likelihood(y, items, found + generator.normal(0, 0.3, dimensions)) + 1e-7


@pytest.mark.parametrize("right", [0.0, 1.0])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_equal_answers_give_a_finite_ability(right: float, dimensions: int) -> None:
    items = some_items(40, dimensions, 1)
    found = fit_ability(np.full(40, right), items)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 30
    assert abs(probabilities(items, found).mean() - right) < 0.02


def test_separable_answers_give_a_finite_ability() -> None:
    """All that need the first skill are right, all that need the second are wrong: without a prior both run away."""
    items = ItemParameters(np.repeat(np.eye(2), 10, axis=0), np.linspace(-0.5, 0.5, 20)[:, None])
    found = fit_ability(np.repeat([1.0, 0.0], 10), items)
    assert 2 < found[0] < 30
    assert -30 < found[1] < -2


def test_a_prior_is_there_only_where_it_is_needed() -> None:
    """One dimension, no difficulty, discrimination 1: the maximum is the log odds, exactly."""
    items = ItemParameters(np.ones((10, 1)), np.zeros((10, 1)))
    np.testing.assert_allclose(fit_ability([1.0] * 7 + [0.0] * 3, items), [np.log(7 / 3)], atol=1e-5)


def test_responses_between_0_and_1_count_as_shares() -> None:
    items = ItemParameters(np.ones((4, 1)), np.zeros((4, 1)))
    np.testing.assert_allclose(fit_ability([0.8] * 4, items), [np.log(4)], atol=1e-5)


def test_items_that_tell_nothing_apart_change_nothing() -> None:
    items, blank = some_items(30, 2, 3), ItemParameters(np.zeros((5, 2)), np.zeros((5, 2)))
    both = ItemParameters(
        np.concatenate([items.discrimination, blank.discrimination]), np.concatenate([items.difficulty, blank.difficulty])
    )
    y = answers(items, np.array([0.5, -0.5]), 4)
    np.testing.assert_allclose(fit_ability([*y, 1, 0, 1, 0, 1], both), fit_ability(y, items), atol=1e-4)


def test_a_mixture_of_unit_abilities_is_the_ability() -> None:
    items = some_items(80, 2, 5)
    y = answers(items, np.array([1.0, 0.2]), 6)
    np.testing.assert_allclose(fit_mixture(y, items, np.eye(2)), fit_ability(y, items), atol=1e-4)


def test_more_endpoints_than_dimensions_still_give_the_ability() -> None:
    items = some_items(80, 1, 7)
    y = answers(items, np.array([0.7]), 8)
    endpoints = np.array([[0.4], [1.5]])
    np.testing.assert_allclose(fit_mixture(y, items, endpoints) @ endpoints, fit_ability(y, items), atol=1e-4)


def test_faults_of_responses_are_named() -> None:
    items = some_items(3, 1, 0)
    with pytest.raises(UserError, match="one response per item"):
        fit_ability([1.0, 0.0], items)
    with pytest.raises(UserError, match="from 0 to 1"):
        fit_ability([1.0, 0.0, 2.0], items)
    with pytest.raises(UserError, match=r"allowed is \[models, 1\]"):
        fit_mixture([1.0, 0.0, 1.0], items, np.ones((2, 2)))
    with pytest.raises(UserError, match="ability of shape"):
        probabilities(items, [0.0, 1.0])


# -- extracts --------------------------------------------------------------------------------------------------------------------


def test_a_random_extract_is_replayed() -> None:
    first, second = (random_extract(100, 10, rng(3, "extract")) for _ in range(2))
    assert first.positions.tolist() == second.positions.tolist() == sorted(set(first.positions.tolist()))
    assert first.weights.tolist() == [0.1] * 10
    assert random_extract(100, 10, rng(4, "extract")).positions.tolist() != first.positions.tolist()


def test_anchors_are_the_centres_and_weigh_their_clusters() -> None:
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    spread = np.array([[0.0, 0.0], [0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])
    X = np.concatenate([centre + spread[:count] for centre, count in zip(centres, (5, 5, 3), strict=True)])
    found = anchor_extract(X, 3, rng(0))
    assert found.positions.tolist() == [0, 5, 10]
    np.testing.assert_allclose(found.weights, np.array([5, 5, 3]) / 13)


def test_anchors_count_sub_scenarios_equally() -> None:
    X = np.array([[0.0]] * 8 + [[5.0]] * 2)
    balance = balance_weights(["a"] * 8 + ["b"] * 2)
    assert balance.tolist() == [10 / 16] * 8 + [10 / 4] * 2
    np.testing.assert_allclose(anchor_extract(X, 2, rng(0), balance).weights, [0.5, 0.5])


def test_repeated_items_need_fewer_anchors() -> None:
    found = anchor_extract(np.zeros((7, 2)), 4, rng(0))
    assert (len(found), found.weights.tolist()) == (1, [1.0])


def test_an_extract_is_checked() -> None:
    with pytest.raises(UserError, match=r"sum to 0\.8"):
        Extract(np.array([0, 1]), np.array([0.4, 0.4]))
    with pytest.raises(UserError, match="different items"):
        Extract(np.array([1, 1]), np.array([0.5, 0.5]))
    with pytest.raises(UserError, match="allowed is 1 to 5"):
        random_extract(5, 6, rng(0))


# -- estimates -------------------------------------------------------------------------------------------------------------------


def every_item(count: int) -> Extract:
    weights = np.random.default_rng(0).random(count)
    return Extract(np.arange(count), weights / weights.sum())


@pytest.mark.parametrize("mode", ["weighted", "pirt", "mpirt", "gpirt", "gmpirt"])
def test_with_every_item_seen_the_estimate_is_the_weighted_average(mode: str) -> None:
    items, extract = some_items(25, 2, 9), every_item(25)
    y = answers(items, np.array([0.3, 0.3]), 10)
    estimate = Estimator(extract, mode, items, np.array([[0.1, 1.0], [1.0, -0.4]]))  # type: ignore[arg-type]
    assert estimate(y) == pytest.approx(float(extract.weights @ y), abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["mean", "weighted", "pirt", "mpirt", "gpirt", "gmpirt"]), st.integers(1, 3))
def test_estimates_stand_between_0_and_1(seed: int, mode: str, endpoints: int) -> None:
    items = some_items(40, 2, seed)
    generator = np.random.default_rng(seed)
    extract = random_extract(40, 8, generator)
    y = (generator.random(8) < generator.random()).astype(np.float64)
    found = Estimator(extract, mode, items, generator.normal(size=(endpoints, 2)))(y)  # type: ignore[arg-type]
    assert 0 <= found <= 1


def test_one_endpoint_leaves_the_classic_estimate() -> None:
    items = some_items(50, 2, 11)
    extract = random_extract(50, 20, rng(1))
    y = answers(items, np.array([0.3, -0.8]), 12)[extract.positions]
    endpoint = np.array([[0.5, 0.5]])
    assert Estimator(extract, "mpirt", items, endpoint)(y) == Estimator(extract, "pirt", items)(y)


def test_parts_of_an_estimate() -> None:
    extract = Extract(np.array([0, 3]), np.array([0.25, 0.75]))
    chances = np.array([0.9, 0.2, 0.4, 0.9])
    assert weighted_mean([1, 0], extract) == 0.25
    assert pirt([1, 0], extract, chances) == pytest.approx(0.5 * 0.25 + 0.5 * 0.3)
    balance = np.array([2.0, 0.5, 1.0, 2.0])
    assert pirt([1, 0], extract, chances, balance) == pytest.approx(0.5 * (2.0 * 1 / 2) + 0.5 * (0.1 + 0.4) / 2)
    assert gpirt_share(0.1, 0.25, 25) == pytest.approx(0.01 / (0.0025 + 0.01))
    assert gpirt_share(0.0, 0.0, 5) == 0.5


def test_an_estimator_says_what_it_needs() -> None:
    extract, items = Extract(np.array([0, 3]), np.array([0.5, 0.5])), some_items(3, 1, 0)
    with pytest.raises(UserError, match="needs item parameters"):
        Estimator(extract, "pirt")
    with pytest.raises(UserError, match="needs the abilities"):
        Estimator(Extract(np.array([0]), np.array([1.0])), "gmpirt", items)
    with pytest.raises(UserError, match="has item 3, the task has 3"):
        Estimator(extract, "pirt", items)
    with pytest.raises(UserError, match="Did you mean 'gmpirt'"):
        Estimator(extract, "gmpirtt", items)  # type: ignore[arg-type]


def test_item_response_theory_beats_the_mean_of_thirty_items() -> None:
    """200 merges of two models with known items: gmpirt's mean absolute error is below the plain mean's."""
    items = some_items(600, 2, 20)
    generator = np.random.default_rng(21)
    endpoints = np.array([[1.2, -0.6], [-0.5, 1.0]])
    errors: dict[str, list[float]] = {"mean": [], "gmpirt": []}
    for number in range(200):
        share = generator.uniform(-0.2, 1.2)
        truth = answers(items, np.array([share, 1 - share]) @ endpoints, 1000 + number)
        extract = random_extract(600, 30, generator)
        for mode, found in errors.items():
            found.append(abs(Estimator(extract, mode, items, endpoints)(truth[extract.positions]) - truth.mean()))  # type: ignore[arg-type]
    assert np.mean(errors["gmpirt"]) < 0.95 * np.mean(errors["mean"])


# -- item parameters -------------------------------------------------------------------------------------------------------------


def matrix(items: ItemParameters, models: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    abilities = generator.normal(size=(models, items.dimensions))
    return np.stack([answers(items, ability, seed + 1 + number) for number, ability in enumerate(abilities)])


def test_fitted_items_are_those_that_made_the_answers() -> None:
    truth = some_items(60, 1, 30)
    found, abilities = fit_items(matrix(truth, 300, 31))
    assert np.corrcoef(found.difficulty[:, 0], truth.difficulty[:, 0])[0, 1] > 0.97
    assert np.corrcoef(found.discrimination[:, 0], truth.discrimination[:, 0])[0, 1] > 0.75
    assert np.corrcoef(abilities[:, 0], np.random.default_rng(31).normal(size=(300, 1))[:, 0])[0, 1] > 0.9


def test_fitted_items_are_the_most_probable() -> None:
    """The gradient of the log posterior is zero: difficulty of one item, from its definition."""
    y = matrix(some_items(12, 1, 32), 60, 33)
    items, abilities = fit_items(y)
    p = np.stack([probabilities(items, ability) for ability in abilities])
    np.testing.assert_allclose((y - p).sum(axis=0), -items.difficulty[:, 0], atol=5e-3)
    np.testing.assert_allclose(((y - p) * items.discrimination[:, 0]).sum(axis=1), abilities[:, 0], atol=5e-3)
    pull = items.discrimination[:, 0] * ((y - p) * abilities).sum(axis=0)
    np.testing.assert_allclose(pull, np.log(items.discrimination[:, 0]) / 0.25, atol=5e-3)


def test_missing_answers_are_left_out() -> None:
    y = matrix(some_items(30, 1, 34), 80, 35)
    holes = np.where(np.random.default_rng(36).random(y.shape) < 0.2, np.nan, y)
    full, part = fit_items(y)[0], fit_items(holes)[0]
    assert np.corrcoef(full.difficulty[:, 0], part.difficulty[:, 0])[0, 1] > 0.95
    wrong = fit_items(np.where(np.isnan(holes), 0.0, holes))[0]
    assert wrong.difficulty.mean() > part.difficulty.mean() + 0.2


def test_two_skills_are_found() -> None:
    """Half of the items ask for one skill, half for another."""
    apart = ItemParameters(np.repeat(np.eye(2), 20, axis=0) * 2.5, np.random.default_rng(37).normal(0, 0.25, (40, 2)))
    assert choose_dimensions(matrix(apart, 120, 38), (1, 2)) == 2
    together = ItemParameters(np.full((40, 1), 1.5), np.random.default_rng(39).normal(0, 1, (40, 1)))
    assert choose_dimensions(matrix(together, 120, 40), (1, 2)) == 1


def test_few_models_are_refused() -> None:
    with pytest.raises(UserError, match="30 models or more"):
        fit_items(np.zeros((29, 5)))
    with pytest.raises(UserError, match="must be 0 or 1"):
        fit_items(np.full((30, 5), 0.5))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_binarised_scores_keep_their_mean_as_well_as_they_can(scores: list[float]) -> None:
    found = binarised(scores)
    assert set(found.tolist()) <= {0.0, 1.0}
    gap = abs(found.mean() - np.mean(scores))
    for threshold in [*scores, 2.0]:
        assert gap <= abs((np.array(scores) >= threshold).mean() - np.mean(scores)) + 1e-12
    assert all(low <= high for low, high in zip(found[np.argsort(scores)][:-1], found[np.argsort(scores)][1:], strict=True))


def test_binary_scores_stay() -> None:
    np.testing.assert_array_equal(binarised([1.0, 0.0, np.nan, 1.0]), [1.0, 0.0, np.nan, 1.0])


def test_anchors_of_item_vectors() -> None:
    items = some_items(50, 2, 41)
    assert item_vectors(items).shape == (50, 4)
    found = anchor_extract(item_vectors(items), 10, rng(2))
    assert len(found) == 10
    assert found.weights.sum() == pytest.approx(1)
