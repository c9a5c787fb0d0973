"""What all strategies share: the order of the members, the current merge, and the rule that accepts a trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modelglue.recipe import Candidate, Scores, paired_interval

if TYPE_CHECKING:
    from collections.abc import Mapping

Accept = Literal[">=", ">", "significant"]


@dataclass(frozen=True)
class Ranking:
    """Members in family order with their individual scores."""

    singles: Mapping[str, Scores]

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.singles)

    @property
    def individual(self) -> dict[str, float]:
        return {alias: scores.mean for alias, scores in self.singles.items()}

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
    """The merge so far: flattened coefficients over the original members (they sum to 1), and its scores."""

    weights: Mapping[str, float]
    scores: Scores

    def joined_by(self, alias: str, coefficient: float) -> dict[str, float]:
        """Coefficients of c x current + (1 - c) x member."""
        weights = {member: coefficient * weight for member, weight in self.weights.items()}
        weights[alias] += 1 - coefficient
        return weights


@dataclass(frozen=True)
class Rule:
    """When a trial replaces the current merge. The published rule is >=: an equal score merges."""

    accept: Accept = ">="

    def accepts(self, gain: tuple[float, float, float], trial: Scores, current: Scores) -> bool:
        """`gain` is (difference, low, high) of trial minus current, paired over items."""
        if self.accept == "significant":
            return gain[1] > 0
        return trial.mean > current.mean or (self.accept == ">=" and trial.mean == current.mean)


def gain(trial: Scores, current: Scores) -> tuple[float, float, float]:
    """(difference, low, high) with a 95 % interval."""
    return paired_interval(trial, current)


def candidate(weights: Mapping[str, float]) -> Candidate:
    """The linear merge with these coefficients; members keep the family's order."""
    return Candidate.linear(weights)
