"""What a merge will need and whether it will work, from headers alone: no tensor is read and torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import FLOATING, Checkpoint, plan_output
from modelglue.checkpoint.vocabulary import AlignmentReport
from modelglue.methods import get
from modelglue.recipe.assemble import Built, key_of
from modelglue.recipe.build import build_with_warnings, read_with_models
from modelglue.recipe.mergeable import architecture, warnings_of
from modelglue.recipe.schema import Into, Recipe, Source
from modelglue.settings import CHUNK_ELEMENTS, SMALL_OUTPUT_BYTES, default_workers

#: float32 buffers that one chunk needs besides one per input: output, votes, masks
_TEMPORARIES = 8


@dataclass(frozen=True)
class CheckReport:
    """The answer of `check`.

    `read_bytes`: of the tensors that the merge reads, each once; `passes`: how often the method reads them. `output_bytes`: of the
    weights that are written, and that the disk must have room for. `memory_bytes`: chunks that all workers hold at once.
    `alignment`: what becomes of the rows of the embeddings, where the recipe has a tokenizer section. `notes`: what the recipe means
    and does not say.
    """

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
    notes: tuple[str, ...] = ()
    alignment: AlignmentReport | None = None


def check(source: str | Path | Mapping[str, Any] | Recipe, *, workers: int | None = None, strict: bool = False) -> CheckReport:
    """Everything that `merge` would refuse before reading weights is refused here, with the same error."""
    recipe, models = read_with_models(source, strict=strict)
    built = build_with_warnings(recipe, models.__getitem__, strict=strict)
    merged = built.checkpoint
    plan = plan_output(merged)
    infos = [merged.info(name) for name in merged.names()]
    workers = workers or (1 if plan.tensor_bytes < SMALL_OUTPUT_BYTES else default_workers())
    largest = max((info.numel for info in infos if info.dtype in FLOATING), default=0)
    return CheckReport(
        method=recipe.method,
        models=tuple(dict.fromkeys(entry.label for stretch in recipe.stretches() for entry in stretch.models)),
        base=_label(recipe.base),
        architecture=architecture(merged),
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        read_bytes=_read_bytes(merged),
        passes=2 if any(cost.surveyed for cost in built.costs.values()) else 1,
        output_bytes=plan.tensor_bytes,
        workers=workers,
        memory_bytes=workers * 4 * _held(recipe, built, largest),
        store=", ".join(sorted({info.dtype for info in infos})),
        warnings=(*recipe.warnings, *built.warnings, *warnings_of(list(models.values()))),
        notes=recipe.notes,
        alignment=built.alignment,
    )


def _label(base: str | Recipe | Source | None) -> str | None:
    if isinstance(base, Source):
        return base.label
    return base if isinstance(base, str | None) else f"({base.method} merge)"


def _read_bytes(merged: Checkpoint) -> int:
    """Bytes of every tensor on disk that is read, counted once."""
    found = {(id(origin), name): origin.info(name).nbytes for output in merged.names() for origin, name in merged.origins(output)}
    return sum(found.values())


def _nested(recipe: Recipe) -> Iterator[Recipe]:
    """The recipes whose results the method computes with: a base that only gives config and tokenizer is none."""
    for place, source in recipe.inputs():
        if place == ("base",) and not get(recipe.method).takes_base:
            continue
        node = source.model if isinstance(source, Source | Into) else source
        if isinstance(node, Recipe):
            yield node


def _held(recipe: Recipe, built: Built, largest: int) -> int:
    """Elements that one worker holds at once: a chunk of every input and the temporaries, and those of the nested merge it reads."""
    cost = built.costs[key_of(recipe)]
    chunk = largest if cost.whole else min(CHUNK_ELEMENTS, largest)
    inner = max((_held(node, built, largest) for node in _nested(recipe)), default=0)
    return chunk * (cost.inputs + _TEMPORARIES) + inner
