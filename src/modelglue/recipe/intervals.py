"""How sure a score is, and a difference of two: bootstraps over items, paired where candidates were scored on the same ones."""

from __future__ import annotations

import numpy as np

from modelglue.errors import UserError
from modelglue.recipe.candidate import Scores


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
