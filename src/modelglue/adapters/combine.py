"""Several adapters become one, by the combinations that PEFT names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from modelglue.adapters.arithmetic import MajoritySign, combined, weighted_sum
from modelglue.adapters.low_rank import truncated_product, truncated_svd
from modelglue.adapters.made import SIDES, Made, finite
from modelglue.adapters.written import adapter_config, write_adapter
from modelglue.checkpoint import torch_dtype
from modelglue.checkpoint.adapter import Adapter, Factors
from modelglue.checkpoint.adapter.keys import PREFIX
from modelglue.checkpoint.engine.uniform import CounterHash, UniformSource
from modelglue.checkpoint.output.staging import check_apart
from modelglue.errors import MergeError, UserError, did_you_mean

if TYPE_CHECKING:
    import torch

Mode = Literal[
    "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Combined:
    """One adapter, in memory: tensors under PEFT's keys, the config, and what the user should know."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    rank: int
    made_from: Sequence[str]
    places: Sequence[Path]
    warnings: Sequence[str] = ()

    @property
    def modules(self) -> Sequence[str]:
        """The modules that are updated, sorted."""
        return list(self.config["target_modules"])

    def write(self, directory: str | Path, *, overwrite: bool = False) -> int:
        """Write the adapter folder; returns the bytes of its weights. UserError if it exists, or touches one of the inputs."""
        directory = Path(directory)
        check_apart(directory, [(str(place), place) for place in self.places])
        key = hashlib.sha256(json.dumps([dict(self.config), list(self.made_from)], sort_keys=True).encode()).hexdigest()
        return write_adapter(directory, self.tensors, self.config, key=key, made_from=self.made_from, overwrite=overwrite)


