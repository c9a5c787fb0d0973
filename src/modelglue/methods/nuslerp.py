"""Spherical interpolation between two models by their weights, for whole tensors or vector by vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.methods._spheres import arcs, dots_round, gram_of, lengths
from modelglue.methods._task_vectors import add_scaled, weighted_sum, wide
from modelglue.methods.registry import PerModel, Round, Unit, method

if TYPE_CHECKING:
    from torch import Tensor


def _position(weight: Sequence[float]) -> float:
    total = sum(weight)
    return weight[1] / total if abs(total) >= 1e-6 else 0.5


def _flat(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    """The two coefficients on the arc between the whole tensors."""
    import torch

    gram = gram_of(partials)
    one, two, product = torch.tensor([*lengths(gram), gram[0][1]], dtype=torch.float64)
    return [float(number) for number in arcs(one, two, product, _position(parameters["weight"]))]


def _gather_columns(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> tuple[int, Tensor]:
    """How many entries of the first axis, and per column of theirs |a|^2, |b|^2 and <a, b>: [3, columns]."""
    import torch

    a, b = ((model if base is None else model - base).flatten(1).double() for model in models)
    return len(a), torch.stack([(a * a).sum(0), (b * b).sum(0), (a * b).sum(0)])


def _add(one: tuple[int, Tensor], two: tuple[int, Tensor]) -> tuple[int, Tensor]:
    return one[0] + two[0], one[1] + two[1]


def _columns(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The two coefficients of every column; a tensor with a single entry along its first axis is one vector."""
    (entries, sums), *_ = partials
    one, two, product = sums.sum(1, keepdim=True) if entries == 1 else sums
    return arcs(one.sqrt(), two.sqrt(), product, _position(parameters["weight"]))


def _unit(parameters: Mapping[str, Any]) -> Unit:
    return "element" if parameters["nuslerp_flatten"] or parameters["nuslerp_row_wise"] else "row"


def _rounds(parameters: Mapping[str, Any]) -> list[Round]:
    if parameters["nuslerp_flatten"]:
        return [dots_round(_flat)]
    return [Round(_gather_columns, _columns, unit="channel", fold=_add)] if parameters["nuslerp_row_wise"] else []


@method(
    unit=_unit,
    units=("element", "row"),
    survey=_rounds,
    models=(2, 2),
    raw=True,
    source="mergekit's own; spherical interpolation is classical",
)
def nuslerp(
    models: Sequence[Tensor],
    base: Tensor | None,
    survey: Sequence[Any],
    start: int,
    *,
    weight: PerModel[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Arc between two models, or between their task vectors where there is a base.

    t = w_2 / (w_1 + w_2), 1/2 where the weights cancel. With the angle th between two vectors a and b the result is
    sin((1-t) th)/sin(th) * a + sin(t th)/sin(th) * b; (1-t) a + t b where they point the same way or opposite ways, or one has no length.
    A vector is the whole tensor, or one row or column of it. Time O(P); inputs read twice, once for rows; memory: one chunk of both, and
    six numbers per column.

    Parameters:
        weight: share of this model.
        nuslerp_flatten: one angle for the whole tensor; else one for every vector along the last axis.
        nuslerp_row_wise: one angle for every vector along the first axis (the columns of a matrix, despite the name), if not flattened.
    """
    import torch

    t = _position(weight)
    if t in (0.0, 1.0):
        return models[int(t)]
    if nuslerp_flatten:
        return weighted_sum(models, survey[0]) if base is None else add_scaled(base, models, survey[0])
    a, b = (wide(model) if base is None else wide(model) - wide(base) for model in models)
    if nuslerp_row_wise:
        columns = (start + torch.arange(len(a))) % len(survey[0][0])
        first, second = (coefficients[columns].to(a) for coefficients in survey[0])
    else:
        x, y = a.double(), b.double()
        one, two, product = ((p * q).sum(-1, keepdim=True) for p, q in ((x, x), (y, y), (x, y)))
        first, second = (coefficients.to(a) for coefficients in arcs(one.sqrt(), two.sqrt(), product, t))
    result: Tensor = a * first + b * second
    return result if base is None else result + wide(base)
