"""What a merge will need and whether it will work, from headers alone: no tensor is read and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import FLOATING, Checkpoint
from modelglue.methods import get
from modelglue.recipe.build import build, open_reference
from modelglue.recipe.mergeable import warnings_of
from modelglue.recipe.schema import Recipe, read_recipe
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


def check(source: str | Path | Mapping[str, Any], *, workers: int | None = None) -> CheckReport:
    """Everything that `merge` would refuse before reading weights is refused here, with the same error."""
    recipe = read_recipe(source)
    folder = Path(source).parent if isinstance(source, str | Path) else None
    merged = build(recipe, relative_to=folder)
    leaves = _leaves(recipe, folder)
    infos = [merged.info(name) for name in merged.names()]
    output = sum(info.nbytes for info in infos)
    workers = workers or (1 if output < SMALL_OUTPUT_BYTES else default_workers())
    method = get(recipe.method)
    inputs = len(recipe.models) + (1 if recipe.base is not None else 0)
    largest = max((info.numel for info in infos if info.dtype in FLOATING), default=0)
    chunk = largest if "matrix" in method.units else min(CHUNK_ELEMENTS, largest)
    stored = sorted({info.dtype for info in infos})
    return CheckReport(
        method=recipe.method,
        models=tuple(entry.label for entry in recipe.models),
        base=recipe.base if isinstance(recipe.base, str) else None,
        architecture=next(iter(merged.config.get("architectures") or []), None),
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        read_bytes=sum(leaf.info(name).nbytes for leaf in leaves for name in leaf.names()),
        passes=2 if method.surveys else 1,
        output_bytes=output,
        workers=workers,
        memory_bytes=workers * chunk * 4 * (inputs + _TEMPORARIES),
        store=", ".join(stored),
        warnings=tuple(warnings_of(leaves)),
    )


def _leaves(recipe: Recipe, folder: Path | None) -> list[Checkpoint]:
    """The models on disk behind a recipe, each once."""
    found: dict[str, Checkpoint] = {}

    def visit(node: str | Recipe | None) -> None:
        if isinstance(node, str):
            if node not in found:
                found[node] = open_reference(node, folder)
        elif node is not None:
            visit(node.base)
            for entry in node.models:
                visit(entry.model)

    visit(recipe)
    return list(found.values())
