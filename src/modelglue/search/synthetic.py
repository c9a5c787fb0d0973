"""An evaluator without models and without data: what a linear merge scores is a known function of its coefficients.

Every task has an optimum on the simplex, and items of two-parameter logistic response models. The further a candidate's coefficients are
from a task's optimum, the fewer of its items it answers. Answers are drawn once per (recipe, item), by hash, so they repeat. It offers
everything an evaluator can, and its best candidate and front are known: what searchers are tested and compared on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from modelglue.recipe import LEVELS, Candidate, Cost, Level, Plan, Request, Scores
from modelglue.search.item_response import Floats
from modelglue.search.randomness import permutation, rng


@dataclass(frozen=True)
class SyntheticEvaluator:
    """`models` aliases m0, m1, ...; `size` items for each of the tasks t0, t1, ...; `curvature` is how fast ability falls off.

    `noise` False gives the chance of an answer itself instead of a drawn answer. `split` tells item sets of one problem apart, which have
    equal optima and different items. Candidates may have any method with one weight per model; they are judged by those.
    """

    models: int = 4
    task_count: int = 1
    size: int = 200
    seed: int = 0
    curvature: float = 8.0
    top: float = 2.5
    noise: bool = True
    split: str = "search"

    @property
    def members(self) -> list[str]:
        return [f"m{number}" for number in range(self.models)]

    @property
    def tasks(self) -> Sequence[str]:
        return [f"t{number}" for number in range(self.task_count)]

    @property
    def levels(self) -> frozenset[Level]:
        return frozenset(LEVELS)

    @property
    def identity(self) -> str:
        return hashlib.sha256(
            json.dumps(
                ["synthetic", self.models, self.task_count, self.size, self.seed, self.curvature, self.top, self.noise, self.split]
            ).encode()
        ).hexdigest()

    @cached_property
    def optima(self) -> Mapping[str, Floats]:
        """Task -> best coefficients [models], which sum to 1."""
        found = {}
        for task in self.tasks:
            shares = -np.log(1 - rng(self.seed, "optimum", task).random(self.models))
            found[task] = shares / shares.sum()
        return found

    def items(self, task: str) -> Sequence[str]:
        return [f"{self.split}-{task}-{number}" for number in self._order(task)]

    def _order(self, task: str) -> list[int]:
        return permutation(rng(self.seed, "order", self.split, task), self.size)

    @cached_property
    def _parameters(self) -> Mapping[str, tuple[Floats, Floats]]:
        """Task -> (discrimination, difficulty) [items]."""
        found = {}
        for task in self.tasks:
            generator = rng(self.seed, "items", self.split, task)
            found[task] = (0.5 + 1.5 * generator.random(self.size), 4 * generator.random(self.size) - 2)
        return found

    def ability(self, weights: Mapping[str, float], task: str) -> float:
        """What a merge with these coefficients is capable of on a task."""
        c = np.array([weights.get(alias, 0.0) for alias in self.members])
        return self.top - self.curvature * float(((c - self.optima[task]) ** 2).sum())

    def truth(self, candidate: Candidate) -> float:
        """Mean over tasks of the expected score, over the items of this set."""
        return float(np.mean([self._chances(candidate, task).mean() for task in self.tasks]))

    def _chances(self, candidate: Candidate, task: str) -> Floats:
        a, b = self._parameters[task]
        chances: Floats = 1 / (1 + np.exp(-a * (self.ability(weights_of(candidate), task) - b)))
        return chances

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        wanted = plan.items if plan.items is not None else {task: tuple(self.items(task)) for task in self.tasks}
        key = candidate.key
        values: dict[str, dict[str, float]] = {}
        losses: dict[str, dict[str, float]] = {}
        for task, items in wanted.items():
            chances = self._chances(candidate, task)
            numbers = [int(item.rpartition("-")[2]) for item in items]
            values[task] = {item: self._answer(key, item, chances[number]) for item, number in zip(items, numbers, strict=True)}
            losses[task] = {item: -math.log(max(chances[number], 1e-12)) for item, number in zip(items, numbers, strict=True)}
        count = sum(map(len, wanted.values()))
        return Scores(values, losses=losses, cost=Cost(items=count, tokens=10 * count, computed=count))

    def _answer(self, key: str, item: str, chance: float) -> float:
        if not self.noise:
            return float(chance)
        digest = hashlib.sha256(f"{self.seed}\n{self.split}\n{key}\n{item}".encode()).digest()
        return float(int.from_bytes(digest[:8], "big") / 2**64 < chance)

    def evaluate_many(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scores]]:
        for number, (candidate, plan) in enumerate(requests):
            yield number, self.evaluate(candidate, plan)


def weights_of(candidate: Candidate) -> dict[str, float]:
    """Coefficient of every member: its weight, over all merges inside; a weight that differs over layers counts with its mean."""
    return _weights(candidate.recipe)


def _weights(recipe: Mapping[str, object]) -> dict[str, float]:
    found: dict[str, float] = {}
    entries = recipe.get("models", [])
    assert isinstance(entries, list)
    base = recipe.get("base")
    if recipe.get("method") == "slerp":
        t = recipe["parameters"]["t"]  # type: ignore[index]
        shares = [(base, 1 - t), (entries[0]["model"], t)]
    else:
        shares = [(entry["model"], _mean(entry.get("weight", 1.0))) for entry in entries]
    for model, share in shares:
        inner = {str(model): 1.0} if isinstance(model, str) else _weights(model)
        for alias, weight in inner.items():
            found[alias] = found.get(alias, 0.0) + share * weight
    return found


def _mean(setting: object) -> float:
    if isinstance(setting, list):
        parts = [_mean(part["value"] if isinstance(part, dict) else part) for part in setting]
        return math.fsum(parts) / len(parts)
    assert isinstance(setting, int | float)
    return float(setting)
