"""The pruning of Breadcrumbs: a band of magnitudes stays, over a tensor or in every row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._pruning import by_length, length_round, scales
from modelglue.methods._ranks import by_rank
from modelglue.methods._selection import kept
from modelglue.methods._task_vectors import Election, add_kept
from modelglue.methods._trimming import Band, merge_trimmed, trim_rounds
from modelglue.methods.registry import Round, Unit

if TYPE_CHECKING:
    from torch import Tensor

TrimScope = Literal["tensor", "row"]


def unit(parameters: Mapping[str, Any]) -> Unit:
    return "row" if parameters["trim_scope"] == "row" else "element"


def rounds(parameters: Mapping[str, Any]) -> list[Round]:
    if parameters["trim_scope"] == "tensor":
        return trim_rounds(_bands, parameters)
    return [length_round(_crumbs, unit="row")] if by_length(parameters) else []


def _bands(parameters: Mapping[str, Any], numel: int) -> list[Band]:
    """The floor(density N) entries that stay and the floor(gamma N) larger ones that do not, fewer where density leaves fewer."""
    bands: list[Band] = []
    for density, gamma in zip(parameters["density"], parameters["gamma"], strict=True):
        keep = kept(density, numel)
        top = min(math.floor(gamma * numel), numel - keep)
        outer = keep + top
        bands.append((None, None) if density >= 1 else (outer if outer < numel else None, top or None))
    return bands


def _kept_in_rows(models: Sequence[Tensor], base: Tensor, parameters: Mapping[str, Any]) -> list[Tensor | None]:
    """0 or 1 for every entry of chunks [rows, c]; None where everything stays."""
    import numpy as np
    import torch

    c = base.shape[1]
    masks: list[Tensor | None] = []
    for model, (outer, top) in zip(models, _bands(parameters, c), strict=True):
        if outer is None and top is None:
            masks.append(None)
            continue
        stays = np.zeros(c, np.uint8)
        stays[c - (outer or c) : c - (top or 0)] = 1
        magnitude = (model - base).abs_().to(torch.float32).cpu().numpy()
        masks.append(torch.from_numpy(by_rank(magnitude, stays, lower="last")).to(base.device))
    return masks


def _crumbs(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> list[Tensor | None]:
    masks = _kept_in_rows(models, base, parameters)
    return [None if mask is None else (model - base) * mask for model, mask in zip(models, masks, strict=True)]


def merge_crumbs(
    models: Sequence[Tensor],
    base: Tensor,
    survey: Sequence[Any],
    start: int,
    trim_scope: TrimScope,
    *,
    density: Sequence[float],
    gamma: Sequence[float],
    election: Election,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    rescale: bool,
) -> Tensor:
    """B + lambda * (the bands of the task vectors, weighted and put together), as a 1-D tensor."""
    if trim_scope == "tensor":
        return merge_trimmed(
            models, base, survey, start, election=election, weight=weight, lambda_=lambda_, normalize=normalize, rescale=rescale
        )
    if lambda_ == 0.0:
        return base
    masks = [None if mask is None else mask.reshape(-1) for mask in _kept_in_rows(models, base, {"density": density, "gamma": gamma})]
    flat = [model.reshape(-1) for model in models]
    factors = scales(weight, survey[0] if rescale else None, election, normalize, lambda_)
    return add_kept(base.reshape(-1), flat, masks, factors, weight, election, normalize, lambda_, 1.0)
