"""Quadratic surrogates: what a merge with scalings c scores on a task, predicted from a few dozen merges that were scored.

MAP (arXiv 2406.07529). One quadratic per task, the whole front of trade-offs from the surrogates at no further cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from modelglue.errors import UserError
from modelglue.search.item_response import Floats
from modelglue.search.nsga import Nsga, Variation, maximise
from modelglue.search.pareto import reference_directions

Link: TypeAlias = Literal["sigmoid", "softplus", "identity"]
LINKS: tuple[str, ...] = get_args(Link)

#: pulls coefficients that the points do not determine towards 0
_RIDGE = 1e-6
#: metrics are kept this far inside the range of their link before it is inverted
_MARGIN = 1e-3
#: leave-one-out R^2 below which a surrogate is no ground for a front
LEAST_R2 = 0.5


@dataclass(frozen=True, eq=False)
class Quadratic:
    """link(sum_i q_i c_i^2 + sum_{i<j} q_ij c_i c_j + sum_i l_i c_i + k), the coefficients in this order.

    The link is `sigmoid` for accuracies, `softplus` for losses, `identity` for what has no bounds. `r2` is the leave-one-out R^2.
    """

    coefficients: Floats
    link: Link
    r2: float

    def __call__(self, points: ArrayLike) -> Floats:
        """Predictions [n] at points [n, models]."""
        return _linked(self.link, design_matrix(points) @ self.coefficients)


def coefficient_count(models: int) -> int:
    """How many numbers a quadratic in so many scalings has."""
    return (models + 1) * (models + 2) // 2


def design_matrix(points: ArrayLike) -> Floats:
    """[n, coefficients] of points [n, models]: squares, products of i < j, the scalings, 1."""
    C = np.asarray(points, dtype=np.float64)
    if C.ndim != 2 or not C.shape[1]:
        raise UserError(f"scalings of shape {list(C.shape)}; allowed is [points, models].")
    i, j = np.triu_indices(C.shape[1], k=1)
    return np.concatenate([C**2, C[:, i] * C[:, j], C, np.ones((len(C), 1))], axis=1)


def fit(points: ArrayLike, metric: ArrayLike, link: Link) -> Quadratic:
    """The quadratic nearest to metrics [n] at points [n, models] in least squares; n >= the number of coefficients.

    Starts from the linear fit of the metric through the inverted link, near the optimum; a ridge of 1e-6 settles what the
    points leave open. A constant metric gives a constant. The leave-one-out R^2 costs n further fits: together some milliseconds.
    """
    X, y = _checked(points, metric, link)
    if np.ptp(y) == 0:
        constant = np.zeros(X.shape[1])
        constant[-1] = _inverted(link, y[:1])[0]
        return Quadratic(constant, link, 1.0)
    start = _linear(X, _inverted(link, y))
    found = _least_squares(X, y, link, start, _RIDGE)
    left_out = [_left_out(X, y, link, found, number) for number in range(len(y))]
    r2 = 1 - float(np.sum((y - left_out) ** 2) / np.sum((y - y.mean()) ** 2))
    return Quadratic(found, link, r2)


def fit_from_ones(points: ArrayLike, metric: ArrayLike, link: Link) -> Floats:
    """Coefficients by Levenberg-Marquardt from all ones, as MAP's own code fits them."""
    X, y = _checked(points, metric, link)
    return _least_squares(X, y, link, np.ones(X.shape[1]), 0.0)


def poor_fits(surrogates: Sequence[Quadratic]) -> list[int]:
    """Positions of surrogates whose leave-one-out R^2 is below 0.5; there is no front to be had of those."""
    return [number for number, surrogate in enumerate(surrogates) if not surrogate.r2 >= LEAST_R2]


def surrogate_front(
    surrogates: Sequence[Quadratic], low: ArrayLike, high: ArrayLike, *, seed: int = 0, population: int = 100, generations: int = 150
) -> tuple[Floats, Floats]:
    """(scalings [n, models], predictions [n, tasks]) of the front of larger-is-better surrogates inside a box, by NSGA-III.

    The box is the sampled one: a quadratic says nothing outside. UserError for a surrogate that does not predict left-out points.
    """
    if bad := poor_fits(surrogates):
        worst = ", ".join(f"{number} (R^2 {surrogates[number].r2:.2f})" for number in bad)
        raise UserError(
            f"surrogates of task {worst} do not predict points that were left out (at least {LEAST_R2} is needed), so a front would be "
            "noise. Score more points or more items per point."
        )
    directions = None
    if len(surrogates) > 1:
        directions = reference_directions(len(surrogates), *_layers(len(surrogates), population))
    search = Nsga(
        low, high, population, seed=seed, name="map", directions=directions, variation=Variation(crossover=1.0, crossover_eta=20.0)
    )
    return maximise(lambda C: np.stack([surrogate(C) for surrogate in surrogates], axis=1), search, generations)


