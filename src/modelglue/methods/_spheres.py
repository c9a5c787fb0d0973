"""Whole tensors as vectors: their inner products, and the arc between two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from modelglue.methods._sums import block_grams, pairs, total
from modelglue.methods.registry import Round

if TYPE_CHECKING:
    from torch import Tensor

#: what is shorter than this has no direction
_NO_LENGTH = 1e-12
#: cosines this close to 1 or -1: the arc is a line, or there are many arcs
_ONE_LINE = 1e-6

Gram = list[list[float]]


def dots_round(
    combine: Callable[..., Any], *, with_base: bool = False, quick: bool = False, note: Callable[[Any], str | None] | None = None
) -> Round:
    """The round that takes inner products of every pair of models: of their task vectors where there is a base, of base and models as
    they are `with_base`, the base first. `combine` makes something of them with `gram_of`. For `quick` see `block_grams`.
    """
    return Round(partial(_dots, with_base, quick), combine, note=note, sound=_finite)


def _dots(
    with_base: bool, quick: bool, models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]
) -> list[list[float]]:
    return block_grams([base, *models], None, quick=quick) if with_base else block_grams(models, base, quick=quick)


def _finite(dots: list[list[float]]) -> bool:
    return all(math.isfinite(block) for blocks in dots for block in blocks)


def gram_of(partials: Sequence[list[list[float]]]) -> Gram:
    """The matrix of inner products [n, n] from what the round gave."""
    n = (math.isqrt(8 * len(partials[0]) + 1) - 1) // 2 if partials else 0
    gram = [[0.0] * n for _ in range(n)]
    for number, (i, j) in enumerate(pairs(n)):
        gram[i][j] = gram[j][i] = total([partial[number] for partial in partials])
    return gram


def lengths(gram: Gram) -> list[float]:
    return [math.sqrt(row[i]) for i, row in enumerate(gram)]


def norm(gram: Gram, coefficients: Sequence[float]) -> float:
    """The length of sum_i c_i X_i; what is below 1e-8 of its parts may be rounding."""
    return math.sqrt(max(math.fsum(a * gram[i][j] * b for i, a in enumerate(coefficients) for j, b in enumerate(coefficients)), 0.0))


def arcs(one: Tensor, two: Tensor, product: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Coefficients of pairs of vectors on the arcs between them (t = 0: the first), from their lengths and inner products, in float64.

    A line where a vector has no length, and where the two point the same way or opposite ways: there the arc divides by almost nothing.
    """
    import torch

    lengths = one * two
    long = (one >= _NO_LENGTH) & (two >= _NO_LENGTH)
    cosine = torch.where(long, product / lengths.clamp(min=_NO_LENGTH**2), 1.0)
    line = cosine.abs() > 1.0 - _ONE_LINE
    angle = torch.where(line, 0.0, cosine).acos()
    first, second = (((share * angle).sin() / angle.sin()) for share in (1.0 - t, t))
    return torch.where(line, 1.0 - t, first), torch.where(line, t, second)
