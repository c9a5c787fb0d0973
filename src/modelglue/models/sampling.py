"""The next id of a row: the most probable one, or one drawn at a temperature from the most probable ones.

Every row draws its own numbers, a function of (seed, number of the sample, position) alone, so equal seeds give equal texts whatever
else is in the batch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelglue.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen. A temperature of 0 is greedy, and then `top_p` and `seed` mean nothing.

    Raises UserError for numbers that are out of range.
    """

    temperature: float = 0.0
    """Logits are divided by it; at most 100."""
    top_p: float = 1.0
    """Only the fewest ids that have at least this probability together are drawn from (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature}; allowed is 0 (the most probable token) to 100.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; allowed is a number above 0, up to 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Draw:
    """The numbers of one sample of one prompt."""

    def __init__(self, sampling: Sampling, sample: int) -> None:
        self.sampling = sampling
        self._numbers = random.Random(f"{sampling.seed}/{sample}")

    def choose(self, logits: torch.Tensor) -> int:
        """One id by the logits [V], which must be finite or -inf. Time: a sort of V numbers where `top_p` is below 1."""
        below = logits.double() - logits.max().double()  # first of all: a quotient by a tiny temperature may be infinite
        weights = (below / self.sampling.temperature).exp()  # not yet divided by their sum
        if self.sampling.top_p < 1:
            ordered, order = weights.sort(descending=True, stable=True)
            before = ordered.cumsum(0) - ordered
            weights[order[before >= self.sampling.top_p * ordered.sum()]] = 0.0
        # In the order of ids, not of weights: neighbours in size change places by rounding, and a draw may not depend on that.
        reached = weights.cumsum(0)
        number = self._numbers.random() * float(reached[-1])
        drawn = int((reached <= number).sum())
        # By rounding the number can be the whole sum: then it is the last id that has any weight.
        return drawn if drawn < len(weights) else int(weights.nonzero()[-1])


def choose(logits: torch.Tensor, draws: list[Draw | None]) -> tuple[list[int], list[bool]]:
    """(id of each row, are its logits numbers) by the logits [B, V]; None draws nothing: the largest logit, of equal ones the first."""
    logits = logits.float()
    largest, chosen = logits.max(dim=-1)  # NaN wins, so the largest logit is finite only where none is NaN
    ids, sound = chosen.tolist(), [math.isfinite(value) for value in largest.tolist()]
    for row, draw in enumerate(draws):
        if draw is not None and sound[row]:
            ids[row] = draw.choose(logits[row])
    return ids, sound