def preferred(front: ArrayLike, preference: ArrayLike) -> int:
    """Position of the point of a front [n, tasks] with the largest sum_k (p_k / |p|) f_k; the first on ties."""
    p = np.asarray(preference, dtype=np.float64)
    if not np.linalg.norm(p) > 0:
        raise UserError("a preference needs a weight other than 0.")
    return int(np.argmax(np.asarray(front) @ (p / np.linalg.norm(p))))


def first_points(models: int, count: int, seed: int = 0) -> Floats:
    """[count, models]: the unit vectors (each model alone), then scrambled Sobol points of the unit cube."""
    from scipy.stats import qmc

    from modelglue.search.randomness import rng

    if count < coefficient_count(models):
        raise UserError(f"{count} points for {models} models; allowed is {coefficient_count(models)} or more, default twice that.")
    spread = count - models
    sobol = qmc.Sobol(models, scramble=True, rng=rng(seed, "map", "design"))
    points: Floats = sobol.random_base2(max(spread - 1, 0).bit_length())[:spread]
    return np.concatenate([np.eye(models), points])


# -- fitting ---------------------------------------------------------------------------------------------------------------------


def _checked(points: ArrayLike, metric: ArrayLike, link: Link) -> tuple[Floats, Floats]:
    X, y = design_matrix(points), np.asarray(metric, dtype=np.float64)
    if link not in LINKS:
        raise UserError(f"link '{link}'; allowed are {', '.join(LINKS)}.")
    if y.shape != (len(X),) or not np.isfinite(y).all() or not np.isfinite(X).all():
        raise UserError(f"metrics of shape {list(y.shape)} for {len(X)} points; allowed is one finite number per point.")
    if len(X) < X.shape[1]:
        raise UserError(f"{len(X)} points for a quadratic with {X.shape[1]} coefficients; score {X.shape[1]} or more.")
    return X, y


def _least_squares(X: Floats, y: Floats, link: Link, start: Floats, ridge: float) -> Floats:
    from scipy.optimize import least_squares

    pull = math.sqrt(ridge) * np.eye(X.shape[1] if ridge else 0, X.shape[1], dtype=np.float64)

    def residuals(b: Floats) -> Floats:
        return np.concatenate([_linked(link, X @ b) - y, pull @ b])

    def slopes(b: Floats) -> Floats:
        return np.concatenate([_slope(link, X @ b)[:, None] * X, pull])

    found: Floats = least_squares(residuals, start, slopes, method="lm", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=2000).x
    return found


def _left_out(X: Floats, y: Floats, link: Link, start: Floats, number: int) -> float:
    """What is predicted for a point when the others are fitted."""
    others = np.arange(len(y)) != number
    b = _least_squares(X[others], y[others], link, start, _RIDGE)
    return float(_linked(link, X[[number]] @ b)[0])


def _linear(X: Floats, y: Floats) -> Floats:
    return np.asarray(np.linalg.solve(X.T @ X + _RIDGE * np.eye(X.shape[1]), X.T @ y), dtype=np.float64)


def _linked(link: Link, z: Floats) -> Floats:
    if link == "identity":
        return z
    if link == "softplus":
        return np.logaddexp(0, z)
    return 0.5 * (1 + np.tanh(z / 2))  # a sigmoid that does not overflow


def _slope(link: Link, z: Floats) -> Floats:
    if link == "identity":
        return np.ones_like(z)
    p = _linked("sigmoid", z)
    return p if link == "softplus" else p * (1 - p)


def _inverted(link: Link, y: Floats) -> Floats:
    if link == "identity":
        return y
    if link == "softplus":
        kept = np.maximum(y, _MARGIN)
        return kept + np.log(-np.expm1(-kept))
    kept = np.clip(y, _MARGIN, 1 - _MARGIN)
    odds: Floats = np.log(kept / (1 - kept))
    return odds


def _layers(tasks: int, population: int) -> tuple[list[int], list[float]]:
    """Divisions and scales of about as many reference directions as the population; two coarse layers for many tasks."""
    divisions = 1
    while math.comb(divisions + tasks, tasks - 1) <= population:
        divisions += 1
    return ([divisions], [1.0]) if divisions >= tasks else ([2, 1], [1.0, 0.5])
