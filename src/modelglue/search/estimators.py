"""The accuracy of a candidate on all items of a task, estimated from its answers to a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from modelglue.errors import UserError, did_you_mean
from modelglue.search.item_response import Floats, ItemParameters, Positions, fit_ability, fit_mixture, probabilities
from modelglue.search.randomness import draw, permutation

Mode: TypeAlias = Literal["mean", "weighted", "pirt", "gpirt", "mpirt", "gmpirt"]
MODES: tuple[str, ...] = get_args(Mode)
#: rounds of k-means; it has settled long before
_ROUNDS = 100


@dataclass(frozen=True, eq=False)
class Extract:
    """The items of a task on which candidates are scored: positions in the task, ascending, and weights that sum to 1."""

    positions: Positions
    weights: Floats

    def __post_init__(self) -> None:
        positions, weights = self.positions, self.weights
        if positions.ndim != 1 or positions.shape != weights.shape or not len(positions) or len(np.unique(positions)) < len(positions):
            raise UserError("an extract is a list of different items, one at least, with a weight for each.")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and abs(weights.sum() - 1) < 1e-6):
            raise UserError(f"the weights of an extract sum to {weights.sum():g}; allowed are weights from 0 that sum to 1.")

    def __len__(self) -> int:
        return len(self.positions)


def random_extract(count: int, size: int, generator: np.random.Generator) -> Extract:
    """`size` of `count` items, all with the same weight. MERGE^3 reports that it is as good as clustering."""
    _check_size(count, size)
    chosen = np.sort(np.array(permutation(generator, count)[:size], dtype=np.int64))
    return Extract(chosen, np.full(size, 1 / size))


def anchor_extract(features: ArrayLike, size: int, generator: np.random.Generator, balance: ArrayLike | None = None) -> Extract:
    """The items nearest to the centres of k-means on `features` [items, any], each with the weight of its cluster.

    Features are item parameters (`item_vectors`) or the responses of many models, one row per item. `balance` [items] are weights that
    make sub-scenarios count equally (`balance_weights`). From tinyBenchmarks (arXiv 2402.14992). Fewer anchors than `size` come out
    where items repeat each other. Time O(items x size x features) per round.
    """
    X = np.asarray(features, dtype=np.float64)
    _check_size(len(X), size)
    mass = np.ones(len(X)) if balance is None else np.asarray(balance, dtype=np.float64)
    mass = mass / mass.sum()
    centres = _first_centres(X, mass, size, generator)
    for _ in range(_ROUNDS):
        nearest = _squares(X, centres).argmin(axis=1)
        total = np.bincount(nearest, mass, len(centres))
        moved = np.stack([np.bincount(nearest, mass * column, len(centres)) for column in X.T], axis=1) / np.maximum(total, 1e-300)[:, None]
        moved = np.where(total[:, None] > 0, moved, centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    distance = _squares(X, centres)
    nearest = distance.argmin(axis=1)
    weight: dict[int, float] = {}
    for number in range(len(centres)):
        members = np.flatnonzero(nearest == number)
        if len(members):
            weight[int(members[distance[members, number].argmin()])] = float(mass[members].sum())
    positions = np.array(sorted(weight), dtype=np.int64)
    weights = np.array([weight[int(position)] for position in positions])
    return Extract(positions, weights / weights.sum())


def item_vectors(items: ItemParameters) -> Floats:
    """[items, 2 D or D + 1]: what `anchor_extract` tells items apart by, (a_i, b_i)."""
    return np.concatenate([items.discrimination, items.difficulty], axis=1)


def balance_weights(scenarios: Sequence[object]) -> Floats:
    """[items]: N / (number of sub-scenarios x items of the item's own), so that sub-scenarios count equally; 1 where there is one."""
    numbers = {scenario: number for number, scenario in enumerate(dict.fromkeys(scenarios))}
    labels = np.array([numbers[scenario] for scenario in scenarios], dtype=np.int64)
    sizes = np.bincount(labels)
    weights: Floats = len(labels) / (len(sizes) * sizes[labels])
    return weights


# -- the estimates ---------------------------------------------------------------------------------------------------------------


def weighted_mean(responses: ArrayLike, extract: Extract) -> float:
    """sum_i w_i y_i over the extract."""
    return float(extract.weights @ _checked(responses, extract))


def pirt(responses: ArrayLike, extract: Extract, chances: ArrayLike, balance: ArrayLike | None = None) -> float:
    """What was seen and what is predicted of the rest: tau * (sum_i w_i y_i) + (1 - tau) * (mean of P_i over unseen items).

    `chances` [items of the task] are P_i at the candidate's ability, tau is the share of items that were seen. With `balance` [items]
    (sub-scenarios) both parts are plain means of balanced values, as in tinyBenchmarks. With every item seen, nothing is predicted.
    """
    y = _checked(responses, extract)
    p = np.asarray(chances, dtype=np.float64)
    unseen = np.ones(len(p), dtype=bool)
    unseen[extract.positions] = False
    tau = len(extract) / len(p)
    if balance is None:
        seen, rest = float(extract.weights @ y), p
    else:
        factor = np.asarray(balance, dtype=np.float64)
        seen, rest = float((factor[extract.positions] * y).mean()), factor * p
    return tau * seen + (1 - tau) * float(rest[unseen].mean()) if unseen.any() else seen


def generalised(share: float, observed: float, predicted: float) -> float:
    """c * observed + (1 - c) * predicted: what makes gpirt of pirt and gmpirt of mpirt."""
    return share * observed + (1 - share) * predicted


def gpirt_share(error: float, variance: float, size: int) -> float:
    """c = b^2 / (v + b^2): b the average error of the predicted part, v the mean variance of responses / (4 n)."""
    v = variance / (4 * size)
    return error**2 / (v + error**2) if error or v else 0.5


@dataclass(frozen=True, eq=False)
class Estimator:
    """Accuracy on a whole task from responses on its extract; what a search of any kind can take for a score.

    `items` are the parameters of all items of the task (None: `mean` and `weighted` only), `endpoints` [models, D] the abilities of the
    models that are merged, `share` is c of gpirt and gmpirt, `balance` [items] makes sub-scenarios count equally. With one endpoint
    mpirt is pirt. Milliseconds per estimate.
    """

    extract: Extract
    mode: Mode = "gmpirt"
    items: ItemParameters | None = None
    endpoints: Floats | None = None
    share: float = 0.5
    balance: Floats | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"estimator '{self.mode}'.{did_you_mean(self.mode, MODES)} Allowed: {', '.join(MODES)}.")
        if self.mode not in ("mean", "weighted") and self.items is None:
            raise UserError(f"estimator '{self.mode}' needs item parameters. Give them, or use mean or weighted.")
        if self.mode in ("mpirt", "gmpirt") and self.endpoints is None:
            raise UserError(f"estimator '{self.mode}' needs the abilities of the models that are merged. Score them on all items first.")
        if not 0 <= self.share <= 1:
            raise UserError(f"the observed part counts for {self.share:g}, allowed is a share from 0 to 1.")
        if self.items is not None and self.extract.positions.max() >= len(self.items):
            raise UserError(f"the extract has item {self.extract.positions.max()}, the task has {len(self.items)}.")

    def ability(self, responses: ArrayLike) -> Floats:
        """The ability [D] that the responses show, among those that a merge of the endpoints can have where the mode says so."""
        items = self._seen_items
        if self.endpoints is not None and len(self.endpoints) > 1 and self.mode in ("mpirt", "gmpirt"):
            return fit_mixture(responses, items, self.endpoints) @ self.endpoints
        return fit_ability(responses, items)

    def __call__(self, responses: ArrayLike) -> float:
        """The estimate for responses in [0, 1], one per item of the extract in its order."""
        if self.mode == "mean":
            return float(_checked(responses, self.extract).mean())
        observed = weighted_mean(responses, self.extract)
        if self.mode == "weighted" or self.items is None:
            return observed
        predicted = pirt(responses, self.extract, probabilities(self.items, self.ability(responses)), self.balance)
        return predicted if self.mode in ("pirt", "mpirt") else generalised(self.share, observed, predicted)

    @cached_property
    def _seen_items(self) -> ItemParameters:
        assert self.items is not None
        return self.items.at(self.extract.positions)


