"""The Riemannian mean of the models' directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from modelglue.methods._spheres import dots_round, gram_of, lengths, norm
from modelglue.methods._task_vectors import weighted_sum
from modelglue.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor

#: a direction whose cosine with the mean is below this lies opposite, and every arc to it is as good as another
_OPPOSITE = -1.0 + 1e-6


def _coefficients(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float] | None:
    """What every tensor is multiplied by; None where there is no mean direction.

    All points of the iteration are combinations of the models, so it runs on their coefficients and the matrix of inner products.
    """
    gram, tol = gram_of(partials), parameters["tol"]
    long = lengths(gram)
    valid = [i for i, length in enumerate(long) if length > tol]
    if not valid:
        return [1.0 / len(long) for _ in long]
    cosines = [[gram[i][j] / (long[i] * long[j]) for j in valid] for i in valid]
    share = 1.0 / len(valid)
    mean = [share] * len(valid)
    length = norm(cosines, mean)
    mean = [value / length for value in mean] if length >= tol else [1.0] + [0.0] * (len(valid) - 1)
    for _ in range(parameters["max_iter"]):
        step = [0.0] * len(valid)
        for i, row in enumerate(cosines):
            cosine = max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(row, mean, strict=True))))
            if cosine < _OPPOSITE:
                return None
            angle = math.acos(cosine)
            if angle >= tol:
                pull = share * angle / math.sin(angle)
                step[i] += pull
                step = [s - pull * cosine * m for s, m in zip(step, mean, strict=True)]
        length = norm(cosines, step)
        if length < tol:
            break
        mean = [math.cos(length) * m + math.sin(length) / length * s for m, s in zip(mean, step, strict=True)]
        length = norm(cosines, mean)
        mean = [value / length for value in mean]
    radius = sum(long) / len(long)
    found = [0.0] * len(long)
    for i, value in zip(valid, mean, strict=True):
        found[i] = radius * value / long[i]
    return found


def _opposite(coefficients: list[float] | None) -> str | None:
    return "models point in opposite directions, which have no mean on the sphere; averaged linearly" if coefficients is None else None


@method(
    raw=True,
    survey=[dots_round(_coefficients, note=_opposite)],
    without_effect=("weight",),
    source="arXiv 2603.04972; the mean itself is classical (Karcher 1977)",
)
def karcher(
    models: Sequence[Tensor],
    survey: Sequence[list[float] | None],
    *,
    max_iter: Annotated[int, Range(low=0)] = 10,
    tol: Annotated[float, Range(above=0)] = 1e-5,
) -> Tensor:
    """Riemannian (Karcher) mean of the models' directions, all alike, at their mean length.

    Each whole tensor is one vector with direction U_i; u starts at the normalised sum of all U_i and moves along the mean of the arcs to
    them, u <- cos|T| u + sin|T| T/|T| with T = mean of th_i/sin(th_i) (U_i - cos(th_i) u) and th_i the angle between u and U_i, until
    |T| < tol. The result is u times the mean of |X_i|. Where a model lies opposite to u, and where all are shorter than tol, it is the
    linear mean. Time O(n^2 P) for the inner products, whatever max_iter, inputs read twice; memory: one chunk of every input.

    Parameters:
        max_iter: most steps to take.
        tol: length of a step, or of a tensor, that counts as zero.
    """
    if len(models) == 1:
        return models[0]
    return weighted_sum(models, survey[0] or [1.0 / len(models)] * len(models))
