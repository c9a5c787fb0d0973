"""What all strategies share: the order of the members, the current merge, and the rule that accepts a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from modelglue.recipe import Candidate, Scores, paired_interval
from modelglue.search.searcher import Outcome, Proposal

Accept = Literal[">=", ">", "significant"]


def outcome_of(candidate: Candidate, scores: Scores, id_: int = 0) -> Outcome:
    """The outcome of a candidate that was scored on everything, with the mean over tasks for a value."""
    return Outcome(id_, Proposal(candidate), "ok", scores.mean, scores.tasks(), scores)


@dataclass(frozen=True)
class Ranking:
    """Members in family order with what became of them alone."""

    singles: Mapping[str, Outcome]

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.singles)

    @property
    def individual(self) -> dict[str, float]:
        """Score of every member; one that has none counts as 0."""
        return {alias: outcome.value if math.isfinite(outcome.value) else 0.0 for alias, outcome in self.singles.items()}

    @property
    def order(self) -> tuple[str, ...]:
        """Best first; equal scores keep the family's order."""
        individual = self.individual
        return tuple(sorted(self.members, key=lambda alias: -individual[alias]))

    def start(self) -> Current:
        """The best member alone."""
        first = self.order[0]
        return Current({alias: float(alias == first) for alias in self.members}, self.singles[first])


@dataclass(frozen=True)
class Current:
    """The merge so far: flattened coefficients over the original members (they sum to 1), and what it scored."""

    weights: Mapping[str, float]
    outcome: Outcome

    @property
    def scores(self) -> Scores:
        return self.outcome.scores

    @property
    def value(self) -> float:
        return self.outcome.value

    def joined_by(self, alias: str, coefficient: float) -> dict[str, float]:
        """Coefficients of c x current + (1 - c) x member."""
        weights = {member: coefficient * weight for member, weight in self.weights.items()}
        weights[alias] += 1 - coefficient
        return weights


@dataclass(frozen=True)
class Rule:
    """When a trial replaces the current merge. The published rule is >=: an equal score merges. What was given up on never does."""

    accept: Accept = ">="

    def accepts(self, gain: tuple[float, float, float], trial: Outcome, current: Current) -> bool:
        """`gain` is (difference, low, high) of trial minus current, paired over items."""
        if not trial.whole:
            return False
        if self.accept == "significant":
            return gain[1] > 0
        return trial.value > current.value or (self.accept == ">=" and trial.value == current.value)


def gain(trial: Outcome, current: Current) -> tuple[float, float, float]:
    """(difference, low, high) with a 95 % interval, on the items that both were scored on; zeros if there are none."""
    a, b = trial.scores, current.scores
    if not trial.whole:
        items = {task: {item: value for item, value in values.items() if item in a.items.get(task, {})} for task, values in b.items.items()}
        b = Scores({task: values for task, values in items.items() if values})
        a = Scores({task: {item: a.items[task][item] for item in values} for task, values in b.items.items()})
    return paired_interval(a, b) if b.items else (0.0, 0.0, 0.0)


def candidate(weights: Mapping[str, float]) -> Candidate:
    """The linear merge with these coefficients; members keep the family's order."""
    return Candidate.linear(weights)
