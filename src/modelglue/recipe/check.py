"""What a merge will need and whether it will work, from headers alone: no tensor is read and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import FLOATING, plan_output
from modelglue.methods import get
from modelglue.recipe.build import build, read_with_models
from modelglue.recipe.mergeable import architecture, warnings_of
from modelglue.recipe.schema import Recipe, unique_labels
from modelglue.settings import CHUNK_ELEMENTS, SMALL_OUTPUT_BYTES, default_workers

#: float32 buffers that one chunk needs besides one per input: output, votes, masks
_TEMPORARIES = 8


@dataclass(frozen=True)
class CheckReport:
    """The answer of `check`."""

    method: str
    models: tuple[str, ...]
    base: str | None
    architecture: str | None
    tensors: int
    parameters: int
    read_bytes: int
    passes: int
    output_bytes: int
    workers: int
    memory_bytes: int
    store: str
    warnings: tuple[str, ...]


def check(source: str | Path | Mapping[str, Any] | Recipe, *, workers: int | None = None) -> CheckReport:
    """Everything that `merge` would refuse before reading weights is refused here, with the same error."""
    recipe, models = read_with_models(source)
    merged = build(recipe, resolve=models.__getitem__)
    plan = plan_output(merged)
    infos = [merged.info(name) for name in merged.names()]
    workers = workers or (1 if plan.tensor_bytes < SMALL_OUTPUT_BYTES else default_workers())
    largest = max((info.numel for info in infos if info.dtype in FLOATING), default=0)
    return CheckReport(
        method=recipe.method,
        models=tuple(entry.label for entry in recipe.models),
        base=recipe.base if isinstance(recipe.base, str | None) else f"({recipe.base.method} merge)",
        architecture=architecture(merged),
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        read_bytes=sum(
            model.info(name).nbytes for reference, model in models.items() if reference in _read(recipe) for name in model.names()
        ),
        passes=_passes(recipe),
        output_bytes=plan.tensor_bytes,
        workers=workers,
        memory_bytes=workers * 4 * _held(recipe, largest),
        store=", ".join(sorted({info.dtype for info in infos})),
        warnings=tuple(warnings_of(list(models.values()))),
    )


def _nodes(recipe: Recipe) -> list[str | Recipe]:
    """The inputs that the method computes with: a base that only gives config and tokenizer is none."""
    base = [recipe.base] if recipe.base is not None and get(recipe.method).takes_base else []
    return [*base, *(entry.model for entry in recipe.models)]


def _read(recipe: Recipe) -> set[str]:
    """References whose weights are read."""
    return {name for node in _nodes(recipe) for name in ([node] if isinstance(node, str) else _read(node))}


def _values(recipe: Recipe) -> Mapping[str, Any]:
    values, _ = get(recipe.method).resolve(recipe.parameters, [entry.own for entry in recipe.models], unique_labels(recipe))
    return values


def _passes(recipe: Recipe) -> int:
    """2 if a survey reads the inputs before the merge does, here or in a nested recipe."""
    if get(recipe.method).rounds(_values(recipe)):
        return 2
    return max((_passes(node) for node in _nodes(recipe) if isinstance(node, Recipe)), default=1)


def _held(recipe: Recipe, largest: int) -> int:
    """Elements that one worker holds at once: a chunk of every input and the temporaries, and those of the nested merge it reads."""
    chunk = largest if get(recipe.method).unit(_values(recipe)) == "matrix" else min(CHUNK_ELEMENTS, largest)
    nodes = _nodes(recipe)
    return chunk * (len(nodes) + _TEMPORARIES) + max((_held(node, largest) for node in nodes if isinstance(node, Recipe)), default=0)
