"""Spherical interpolation between the base and one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.methods._spheres import dots_round, gram_of, lengths
from modelglue.methods._task_vectors import weighted_sum
from modelglue.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor

_NEARLY_PARALLEL = 0.9995
_NO_LENGTH = 1e-8


def _angle(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> float | None:
    """The angle between the two whole tensors, or None where the arc degenerates to a line."""
    gram = gram_of(partials)
    base, model = lengths(gram)
    if base < _NO_LENGTH or model < _NO_LENGTH:
        return None
    cosine = gram[0][1] / (base * model)
    return None if abs(cosine) > _NEARLY_PARALLEL else math.acos(cosine)


@method(
    raw=True,
    survey=[dots_round(_angle, with_base=True, quick=True)],
    models=(1, 1),
    symmetric=False,
    source="classical quaternion interpolation; no paper for merging",
)
def slerp(models: Sequence[Tensor], base: Tensor, survey: Sequence[float | None], *, t: float) -> Tensor:
    """Arc from the base (t = 0) to the model (t = 1), each whole tensor taken as one vector.

    With the angle th between the flattened tensors: sin((1-t) th)/sin(th) * base + sin(t th)/sin(th) * model. Where they are nearly
    parallel (|cos| > 0.9995, which most tensors of sibling fine-tunes are) or one has no length, this is (1-t) base + t model.
    Time O(P), inputs read twice; memory: one chunk of both.

    Parameters:
        t: position on the arc; values outside [0, 1] extrapolate.
    """
    if t == 0.0:
        return base
    if t == 1.0:
        return models[0]
    angle = survey[0]
    if angle is None:
        return weighted_sum([base, models[0]], [1.0 - t, t])
    return weighted_sum([base, models[0]], [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])
