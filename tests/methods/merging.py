"""One tensor in, one tensor out: the engine with as little around it as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.methods import get

Tensor = torch.Tensor


def merge(
    method_id: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    each: Mapping[str, Sequence[float]] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Tensor:
    """`each` holds per-model parameters as lists, `shared` the global ones (`lambda_` for lambda), `options` the engine's."""
    method = get(method_id)
    own = [{name: values[i] for name, values in (each or {}).items()} for i in range(len(models))]
    given = {name.rstrip("_"): value for name, value in shared.items()}
    parameters, faults = method.resolve(given, own, [f"model{i}" for i in range(len(models))])
    assert faults == []
    return MergedCheckpoint(
        method,
        [TensorsCheckpoint({"t": model}, label=f"model{i}") for i, model in enumerate(models)],
        TensorsCheckpoint({"t": base}, label="base") if base is not None else None,
        parameters,
        **(options or {}),
    ).tensor("t")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


#: a length and a seed: enough to make tensors of
lengths = st.integers(1, 90)
seeds = st.integers(0, 2**31)
weights = st.floats(-2, 2).filter(lambda value: abs(value) > 1e-3)


def family(length: int, seed: int, models: int = 3) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it."""
    base = randn(length, seed=seed)
    return base, [base + 0.1 * randn(length, seed=seed + 1 + number) for number in range(models)]
