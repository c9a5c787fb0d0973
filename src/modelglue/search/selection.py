"""What a strategy leaves behind: its result and the full trace, ready for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Round:
    """One decision: may this candidate join the current merge?"""

    candidate: str
    scores: Mapping[str, float] | None
    """Coefficient -> score of the trial; None for strategies without a grid."""
    coefficient: float | None
    """Weight that the current merge keeps; 1 rejects the candidate; None for strategies without a grid."""
    score: float
    """Score of the round's best trial."""
    accepted: bool
    current: float
    """Score of the current merge after the round."""
    interval: tuple[float, float, float]
    """(difference, low, high): the best trial minus the current merge before the round, paired over items."""

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "scores": None if self.scores is None else dict(self.scores),
            "coefficient": self.coefficient,
            "score": self.score,
            "accepted": self.accepted,
            "current": self.current,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Selection:
    """One strategy's merge of a family, and how it came about."""

    strategy: str
    order: tuple[str, ...]
    """Members, best individual score first."""
    individual: Mapping[str, float]
    weights: Mapping[str, float]
    """Coefficient of every member in family order, 0 for rejected ones; the sum is 1."""
    score: float
    tasks: Mapping[str, float]
    evaluations: int
    """Distinct candidates that the strategy asked for, besides the members themselves."""
    rounds: Sequence[Round]
    confirmation: float | None = None
    """Score on the confirmation items, if there are any."""
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "order": list(self.order),
            "individual": dict(self.individual),
            "weights": dict(self.weights),
            "score": self.score,
            "tasks": dict(self.tasks),
            "evaluations": self.evaluations,
            "rounds": [one.to_json() for one in self.rounds],
            "confirmation": self.confirmation,
            "warnings": list(self.warnings),
        }
