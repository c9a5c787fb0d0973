"""What a search proposes and an evaluator scores; the two meet here and nowhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from modelglue.errors import UserError

#: weights below this are no weights: 1e-6 is the resolution of a candidate's key
_NO_WEIGHT = 5e-7


@dataclass(frozen=True)
class Candidate:
    """A merge of zoo members that has not been built: members in zoo order, weights that sum to 1, no zero weights."""

    method: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def linear(cls, weights: Mapping[str, float]) -> Candidate:
        """The linear merge with these coefficients, normalised; members keep the mapping's order.

        UserError unless the weights are finite and their sum is not 0.
        """
        total = sum(weights.values())
        if not math.isfinite(total) or abs(total) < _NO_WEIGHT * max(map(abs, weights.values()), default=0.0) or total == 0:
            raise UserError(f"the weights {dict(weights)} cannot be normalised; a candidate needs finite weights that do not sum to 0.")
        kept = {alias: weight for alias, weight in weights.items() if abs(weight / total) >= _NO_WEIGHT}
        total = sum(kept.values())
        return cls("linear", tuple(kept), tuple(weight / total for weight in kept.values()))

    @classmethod
    def single(cls, alias: str) -> Candidate:
        """One member as it is: the same candidate as the linear merge with all weight on it."""
        return cls("linear", (alias,), (1.0,))

    @property
    def key(self) -> str:
        """Canonical JSON: equal recipes, equal keys (coefficients rounded to 1e-6)."""
        rounded = [round(weight, 6) + 0.0 for weight in self.weights]
        return json.dumps([self.method, list(self.members), rounded, [list(pair) for pair in self.parameters]])


@dataclass(frozen=True)
class Scores:
    """Outcome of one candidate, item by item: task -> item id -> value in [0, 1]."""

    items: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()

    def tasks(self) -> dict[str, float]:
        """Mean of every task."""
        return {task: math.fsum(values.values()) / len(values) for task, values in self.items.items()}

    @property
    def mean(self) -> float:
        """Unweighted mean over tasks."""
        means = self.tasks()
        return math.fsum(means.values()) / len(means)

    def only(self, tasks: Sequence[str]) -> Scores:
        """The same outcome on some of the tasks."""
        return Scores({task: self.items[task] for task in tasks}, self.warnings)


class Evaluator(Protocol):
    """Candidate in, per-item scores out. Asking twice costs nothing the second time."""

    @property
    def tasks(self) -> Sequence[str]: ...
    def evaluate(self, candidate: Candidate) -> Scores: ...


def paired_interval(a: Scores, b: Scores, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(difference, low, high) of mean(a) - mean(b): paired bootstrap over items, stratified by task (percentiles).

    Both must be scored on the same items. The items of each task are drawn with replacement, the same for a and b; tasks count alike.
    """
    if a.items.keys() != b.items.keys():
        raise UserError(f"the results are on different tasks ({', '.join(a.items)} and {', '.join(b.items)}), so they cannot be paired.")
    generator = np.random.default_rng(seed)
    means = []
    for task, values in a.items.items():
        if b.items[task].keys() != values.keys():
            raise UserError(f"task '{task}': the two results were not scored on the same items, so they cannot be paired.")
        gaps = np.array([values[item] - b.items[task][item] for item in values])
        draws = generator.integers(0, len(gaps), size=(resamples, len(gaps)))
        means.append(gaps[draws].mean(axis=1))
    low, high = np.quantile(np.mean(means, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return a.mean - b.mean, float(low), float(high)


def interval(a: Scores, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(low, high) of mean(a), by the same bootstrap."""
    zero = Scores({task: dict.fromkeys(values, 0.0) for task, values in a.items.items()})
    _, low, high = paired_interval(a, zero, level=level, resamples=resamples, seed=seed)
    return low, high
