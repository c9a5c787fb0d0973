"""The factor that restores a pruned task vector's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelglue.methods._sums import total

_NO_LENGTH = 1e-7


def length_ratios(partials: Sequence[Any], models: int) -> list[float]:
    """Per model, |D|_1 / |P|_1 of block sums gathered as [chunk][model] -> (of D, of P); 1 where either is below 1e-7."""
    ratios = []
    for model in range(models):
        before, after = (total([partial[model][side] for partial in partials]) for side in (0, 1))
        ratios.append(before / after if before >= _NO_LENGTH and after >= _NO_LENGTH else 1.0)
    return ratios