@dataclass(frozen=True)
class _Settings:
    mode: str
    density: float
    majority_sign: MajoritySign
    rank: int
    clamp: float | None
    uniforms: UniformSource


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    mode: Mode = "cat",
    *,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    seed: int = 0,
    uniform_source: UniformSource | None = None,
    dtype: str = "F32",
) -> Combined:
    """Build one adapter from several, with weights w_t and scales c_t (alpha / rank), as PEFT's `add_weighted_adapter` does.

    `cat`: the factors stand side by side; the update is exactly sum_t w_t c_t B_t A_t and the rank the sum of the ranks.
    `linear`: A = sum_t sgn sqrt|w_t c_t| A_t, B = sum_t sqrt|w_t c_t| B_t; equal ranks; NOT the weighted sum, its product has cross terms.
    `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`: the operation on the A factors and on the B factors, weighted in the same way.
    `svd` and the others ending in `_svd`: the operation on the whole updates c_t B_t A_t with weights w_t, then the best approximation of
    rank `svd_rank` (default: the largest rank), with B = U diag(s); `svd_clamp` clamps both factors to a quantile of their entries.

    One adapter alone is scaled, whatever the mode (except `svd` with a rank). Biases of updates are summed with w_t c_t. What adapters
    replace (modules_to_save, copies of base layers, trained tokens) is kept where one adapter has it or all have the same.

    MergeError for ranks that differ where they may not, DoRA, targeted parameters, and replaced tensors that differ. Time and memory:
    those of the factors; the `_svd` modes that prune hold the whole updates of one module, and decompose one.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights, mode, density, svd_rank, svd_clamp)
    rank = _rank(adapters, mode, svd_rank)
    if len(adapters) == 1 and not (mode == "svd" and svd_rank is not None):
        mode = "linear"
        rank = _largest_rank(adapters[0])
    settings = _Settings(
        mode, 1.0 if density is None else density, majority_sign, rank, svd_clamp, uniform_source or CounterHash(seed)
    )  # fmt: skip
    made = Made(torch_dtype(dtype))
    for module in sorted({name for adapter in adapters for name in adapter.updates}):
        _combine_module(module, adapters, weights, settings, made)
    made.keep_replaced(adapters)
    bases = list(dict.fromkeys(adapter.config.base_model_name_or_path for adapter in adapters))
    if len(bases) > 1:
        made.warnings.append(f"the adapters were trained on different bases: {', '.join(str(base) for base in bases)}.")
    if any(weight != 1 for weight in weights) and made.saved:
        made.warnings.append(f"{made.saved[0]} is taken over whole; weights apply to low-rank updates only.")
    config = adapter_config(
        ranks=dict.fromkeys(made.modules, rank),
        scale_one=rank,
        base=bases[0],
        task_type=adapters[0].config.raw.get("task_type"),
        fan_in_fan_out=adapters[0].config.fan_in_fan_out,
        lora_bias=made.lora_bias,
        bias=next((adapter.config.bias for adapter in adapters if adapter.config.bias != "none"), "none"),
        modules_to_save=sorted({module for adapter in adapters for module in adapter.config.modules_to_save}),
        trainable_token_indices=made.tokens,
    )
    names = [str(adapter.path) for adapter in adapters]
    return Combined(made.tensors, config, rank, names, [adapter.path for adapter in adapters], made.warnings)


def _check(
    adapters: Sequence[Adapter], weights: Sequence[float], mode: str, density: float | None, rank: int | None, clamp: float | None
) -> None:
    if mode not in MODES:
        raise UserError(f"mode is '{mode}'; allowed are {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    if not adapters:
        raise UserError("there is no adapter to combine. Give one or more.")
    if len(weights) != len(adapters):
        raise UserError(f"there are {len(weights)} weights for {len(adapters)} adapters. Give one weight per adapter.")
    if bad := [weight for weight in weights if not math.isfinite(weight)]:
        raise UserError(f"a weight is {bad[0]}; allowed are finite numbers.")
    prunes = mode not in ("cat", "linear", "svd")
    if prunes and density is None:
        raise UserError(f"mode {mode} needs a density, the share of entries that it keeps. Give --density.")
    if not prunes and density is not None:
        raise UserError(f"mode {mode} prunes nothing, so it takes no density. Leave it out.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density is {density}; allowed is a number above 0, up to 1.")
    if not mode.endswith("svd") and (rank is not None or clamp is not None):
        raise UserError(f"mode {mode} decomposes nothing, so it takes neither a rank nor a clamp. Use svd, or extract at a lower rank.")
    if rank is not None and rank < 1:
        raise UserError(f"the rank is {rank}; allowed is a whole number from 1.")
    if clamp is not None and not 0 <= clamp <= 1:
        raise UserError(f"the clamp is {clamp}; allowed is a quantile from 0 to 1.")
    faults = []
    for adapter in adapters:
        if adapter.uses_dora:
            faults.append(
                f"{adapter.path}: is a DoRA adapter, which sets the norms of the weights; it is no sum. Merge adapted models instead."
            )
        elif adapter.config.target_parameters or any(update.depth for update in adapter.updates.values()):
            faults.append(f"{adapter.path}: adapts parameters that are no modules, which cannot be combined. Merge adapted models instead.")
        else:
            faults += [
                f"{adapter.path}: '{name}' has rank {rank}, the config gives it {adapter.config.rank(name)}. Fetch the adapter again."
                for name, rank in ((name, adapter.info(update.A).shape[0]) for name, update in adapter.updates.items())
                if rank != adapter.config.rank(name)
            ]
        if adapter.config.fan_in_fan_out != adapters[0].config.fan_in_fan_out:
            faults.append(f"{adapter.path}: stores its layers transposed (fan_in_fan_out) and {adapters[0].path} does not, or the reverse.")
    if faults:
        raise MergeError("\n".join(dict.fromkeys(faults)))


def _largest_rank(adapter: Adapter) -> int:
    """The rank that PEFT reserves for a combination: the config's, also where no module has it any more."""
    return int(max([adapter.config.r, *adapter.config.rank_pattern.values()]))


def _rank(adapters: Sequence[Adapter], mode: str, svd_rank: int | None) -> int:
    ranks = [_largest_rank(adapter) for adapter in adapters]
    if mode == "cat":
        return sum(ranks)
    if mode.endswith("svd"):
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        listed = ", ".join(f"{adapter.path} has {rank}" for adapter, rank in zip(adapters, ranks, strict=True))
        raise MergeError(f"{mode}: the adapters have different ranks ({listed}). Use cat or svd.")
    return ranks[0]


