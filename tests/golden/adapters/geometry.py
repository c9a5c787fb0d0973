"""Merge methods between and around models: arcs, mean directions, selections by importance."""

from __future__ import annotations

from typing import Any

import torch

from modelglue.methods import get
from tests.golden.adapters.merge_methods import resolved, run
from tests.golden.cases import Adapter, Answer, Case

METHODS = ("nuslerp", "multislerp", "karcher", "nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion", "passthrough")


def _mergekit(method_id: str) -> Adapter:
    return lambda case: run(method_id, case, {**get(method_id).mergekit, **case.params["global"]}, case.params["per_model"])


def _surveyed(method_id: str, parameters: dict[str, Any], models: list[torch.Tensor], base: torch.Tensor) -> list[Any]:
    """What the rounds of a method find in one small tensor, taken whole."""
    known: list[Any] = []
    flat, numel = [model.flatten() for model in models], base.numel()
    for round_ in get(method_id).rounds(parameters):
        wanted = [(0, numel)] if round_.ranges is None else round_.ranges(known, numel, parameters)
        partials = [round_.gather([m[a:b] for m in flat], base.flatten()[a:b], None, known, a, parameters) for a, b in wanted]
        known.append(round_.combine(partials, known, numel, parameters))
    return known


def _sce(case: Case) -> Answer:
    """The authors' own code; the files also hold the weight of every model in every tensor."""
    params = case.params
    assert params["erase_zero_sum_sign"] == "+"
    scope = {"coefficients_only": "coefficients"}.get(params["select_scope"], params["select_scope"])
    shared = {"select_topk": params["select_topk"], "select_scope": scope}
    each: list[dict[str, Any]] = [{} for _ in case.models]
    found = dict(run("sce", case, shared, each).tensors)
    parameters = resolved("sce", shared, each)
    for name, base in case.tensors("base").items():
        weights = _surveyed("sce", parameters, [model[name] for model in case.models], base)[-1]
        found[f"weights.{name}"] = torch.tensor(weights)
    return Answer(found)


ADAPTERS: dict[str, Adapter] = {**{f"mergekit/{method_id}-": _mergekit(method_id) for method_id in METHODS}, "sce/": _sce}