def _checked(responses: ArrayLike, extract: Extract) -> Floats:
    y = np.asarray(responses, dtype=np.float64)
    if y.shape != (len(extract),):
        raise UserError(f"responses of shape {list(y.shape)} for an extract of {len(extract)} items.")
    return y


def _check_size(count: int, size: int) -> None:
    if not 1 <= size <= count:
        raise UserError(f"an extract of {size} items from {count}; allowed is 1 to {count}.")


def _first_centres(X: Floats, mass: Floats, size: int, generator: np.random.Generator) -> Floats:
    """k-means++: each next centre is an item, drawn in proportion to its mass times its squared distance from the centres so far."""
    chosen = [_drawn(mass, generator)]
    distance = _squares(X, X[chosen])[:, 0]
    while len(chosen) < size and (mass * distance).sum() > 0:
        chosen.append(_drawn(mass * distance, generator))
        distance = np.minimum(distance, _squares(X, X[chosen[-1:]])[:, 0])
    return X[chosen]


def _drawn(weights: Floats, generator: np.random.Generator) -> int:
    heights = np.cumsum(weights)
    if not heights[-1] > 0:
        return draw(generator, len(weights))
    return int(np.searchsorted(heights, generator.random() * heights[-1], side="right").clip(max=len(weights) - 1))


def _squares(X: Floats, centres: Floats) -> Floats:
    """[items, centres]: squared distances."""
    squares: Floats = ((X[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
    return squares
