"""Texts that every expert has been scored on: what a router learns from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelglue.errors import UserError
from modelglue.recipe import Scores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredItem:
    """One text: what the router reads of it, and what every expert made of it."""

    task: str
    id: str
    text: str
    values: tuple[float, ...]
    """One per expert, larger is better: a score in [0, 1], or a negative loss such as bits per byte."""


@dataclass(frozen=True)
class ScoredItems:
    """Items with the values of all experts. Tasks count alike, whatever their number of items.

    Raises UserError unless every item has one finite value per expert.
    """

    experts: tuple[str, ...]
    items: tuple[ScoredItem, ...]

    def __post_init__(self) -> None:
        for item in self.items:
            if len(item.values) != len(self.experts) or not all(map(math.isfinite, item.values)):
                raise UserError(
                    f"scored item '{item.id}' of '{item.task}': has the values {list(item.values)}; "
                    f"allowed is one finite number for each of the {len(self.experts)} experts. Score it again, or leave it out."
                )

    @classmethod
    def of(cls, texts: Mapping[str, Mapping[str, str]], scores: Mapping[str, Scores], *, by_loss: bool = False) -> ScoredItems:
        """Join what is read (task -> item id -> text) with what was scored (expert -> scores on these items).

        With `by_loss` an item's value is its negative loss instead of its score. UserError for an item that an expert was not scored on.
        """
        missing = [
            f"{name}: {task}/{number}"
            for name, found in scores.items()
            for task, rows in texts.items()
            for number in rows
            if number not in (found.losses if by_loss else found.items).get(task, {})
        ]
        if missing:
            raise UserError(f"{len(missing)} items have no score, the first is {missing[0]}. Score every expert on the same items.")

        def value(found: Scores, task: str, number: str) -> float:
            return -found.losses[task][number] if by_loss else found.items[task][number]

        items = [
            ScoredItem(task, number, text, tuple(value(found, task, number) for found in scores.values()))
            for task, rows in texts.items()
            for number, text in rows.items()
        ]
        return cls(tuple(scores), tuple(items))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.task for item in self.items))

    @property
    def texts(self) -> list[str]:
        return [item.text for item in self.items]

    @property
    def telling(self) -> int:
        """Items on which the experts differ; the others teach nothing."""
        return sum(min(item.values) < max(item.values) for item in self.items)

    def values(self) -> torch.Tensor:
        """[items, experts], float64."""
        import torch

        return torch.tensor([item.values for item in self.items], dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        """[items], float64: they sum to 1, and every task's to the same."""
        import torch

        counts = self._counts()
        return torch.tensor([1 / (counts[item.task] * len(counts)) for item in self.items], dtype=torch.float64)

    def folds(self, count: int, seed: int) -> torch.Tensor:
        """[items], int64: the fold of each item. Every task is spread over all folds, and tasks with fewer items than folds go on where
        the one before them ended, so that no fold has them all; the order of the items changes nothing."""
        import torch

        found = torch.empty(len(self.items), dtype=torch.int64)
        start = 0
        for task in sorted(self.tasks):
            places = [place for place, item in enumerate(self.items) if item.task == task]
            places.sort(key=lambda place: hashlib.sha256(f"{seed} {task} {self.items[place].id}".encode()).digest())
            small = len(places) < count
            found[places] = (torch.arange(len(places)) + start * small) % count
            start += len(places) * small
        return found

    def outcome(self, choices: Sequence[int]) -> Scores:
        """What a router gets that sends each item to the expert of this number."""
        found: dict[str, dict[str, float]] = {task: {} for task in self.tasks}
        for item, choice in zip(self.items, choices, strict=True):
            found[item.task][item.id] = item.values[choice]
        return Scores(found)

    def oracle(self) -> list[int]:
        """The expert with the highest mean of each item's task; of equal ones the first."""
        best = {}
        for task in self.tasks:
            rows = [item.values for item in self.items if item.task == task]
            sums = [math.fsum(column) for column in zip(*rows, strict=True)]
            best[task] = sums.index(max(sums))
        return [best[item.task] for item in self.items]

    def best_for_everything(self) -> int:
        """The expert with the highest mean over tasks; of equal ones the first."""
        means = [self.outcome([number] * len(self.items)).mean for number in range(len(self.experts))]
        return means.index(max(means))

    def _counts(self) -> dict[str, int]:
        counts = dict.fromkeys(self.tasks, 0)
        for item in self.items:
            counts[item.task] += 1
        return counts
