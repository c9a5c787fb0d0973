"""Merge methods: registry and engine over tensors in memory, read in small odd pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.methods import get
from tests.golden.cases import Adapter, Answer, Case

PIECE = 37


class GivenUniforms:
    """The file's uniform numbers instead of ours."""

    def __init__(self, case: Case) -> None:
        self._numbers = [case.tensors(f"data.model{stream}.uniform") for stream in range(len(case.models))]

    def numbers(self, name: str, stream: int, start: int, stop: int) -> torch.Tensor:
        return self._numbers[stream][name].flatten()[start:stop]

    def describe(self) -> Any:
        return "golden"


def run(method_id: str, case: Case, shared: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> Answer:
    """Resolve the parameters as a recipe would, merge, and read every tensor in pieces."""
    method = get(method_id)
    labels = [f"model{position}" for position in range(len(case.models))]
    parameters, faults = method.resolve(shared, each, labels)
    assert faults == []
    base = case.tensors("base")
    merged = MergedCheckpoint(
        method,
        [TensorsCheckpoint(tensors, label=label) for tensors, label in zip(case.models, labels, strict=True)],
        TensorsCheckpoint(base, label="base") if base else None,
        parameters,
        uniform_source=GivenUniforms(case) if case.tensors("data.model0.uniform") else None,
    )
    answer = {}
    for name in merged.names():
        info = merged.info(name)
        pieces = [
            merged.read(name, start, min(start + PIECE, info.numel)).clone() for start in range(0, info.numel, PIECE)
        ]
        answer[name] = torch.cat(pieces).view(info.shape)
    return Answer(answer)


def _mergekit(method_id: str, **fixed: Any) -> Adapter:
    return lambda case: run(method_id, case, {**case.params["global"], **fixed}, case.params["per_model"])


def _published_ties(case: Case) -> Answer:
    """One threshold per model; the authors keep one entry more than floor(k N), which is said here as a density."""
    params = case.params
    positions = sum(tensor.numel() for tensor in case.models[0].values())
    share = params["k"] / 100 if params["k"] > 1 else params["k"]
    shared = {
        "weight": 1.0,
        "density": (int(share * positions) + 1) / positions,
        "lambda": params["scaling_coef"],
        "normalize": params["merge_func"] == "dis-mean",
        "trim_scope": "model",
        "zero_sign": "majority",
    }
    return run("ties", case, shared, [{} for _ in case.models])


def _task_arithmetic(case: Case) -> Answer:
    weights = [{"weight": float(weight)} for weight in case.params["weights"]]
    return run("task_arithmetic", case, {"lambda": case.params["scaling_coef"]}, weights)


ADAPTERS: dict[str, Adapter] = {
    "mergekit/linear-": _mergekit("linear"),
    "mergekit/slerp-": _mergekit("slerp"),
    "mergekit/task_arithmetic-": _mergekit("task_arithmetic"),
    "mergekit/ties-": _mergekit("ties"),
    "mergekit/dare_ties-": _mergekit("dare_ties"),
    "mergekit/model_stock-": _mergekit("model_stock", clip_ratio=False),
    "task_arithmetic/": _task_arithmetic,
    "ties/global_": _published_ties,
}
