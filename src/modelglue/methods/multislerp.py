"""The weighted mean of several models' directions, at their mean length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from modelglue.methods._spheres import dots_round, gram_of, lengths, norm
from modelglue.methods._task_vectors import add_scaled, weighted_sum
from modelglue.methods.registry import CannotMergeError, PerModel, Range, method

if TYPE_CHECKING:
    from torch import Tensor


def _weights_do_not_cancel(parameters: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    if parameters["normalize_weights"] and abs(sum(parameters["weight"])) < 1e-8:
        return ["the weights sum to 0, so they cannot be normalised; change them or set normalize_weights: false"]
    return []


def _coefficients(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    """What every vector is multiplied by."""
    gram, eps = gram_of(partials), parameters["eps"]
    divisor = sum(parameters["weight"]) if parameters["normalize_weights"] else 1.0
    weight = [share / divisor for share in parameters["weight"]]
    long = lengths(gram)
    mean = [share / max(length, eps) for share, length in zip(weight, long, strict=True)]
    across = norm(gram, mean)
    if across >= eps:
        radius = sum(share * length for share, length in zip(weight, long, strict=True))
        return [share * radius / across for share in mean]
    if len(weight) > 2 and max(long, default=0.0) >= eps:
        raise CannotMergeError("the weighted directions of the models cancel each other out, so they have no mean. Change the weights.")
    return weight


@method(raw=True, survey=[dots_round(_coefficients)], check=_weights_do_not_cancel, source="mergekit's own, no paper")
def multislerp(
    models: Sequence[Tensor],
    base: Tensor | None,
    survey: Sequence[list[float]],
    *,
    weight: PerModel[float],
    normalize_weights: bool = True,
    eps: Annotated[float, Range(above=0)] = 1e-8,
) -> Tensor:
    """Weighted mean direction of the models (of their task vectors where there is a base), at their weighted mean length.

    Each whole tensor is one vector F_i (X_i, or X_i - B) with direction U_i = F_i / max(|F_i|, eps): (sum_i w_i |F_i|) * m / |m| with
    m = sum_i w_i U_i. This is the barycentric step on the sphere at the normalised mean, where the tangent part sums to zero. Directions
    that cancel give sum_i w_i F_i for two models and an error for more. Time O(n^2 P) for the inner products, inputs read twice;
    memory: one chunk of every input.

    Parameters:
        weight: share of this model; may be negative.
        normalize_weights: divide the weights by their sum.
        eps: length below which a vector, or the mean of the directions, counts as none.
    """
    if len(models) == 1:
        return models[0]
    return weighted_sum(models, survey[0]) if base is None else add_scaled(base, models, survey[0])
