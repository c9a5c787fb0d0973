"""Evaluators without models: a candidate's score is a function of its coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from modelglue.recipe import Candidate, Scores

Weights = Mapping[str, float]


@dataclass
class Landscape:
    """Scores every candidate by `value(weights)`; counts what it was asked."""

    value: Callable[[Weights], float]
    items: int = 1
    tasks: Sequence[str] = ("task",)
    asked: list[str] = field(default_factory=list)

    def evaluate(self, candidate: Candidate) -> Scores:
        self.asked.append(candidate.key)
        value = self.value(dict(zip(candidate.members, candidate.weights, strict=True)))
        return Scores({task: {str(item): value for item in range(self.items)} for task in self.tasks})


def bowl(target: Weights, members: Sequence[str], steps: int | None = None) -> Callable[[Weights], float]:
    """1 minus the squared distance of the coefficients from `target`; in `steps` steps, so that ties are frequent."""

    def value(weights: Weights) -> float:
        score = 1 - sum((weights.get(alias, 0.0) - target.get(alias, 0.0)) ** 2 for alias in members)
        return score if steps is None else round(score * steps) / steps

    return value