def _combine_module(module: str, adapters: Sequence[Adapter], weights: Sequence[float], settings: _Settings, made: Made) -> None:
    """The combination of one module, from the adapters that have it."""
    having = [
        (adapter, weight, stream)
        for stream, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
        if module in adapter.updates
    ]
    updates = [adapter.updates[module] for adapter, _, _ in having]
    found = [adapter.factors(module) for adapter, _, _ in having]
    shapes = {(update.embedding, *factors.B.shape[:1], *factors.A.shape[1:]) for update, factors in zip(updates, found, strict=True)}
    convolution = any(len(adapter.info(update.A).shape) != 2 for (adapter, _, _), update in zip(having, updates, strict=True))
    if len(shapes) > 1 or convolution:
        listed = ", ".join(
            f"{adapter.path} {list(one.B.shape)} x {list(one.A.shape)}" for (adapter, _, _), one in zip(having, found, strict=True)
        )
        reason = "are factors of a convolution" if convolution else "have different shapes"
        raise MergeError(f"the updates of '{module}' {reason} ({listed}), which cannot be combined. Merge adapted models instead.")
    scaled = [weight * factors.scale for (_, weight, _), factors in zip(having, found, strict=True)]
    streams = [stream for _, _, stream in having]
    if settings.mode == "cat":
        A, B = _side_by_side(found, scaled)
    elif settings.mode.endswith("svd"):
        A, B = _decomposed(module, found, [weight for _, weight, _ in having], streams, settings)
    else:
        A, B = _by_factor(module, found, scaled, streams, settings)
    made.add(module, A, B, settings.rank, updates[0].embedding)
    biases = [
        (adapter.tensor(update.bias).float(), c) for (adapter, _, _), update, c in zip(having, updates, scaled, strict=True) if update.bias
    ]
    if biases:
        made.lora_bias = True
        made.tensors[f"{PREFIX}{module}.lora_B.bias"] = finite(weighted_sum(*map(list, zip(*biases, strict=True))).to(made.dtype), module)


def _side_by_side(found: Sequence[Factors], scaled: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    A = torch.cat([c * factors.A for factors, c in zip(found, scaled, strict=True)], 0)
    return A, torch.cat([factors.B for factors in found], 1)


def _by_factor(
    module: str, found: Sequence[Factors], scaled: Sequence[float], streams: Sequence[int], settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation on the A factors and on the B factors; the sign of a weight goes to one side only."""
    ranks = {factors.A.shape[0] for factors in found}
    if len(ranks) > 1:
        raise MergeError(f"{settings.mode}: the updates of '{module}' have different ranks ({sorted(ranks)}). Use cat or svd.")
    roots = [math.sqrt(abs(c)) for c in scaled]
    results = []
    for side in SIDES:
        tensors = [factors.A if side == "lora_A" else factors.B for factors in found]
        weights = [math.copysign(root, c) if side == "lora_A" else root for root, c in zip(roots, scaled, strict=True)]
        results.append(_operated(settings.mode, f"{module}.{side}", tensors, weights, streams, settings))
    return results[0], results[1]


def _decomposed(
    module: str, found: Sequence[Factors], weights: Sequence[float], streams: Sequence[int], settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation on whole updates, and its best approximation: A = V^T, B = U diag(s)."""
    operation = settings.mode.removesuffix("svd").removesuffix("_") or "linear"
    if operation == "linear" and settings.clamp is None:  # a weighted sum is low-rank already: no update is ever formed
        lefts = [weight * factors.scale * factors.B.double() for factors, weight in zip(found, weights, strict=True)]
        best = truncated_product(lefts, [factors.A for factors in found], settings.rank)
    else:  # a clamp depends on the signs of singular vectors, which are the library's only if the same matrix is decomposed
        deltas = [(factors.B @ factors.A) * factors.scale for factors in found]
        merged = finite(_operated(operation, module, deltas, weights, streams, settings), module)
        best = truncated_svd(merged, max_rank=settings.rank, exact=True)
    A, B = best.V.T, best.U * best.s
    if settings.clamp is not None:
        high = _quantile([A, B], settings.clamp)
        A, B = A.clamp(-high, high), B.clamp(-high, high)
    return A, B


def _operated(
    operation: str, name: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], streams: Sequence[int], settings: _Settings
) -> torch.Tensor:
    size = tensors[0].numel()

    def uniform(position: int) -> torch.Tensor:
        return settings.uniforms.numbers(name, streams[position], 0, size).view(tensors[position].shape)

    return combined(operation, tensors, weights, density=settings.density, majority_sign=settings.majority_sign, uniform=uniform)


def _quantile(tensors: Sequence[torch.Tensor], share: float) -> float:
    """The quantile of all entries together, interpolated between the two nearest (torch's own stops at 16 million entries)."""
    import torch

    values = torch.cat([tensor.flatten() for tensor in tensors])
    position = share * (values.numel() - 1)
    lower = float(values.kthvalue(int(position) + 1).values)
    upper = float(values.kthvalue(min(int(position) + 2, values.numel())).values)
    return lower + (upper - lower) * (position - int(position))
