"""Methods on task vectors, as their authors and mergekit state them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.checkpoint import Checkpoint, MergedCheckpoint, ParameterSource
from modelglue.methods import get
from tests.golden.adapters.merge_methods import GivenUniforms, answer, base_of, checkpoints, mergekit, resolved, run
from tests.golden.cases import Adapter, Answer, Case

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class ByTensor(ParameterSource):
    """Authors who count entries their way, tensor by tensor: said as fractions (density, gamma) of ours."""

    values: Mapping[str, Any]
    counts: Mapping[str, Sizes]
    sizes: Sizes

    def for_tensor(self, name: str) -> Mapping[str, Any]:
        own = {key: [fraction(counts[name], self.sizes[name])] * len(self.values["weight"]) for key, counts in self.counts.items()}
        return {**self.values, **own}

    def describe(self) -> Any:
        return {**self.values, "counts": {key: dict(counts) for key, counts in self.counts.items()}}


def fraction(count: int, size: int) -> float:
    """A fraction that makes `count` of `size` entries, out of reach of rounding."""
    return min((count + 0.5) / size, 1.0)


def sizes_of(case: Case) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in case.tensors("base").items()}


def run_by_tensor(method_id: str, case: Case, shared: Mapping[str, Any], counts: Mapping[str, Sizes], sizes: Sizes) -> Answer:
    values = resolved(method_id, shared, [{} for _ in case.models])
    return answer(MergedCheckpoint(get(method_id), checkpoints(case), base_of(case), ByTensor(values, counts, sizes)))


def _ties(case: Case) -> Answer:
    """One threshold per model; the authors keep one entry more than floor(k N), and all that equal it."""
    params = case.params
    positions = sum(sizes_of(case).values())
    share = params["k"] / 100 if params["k"] > 1 else params["k"]
    shared = {
        "weight": 1.0,
        "density": fraction(int(share * positions) + 1, positions),
        "lambda": params["scaling_coef"],
        "normalize": params["merge_func"] == "dis-mean",
        "agreeing": "largest" if params["merge_func"] == "dis-max" else "sum",
        "trim_scope": "model",
        "trim_ties": "all",
        "zero_sign": "majority",
    }
    return run("ties", case, shared, [{} for _ in case.models])


def _ties_per_tensor(case: Case) -> Answer:
    """The authors keep everything from the int(numel * rate)-th smallest on."""
    sizes = sizes_of(case)
    counts = {name: size - int(size * case.params["trim_rate"]) + 1 for name, size in sizes.items()}
    shared = {"weight": 1.0, "lambda": case.params["alpha"], "trim_ties": "all"}
    return run_by_tensor("ties", case, shared, {"density": counts}, sizes)


def _task_arithmetic(case: Case) -> Answer:
    weights = [{"weight": float(weight)} for weight in case.params["weights"]]
    return run("task_arithmetic", case, {"lambda": case.params["scaling_coef"]}, weights)


def _dare(case: Case) -> Answer:
    """Every model pruned by itself, then merged: a merge of merges."""
    base = base_of(case)
    params = case.params
    sizes = sizes_of(case)
    drops = [case.tensors(f"data.model{number}.drop") for number in range(len(case.models))]
    pruned: list[Checkpoint] = []
    for number, model in enumerate(checkpoints(case)):
        if params.get("mask_strategy") == "magnitude":
            counts = {name: size - int(size * params["mask_rate"]) for name, size in sizes.items()}
            source = ByTensor(resolved("ties", {"weight": 1.0}, [{}]), {"density": counts}, sizes)
            pruned.append(MergedCheckpoint(get("ties"), [model], base, source))
            continue
        shared = {"density": 1 - params["mask_rate"], "weight": 1.0, "rescale": params["rescale"], "rescale_by": "inverse"}
        given = GivenUniforms([{name: drop.float() for name, drop in drops[number].items()}])  # 1 = dropped, 0 = kept
        values = resolved("dare_linear", shared, [{}])
        pruned.append(MergedCheckpoint(get("dare_linear"), [model], base, values, uniform_source=given))
    each = [{"weight": 1.0} for _ in pruned]
    if params["merge"] == "average":
        return answer(MergedCheckpoint(get("linear"), pruned, None, resolved("linear", {}, each)))
    values = resolved("task_arithmetic", {"lambda": params["scaling_coef"]}, each)
    return answer(MergedCheckpoint(get("task_arithmetic"), pruned, base, values))


def _della(case: Case) -> Answer:
    """The authors divide every entry by its own probability."""
    params = case.params
    shared = {
        "density": params["density"],
        "epsilon": params["epsilon"],
        "lambda": params["lambda_"],
        "normalize": params["normalize"],
        "rescale": params["rescale"],
        "rescale_by": "inverse",
    }
    each: Sequence[Mapping[str, Any]] = [{"weight": float(weight)} for weight in params["weights"]]
    return run(params["method"], case, shared, each)


def _breadcrumbs(case: Case) -> Answer:
    params = case.params
    if params["scope"] == "row":
        sizes = {name: tensor.shape[-1] for name, tensor in case.tensors("base").items()}
        counts = {
            "density": {name: int(size * params["keep"]) for name, size in sizes.items()},
            "gamma": {name: int(size * params["remove_top"]) for name, size in sizes.items()},
        }
        return run_by_tensor("breadcrumbs", case, {"weight": 1.0, "lambda": params["alpha"], "trim_scope": "row"}, counts, sizes)
    sizes = sizes_of(case)
    small = {name: int(size * params["bottom_mask_rate"]) for name, size in sizes.items()}
    large = {name: int(size * (1 - params["density"])) - small[name] for name, size in sizes.items()}
    # from the small-th smallest on, which stays
    kept = {name: size - large[name] - small[name] + 1 for name, size in sizes.items()}
    return run_by_tensor("breadcrumbs", case, {"weight": 1.0, "lambda": params["lambda_"]}, {"density": kept, "gamma": large}, sizes)


ADAPTERS: dict[str, Adapter] = {
    **{
        f"mergekit/{method}-": mergekit(method)
        for method in (
            "task_arithmetic",
            "ties",
            "dare_linear",
            "dare_ties",
            "della",
            "della_linear",
            "breadcrumbs",
            "breadcrumbs_ties",
        )
    },
    "breadcrumbs/": _breadcrumbs,
    "dare/": _dare,
    "della/": _della,
    "task_arithmetic/": _task_arithmetic,
    "ties-per-tensor/": _ties_per_tensor,
    "ties/": _ties,
}
