"""RAM with more of what a model has to itself, the more of it is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelglue.methods._ram import add_changes, changes
from modelglue.methods.registry import Range, Round, method

if TYPE_CHECKING:
    from torch import Tensor


def _counts(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Per model: positions that others changed too, and positions that it alone changed."""
    changed = [change != 0 for change in changes(base, models, parameters["epsilon"])]
    together = sum(mask.to(base.dtype) for mask in changed)
    return [(int((mask & (together > 1)).sum()), int((mask & (together == 1)).sum())) for mask in changed]


def _factors(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    factors = []
    for model in range(len(partials[0]) if partials else 0):
        shared, unique = (sum(partial[model][kind] for partial in partials) for kind in (0, 1))
        factors.append(1.0 + parameters["r"] * min(shared / max(unique, 1), parameters["alpha"]))
    return factors


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    return [Round(_counts, _factors, parameters["scope"])]


@method(survey=_rounds, source="RAM+, arXiv 2601.13572")
def ramplus_tl(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[list[float]],
    *,
    r: float = 0.1,
    alpha: Annotated[float, Range(low=0)] = 0.2,
    epsilon: Annotated[float, Range(low=0)] = 1e-5,
    scope: Literal["tensor", "model"] = "tensor",
) -> Tensor:
    """RAM, with the changes that model i alone has made multiplied by l_i = 1 + r * min(shared_i / unique_i, alpha).

    shared_i and unique_i count the positions that model i changed by more than epsilon together with others, and alone (at least 1). Time
    O(n P), inputs read twice; memory: one chunk of every input.

    Parameters:
        r: strength of the amplification; 0 is RAM.
        alpha: largest ratio that counts.
        epsilon: changes up to this size count as none.
        scope: count in each tensor, or in the whole model as published.
    """
    return add_changes(base, models, epsilon, survey[0])
