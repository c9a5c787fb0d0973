"""Merge methods: registry and engine over tensors in memory, read in small odd pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelglue.checkpoint import Checkpoint, MergedCheckpoint, ParameterSource, TensorsCheckpoint
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


@dataclass(frozen=True)
class DensityByTensor(ParameterSource):
    """Authors who round the number of kept entries their way, tensor by tensor: said as a density of ours."""

    values: Mapping[str, Any]
    counts: Mapping[str, int]
    sizes: Mapping[str, int]

    def for_tensor(self, name: str) -> Mapping[str, Any]:
        return {**self.values, "density": [_density(self.counts[name], self.sizes[name])] * len(self.values["weight"])}

    def describe(self) -> Any:
        return {**self.values, "counts": dict(self.counts)}


def _density(count: int, size: int) -> float:
    """A density that keeps `count` of `size` entries, out of reach of rounding."""
    return min((count + 0.5) / size, 1.0)


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


def _mergekit(method_id: str, **fixed: Any) -> Adapter:
    return lambda case: run(method_id, case, {**case.params["global"], **fixed}, case.params["per_model"])


def _published_ties(case: Case) -> Answer:
    """One threshold per model; the authors keep one entry more than floor(k N)."""
    params = case.params
    positions = sum(tensor.numel() for tensor in case.models[0].values())
    share = params["k"] / 100 if params["k"] > 1 else params["k"]
    shared = {
        "weight": 1.0,
        "density": _density(int(share * positions) + 1, positions),
        "lambda": params["scaling_coef"],
        "normalize": params["merge_func"] == "dis-mean",
        "trim_scope": "model",
        "zero_sign": "majority",
    }
    return run("ties", case, shared, [{} for _ in case.models])


def _ties_per_tensor(case: Case) -> Answer:
    """The authors keep everything from the int(numel * rate)-th smallest on."""
    sizes = {name: tensor.numel() for name, tensor in case.tensors("base").items()}
    counts = {name: size - int(size * case.params["trim_rate"]) + 1 for name, size in sizes.items()}
    values = resolved("ties", {"weight": 1.0, "lambda": case.params["alpha"]}, [{} for _ in case.models])
    parameters = DensityByTensor(values, counts, sizes)
    return answer(MergedCheckpoint(get("ties"), checkpoints(case), base_of(case), parameters))


def _task_arithmetic(case: Case) -> Answer:
    weights = [{"weight": float(weight)} for weight in case.params["weights"]]
    return run("task_arithmetic", case, {"lambda": case.params["scaling_coef"]}, weights)


def _dare(case: Case) -> Answer:
    """Every model pruned by itself, then merged: a merge of merges. With one model the election keeps everything."""
    base = base_of(case)
    params = case.params
    sizes = {name: tensor.numel() for name, tensor in case.tensors("base").items()}
    drops = [case.tensors(f"data.model{number}.drop") for number in range(len(case.models))]
    pruned: list[Checkpoint] = []
    for number, model in enumerate(checkpoints(case)):
        if params.get("mask_strategy") == "magnitude":
            counts = {name: size - int(size * params["mask_rate"]) for name, size in sizes.items()}
            source = DensityByTensor(resolved("ties", {"weight": 1.0}, [{}]), counts, sizes)
            pruned.append(MergedCheckpoint(get("ties"), [model], base, source))
            continue
        shared = {"density": 1 - params["mask_rate"], "weight": 1.0, "rescale": params["rescale"], "rescale_by": "inverse"}
        given = GivenUniforms([{name: drop.float() for name, drop in drops[number].items()}])  # 1 = dropped, 0 = kept
        values = resolved("dare_ties", shared, [{}])
        pruned.append(MergedCheckpoint(get("dare_ties"), [model], base, values, uniform_source=given))
    each = [{"weight": 1.0} for _ in pruned]
    if params["merge"] == "average":
        return answer(MergedCheckpoint(get("linear"), pruned, None, resolved("linear", {}, each)))
    values = resolved("task_arithmetic", {"lambda": params["scaling_coef"]}, each)
    return answer(MergedCheckpoint(get("task_arithmetic"), pruned, base, values))


def _model_stock(case: Case) -> Answer:
    shared = {"clip_ratio": case.params["clamp_t"], "angle_average": "angle"}
    return run("model_stock", case, shared, [{} for _ in case.models])


ADAPTERS: dict[str, Adapter] = {
    "mergekit/linear-": _mergekit("linear"),
    "mergekit/slerp-": _mergekit("slerp"),
    "mergekit/task_arithmetic-": _mergekit("task_arithmetic"),
    "mergekit/ties-": _mergekit("ties"),
    "mergekit/dare_ties-": _mergekit("dare_ties"),
    "mergekit/model_stock-": _mergekit("model_stock", clip_ratio=False),
    "dare/": _dare,
    "model_stock/": _model_stock,
    "task_arithmetic/": _task_arithmetic,
    "ties-per-tensor/": _ties_per_tensor,
    "ties/global_": _published_ties,
}
