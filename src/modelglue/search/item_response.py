"""Item response theory: how likely a model of some ability is to answer an item of some difficulty.

Two-parameter logistic model with D dimensions. Abilities are fitted to responses on items whose parameters are known; the parameters
of the items themselves come from published tables or from `search.item_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modelglue.errors import UserError

Floats: TypeAlias = NDArray[np.float64]
#: positions of items in a task
Positions: TypeAlias = NDArray[np.int64]

#: exponents beyond this say nothing more in float64
_LARGEST_EXPONENT = 30.0
#: keeps the logarithm of a probability finite
_SMALLEST_PROBABILITY = 1e-10
#: standard deviation of the prior that makes a likelihood without a maximum have one
_WIDE_PRIOR = 10.0


@dataclass(frozen=True, eq=False)
class ItemParameters:
    """What is known of the items of a task.

    `discrimination` [items, D]; `difficulty` [items, D], or [items, 1] where one difficulty is subtracted in each of the D dimensions
    (as published tables are meant).
    """

    discrimination: Floats
    difficulty: Floats

    def __post_init__(self) -> None:
        a, b = self.discrimination, self.difficulty
        if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or b.shape[1] not in (1, a.shape[1]):
            raise UserError(
                f"item parameters of shapes {list(a.shape)} and {list(b.shape)}; allowed are discriminations [items, D] and difficulties "
                "[items, D] or [items, 1]."
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError("item parameters hold NaN or infinity; leave those items out.")

    def __len__(self) -> int:
        return len(self.discrimination)

    @property
    def dimensions(self) -> int:
        return int(self.discrimination.shape[1])

    def at(self, positions: Sequence[int] | Positions) -> ItemParameters:
        """Some of the items, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return ItemParameters(self.discrimination[chosen], self.difficulty[chosen])


def probabilities(items: ItemParameters, ability: ArrayLike) -> Floats:
    """[items]: chance of a correct answer, sigmoid(sum_d clip(a_d theta_d - b_d, -30, 30)), for an ability [D]."""
    return _probabilities(_exponents(items, np.asarray(ability, dtype=np.float64)))


def negative_log_likelihood(responses: ArrayLike, items: ItemParameters, ability: ArrayLike) -> float:
    """-sum_i [y_i log(P_i + 1e-10) + (1 - y_i) log(1 - P_i + 1e-10)] of responses in [0, 1] at an ability [D]."""
    y = _responses(responses, items)
    return _loss(y, probabilities(items, ability))


def fit_ability(responses: ArrayLike, items: ItemParameters) -> Floats:
    """The ability [D] that makes responses [items] in [0, 1] likeliest: BFGS from 0, as tinyBenchmarks (arXiv 2402.14992) does it.

    Where the likelihood has no maximum (all answers right, or separable otherwise), a prior N(0, 10) on the ability gives it one.
    Time: some milliseconds.
    """
    return _fit(_responses(responses, items), items, np.eye(items.dimensions), np.zeros(items.dimensions))


def fit_mixture(responses: ArrayLike, items: ItemParameters, abilities: ArrayLike) -> Floats:
    """lambda [models]: the linear combination of abilities [models, D] that makes the responses of their merge likeliest.

    From MERGE^3 (arXiv 2502.10436). Unbounded, with values like -0.25 and 1.96, so no mixing weights; from 1/models by BFGS.
    With fewer dimensions than models lambda is not unique, only the ability `lambda @ abilities` is.
    """
    basis = np.asarray(abilities, dtype=np.float64)
    if basis.ndim != 2 or basis.shape[1] != items.dimensions or not len(basis):
        raise UserError(f"abilities of shape {list(basis.shape)}; allowed is [models, {items.dimensions}], one row per endpoint.")
    return _fit(_responses(responses, items), items, basis, np.full(len(basis), 1 / len(basis)))


def _fit(y: Floats, items: ItemParameters, basis: Floats, start: Floats) -> Floats:
    """Coefficients x [k] of the ability `x @ basis`."""
    from scipy.optimize import minimize

    a = items.discrimination
    precision = 0.0 if _has_maximum(y, a @ basis.T) else _WIDE_PRIOR**-2

    def loss(x: Floats) -> tuple[float, Floats]:
        parts = a * (x @ basis) - items.difficulty  # [items, D]
        p = _probabilities(_clipped(parts))
        slope = ((1 - y) / (1 - p + _SMALLEST_PROBABILITY) - y / (p + _SMALLEST_PROBABILITY)) * p * (1 - p)
        inside = np.abs(parts) < _LARGEST_EXPONENT
        gradient = basis @ (a * inside).T @ slope
        return _loss(y, p) + precision * float(x @ x) / 2, gradient + precision * x

    found: Floats = minimize(loss, start, jac=True, method="BFGS").x
    return found


def _has_maximum(y: Floats, design: Floats) -> bool:
    """Whether the likelihood of y at exponents `design @ x` + const has a maximum: no direction pleases every response.

    A direction v would have (2 y - 1) * (design @ v) >= 0 everywhere, and = 0 where y is neither 0 nor 1: a linear programme.
    """
    from scipy.optimize import linprog

    certain = (y == 0) | (y == 1)
    signed = np.where(y > 0.5, 1.0, -1.0)[:, None] * design
    rows = np.concatenate([signed, -signed])
    bounds = np.concatenate([certain.astype(np.float64), np.zeros(len(y))])
    found = linprog(-signed.sum(axis=0), A_ub=rows, b_ub=bounds, bounds=(None, None), method="highs")
    return bool(found.status == 0 and -found.fun < 1e-9)


def _exponents(items: ItemParameters, ability: Floats) -> Floats:
    if ability.shape != (items.dimensions,):
        raise UserError(f"an ability of shape {list(ability.shape)} for items of {items.dimensions} dimensions.")
    return _clipped(items.discrimination * ability - items.difficulty)


def _clipped(parts: Floats) -> Floats:
    """[items] of [items, D]."""
    clipped: Floats = np.clip(parts, -_LARGEST_EXPONENT, _LARGEST_EXPONENT).sum(axis=1)
    return clipped


def _probabilities(exponents: Floats) -> Floats:
    return 1 / (1 + np.exp(-exponents))


def _loss(y: Floats, p: Floats) -> float:
    return float(-np.sum(y * np.log(p + _SMALLEST_PROBABILITY) + (1 - y) * np.log(1 - p + _SMALLEST_PROBABILITY)))


def _responses(responses: ArrayLike, items: ItemParameters) -> Floats:
    y = np.asarray(responses, dtype=np.float64)
    if y.shape != (len(items),) or not len(y):
        raise UserError(
            f"responses of shape {list(y.shape)} for {len(items)} items; allowed is one response per item, and an item at least."
        )
    if not ((y >= 0) & (y <= 1)).all():
        raise UserError("responses must be numbers from 0 to 1.")
    return y
