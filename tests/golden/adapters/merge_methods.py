"""Merge methods: registry and engine over tensors in memory, read in small odd pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelglue.checkpoint import Checkpoint, MergedCheckpoint, TensorsCheckpoint
from modelglue.methods import get
from tests.golden.cases import Adapter, Answer, Case

PIECE = 37


@dataclass(frozen=True)
class GivenUniforms:
    """The file's uniform numbers instead of ours, by position of the model."""

    numbers_of: Sequence[Mapping[str, torch.Tensor]]

    def numbers(self, name: str, stream: int, start: int, stop: int) -> torch.Tensor:
        return self.numbers_of[stream][name].flatten()[start:stop]

    def describe(self) -> Any:
        return "golden"


def checkpoints(case: Case) -> list[Checkpoint]:
    return [TensorsCheckpoint(tensors, label=f"model{number}") for number, tensors in enumerate(case.models)]


def base_of(case: Case) -> Checkpoint | None:
    tensors = case.tensors("base")
    return TensorsCheckpoint(tensors, label="base") if tensors else None


def resolved(method_id: str, shared: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters as a recipe would resolve them."""
    values, faults = get(method_id).resolve(shared, each, [f"model{number}" for number in range(len(each))])
    assert faults == []
    return values


def answer(merged: Checkpoint) -> Answer:
    """Every tensor, read in pieces."""
    found = {}
    for name in merged.names():
        info = merged.info(name)
        pieces = [merged.read(name, start, min(start + PIECE, info.numel)).clone() for start in range(0, info.numel, PIECE)]
        found[name] = torch.cat(pieces).view(info.shape)
    return Answer(found)


def run(method_id: str, case: Case, shared: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> Answer:
    uniforms = [case.tensors(f"data.model{number}.uniform") for number in range(len(case.models))]
    merged = MergedCheckpoint(
        get(method_id),
        checkpoints(case),
        base_of(case),
        resolved(method_id, shared, each),
        uniform_source=GivenUniforms(uniforms) if uniforms[0] else None,
    )
    return answer(merged)


def mergekit(method_id: str) -> Adapter:
    """A case of mergekit's: its parameters, and where they say nothing what its recipes mean."""
    return lambda case: run(method_id, case, {**get(method_id).mergekit, **case.params["global"]}, case.params["per_model"])


def _model_stock(case: Case) -> Answer:
    shared = {"clip_ratio": case.params["clamp_t"], "angle_average": "angle"}
    return run("model_stock", case, shared, [{} for _ in case.models])


ADAPTERS: dict[str, Adapter] = {
    "mergekit/linear-": mergekit("linear"),
    "mergekit/slerp-": mergekit("slerp"),
    "mergekit/model_stock-": mergekit("model_stock"),
    "model_stock/": _model_stock,
}
