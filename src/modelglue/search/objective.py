"""How the scores of several tasks become the one number that a search climbs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from modelglue.errors import UserError, did_you_mean

Rule: TypeAlias = Literal["mean", "weighted", "worst", "chebyshev"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True)
class Objective:
    """`mean` over tasks; `weighted` mean; the `worst` task; or `chebyshev`: minus the largest weighted distance from `reference`."""

    rule: Rule = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Task -> weight, 1 where nothing is said."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """Task -> score that would be ideal, 1 where nothing is said."""

    def check(self, tasks: Sequence[str]) -> None:
        """UserError for an unknown rule, for tasks that there are not, and for weights that are negative or all 0."""
        if self.rule not in RULES:
            raise UserError(f"objective '{self.rule}'; allowed are {', '.join(RULES)}.{did_you_mean(self.rule, RULES)}")
        for name in [*self.weights, *self.reference]:
            if name not in tasks:
                raise UserError(f"objective: there is no task '{name}', but {', '.join(tasks)}.{did_you_mean(name, tasks)}")
        weights = [self.weights.get(task, 1.0) for task in tasks]
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise UserError(f"objective: the weights are {dict(self.weights)}; allowed are numbers from 0, not all 0.")

    def __call__(self, scores: Mapping[str, float]) -> float:
        """One number from one per task; larger is better."""
        if self.rule == "mean":
            return math.fsum(scores.values()) / len(scores)
        if self.rule == "worst":
            return min(scores.values())
        weights = {task: self.weights.get(task, 1.0) for task in scores}
        if self.rule == "weighted":
            return math.fsum(weights[task] * score for task, score in scores.items()) / math.fsum(weights.values())
        return -max(weights[task] * abs(self.reference.get(task, 1.0) - score) for task, score in scores.items())

    def share(self, task: str, tasks: Sequence[str]) -> float:
        """Weight of a task's mean in a `mean` or `weighted` objective; the shares sum to 1."""
        if self.rule == "weighted":
            return self.weights.get(task, 1.0) / math.fsum(self.weights.get(name, 1.0) for name in tasks)
        return 1 / len(tasks)

    @property
    def is_mean(self) -> bool:
        """Whether it is linear in the tasks' means, so that paired differences of items say all about it."""
        return self.rule in ("mean", "weighted")
