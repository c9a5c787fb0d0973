"""Parameters of items, fitted to the answers of many models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from modelglue.errors import UserError
from modelglue.search.item_response import Floats, ItemParameters, fit_ability, negative_log_likelihood

#: rows that a fit needs: with fewer, the priors say more than the answers
MIN_MODELS = 30
#: numbers of dimensions that `choose_dimensions` compares
DIMENSIONS = (1, 2, 5)
#: standard deviations of the priors: ability ~ N(0, 1), log discrimination ~ N(0, 0.5), difficulty ~ N(0, 1)
_SPREADS = (1.0, 0.5, 1.0)
#: every fifth model is held out when dimensions are compared
_HELD_OUT = 5


def fit_items(responses: ArrayLike, dimensions: int = 1) -> tuple[ItemParameters, Floats]:
    """Item parameters, and the abilities [models, D], that make responses [models, items] likeliest under the priors.

    Responses are 0 or 1 (`binarised` makes them so), NaN where a model has not seen an item; 30 models at least. Maximum a posteriori in
    float64 by L-BFGS with exact gradients, started from the proportions correct and the leading directions of what they leave
    unexplained; nothing is random. The one difficulty of an item is spread over the dimensions.
    Time O(models x items x D) per step, some hundred steps.
    """
    y, seen = _checked(responses)
    if dimensions < 1:
        raise UserError(f"{dimensions} dimensions; allowed is a number from 1.")
    return _fit(y, seen, dimensions)


def choose_dimensions(responses: ArrayLike, dimensions: Sequence[int] = DIMENSIONS) -> int:
    """The number of dimensions that predicts best: items are fitted without every fifth model; each of those gets its ability from
    every other item that it has seen, and is predicted on the rest. The smaller number on ties.
    """
    y, seen = _checked(responses)
    held = np.arange(len(y)) % _HELD_OUT == _HELD_OUT - 1
    best: tuple[float, int] | None = None
    for count in sorted(dimensions):
        items, _ = _fit(y[~held], seen[~held], count)
        loss = 0.0
        for row, mask in zip(y[held], seen[held], strict=True):
            known = np.flatnonzero(mask)
            if len(known) > 1:
                ability = fit_ability(row[known[::2]], items.at(known[::2]))
                loss += negative_log_likelihood(row[known[1::2]], items.at(known[1::2]), ability)
        if best is None or loss < best[0]:
            best = (loss, count)
    assert best is not None
    return best[1]


def binarised(scores: ArrayLike) -> Floats:
    """Scores in [0, 1] of one task as 0 or 1: 1 from the threshold on that keeps the mean as well as any threshold can.

    NaN stays NaN. Scores that are 0 or 1 already stay what they are.
    """
    values = np.asarray(scores, dtype=np.float64)
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return values
    thresholds = np.unique(known)
    above = 1 - np.searchsorted(known, thresholds) / len(known)  # share of scores from each threshold on
    candidates = np.append(thresholds, np.inf)
    chosen = candidates[np.argmin(np.abs(np.append(above, 0.0) - known.mean()))]
    return np.where(np.isnan(values), np.nan, (values >= chosen).astype(np.float64))


def _checked(responses: ArrayLike) -> tuple[Floats, Any]:
    """(responses with 0 for what is missing, what is there), both [models, items]."""
    y = np.asarray(responses, dtype=np.float64)
    if y.ndim != 2 or y.shape[0] < MIN_MODELS or y.shape[1] < 1:
        raise UserError(
            f"responses of shape {list(y.shape)}; allowed is [models, items] with {MIN_MODELS} models or more. "
            "Score more models on all items, or use an estimate without item parameters (mean, weighted)."
        )
    seen = ~np.isnan(y)
    if not np.isin(y[seen], (0.0, 1.0)).all():
        raise UserError("responses must be 0 or 1 (NaN where missing); make them so first.")
    return np.where(seen, y, 0.0), seen


def _fit(y: Floats, seen: Any, dimensions: int) -> tuple[ItemParameters, Floats]:
    from scipy.optimize import minimize

    models, count = y.shape
    sizes = (models * dimensions, count * dimensions, count)
    of_ability, of_slope, of_difficulty = (spread**-2 for spread in _SPREADS)

    def parts(x: Floats) -> tuple[Floats, Floats, Floats]:
        ability, log_a, b = np.split(x, np.cumsum(sizes)[:-1])
        return ability.reshape(models, dimensions), log_a.reshape(count, dimensions), b

    def loss(x: Floats) -> tuple[float, Floats]:
        ability, log_a, b = parts(x)
        a = np.exp(log_a)
        z = ability @ a.T - b  # [models, items]
        value = float(np.sum(np.where(seen, np.logaddexp(0, z) - y * z, 0.0)))
        value += float(of_ability * np.sum(ability**2) + of_slope * np.sum(log_a**2) + of_difficulty * np.sum(b**2)) / 2
        slope = np.where(seen, 1 / (1 + np.exp(-z)) - y, 0.0)
        gradient = [
            slope @ a + of_ability * ability,
            (slope.T @ ability) * a + of_slope * log_a,
            -slope.sum(axis=0) + of_difficulty * b,
        ]
        return value, np.concatenate([part.ravel() for part in gradient])

    start = np.concatenate([_first_abilities(y, seen, dimensions).ravel(), np.zeros(sizes[1]), -_logit_means(y, seen, 0)])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 4000})
    ability, log_a, b = parts(found.x)
    return ItemParameters(np.exp(log_a), b[:, None] / dimensions), ability


def _logit_means(y: Floats, seen: Any, axis: int) -> Floats:
    """Log odds of the proportion correct, half an answer added on either side."""
    right = y.sum(axis=axis) + 0.5
    wrong = seen.sum(axis=axis) - y.sum(axis=axis) + 0.5
    odds: Floats = np.log(right / wrong)
    return odds


def _first_abilities(y: Floats, seen: Any, dimensions: int) -> Floats:
    """[models, D]: log odds of the models, spread over the dimensions; directions of the residuals tell the dimensions apart."""
    level = _logit_means(y, seen, 1)
    level = level - level.mean()
    expected = y.sum(axis=1, keepdims=True) / np.maximum(seen.sum(axis=1, keepdims=True), 1)
    easy = y.sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    residual = np.where(seen, y - expected - easy + easy.mean(), 0.0)
    directions, _, _ = np.linalg.svd(residual, full_matrices=False)
    ability = np.repeat(level[:, None] / dimensions, dimensions, axis=1)
    for number in range(min(dimensions, directions.shape[1]) if dimensions > 1 else 0):
        direction = directions[:, number] * np.sqrt(len(y))
        ability[:, number] += direction * np.sign(direction[np.argmax(np.abs(direction))])
    return ability
