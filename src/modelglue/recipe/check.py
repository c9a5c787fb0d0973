"""What a merge will need and whether it will work, from headers alone: no tensor is read and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, plan_output
from modelglue.checkpoint.output.execution import Execution, execution_of
from modelglue.checkpoint.output.licence import licence_warnings, parents
from modelglue.checkpoint.output.memory import PROCESS_BYTES, WORKER_BYTES
from modelglue.checkpoint.vocabulary import AlignmentReport
from modelglue.recipe.build import build_with_warnings, read_with_models
from modelglue.recipe.mergeable import architecture, warnings_of
from modelglue.recipe.override import overridden
from modelglue.recipe.schema import Recipe, Source


@dataclass(frozen=True)
class CheckReport:
    """The answer of `check`.

    `read_bytes`: of the tensors that the merge reads, each once; `passes`: how often the method reads them. `output_bytes`: of the
    tensors that are written; `disk_bytes`: of the weight files, for which the disk must have room. `memory_bytes`: what all processes
    together hold privately, at most, torch included, as `save` reckons it.
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
    disk_bytes: int
    shards: int
    workers: int
    memory_bytes: int
    store: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    alignment: AlignmentReport | None = None


def check(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    workers: int | None = None,
    memory: int | None = None,
    strict: bool = False,
    allow_mixed: bool = False,
    truncate_vocabulary: bool = False,
) -> CheckReport:
    """Everything that `merge` would refuse before reading weights is refused here, with the same error.

    `workers` and `memory` are those of `save`; `allow_mixed` and `truncate_vocabulary` overrule the recipe. Time: headers, configs and
    tokenizers are read.
    """
    recipe, models = read_with_models(source, strict=strict, headers_only=True)
    recipe = overridden(recipe, allow_mixed=allow_mixed or None, vocabulary_mismatch="truncate" if truncate_vocabulary else None)
    built = build_with_warnings(recipe, models.__getitem__, strict=strict)
    merged = built.checkpoint
    plan = plan_output(merged)
    infos = [merged.info(name) for name in merged.names()]
    execution = execution_of(merged, plan, workers=workers, chunk=None, memory=memory, device=None, executor=None)
    found = [*recipe.warnings, *built.warnings, *warnings_of(list(models.values())), *licence_warnings(parents(merged))]
    return CheckReport(
        method=recipe.method,
        models=tuple(dict.fromkeys(one.label for one in [*(entry for part in recipe.stretches() for entry in part.models), *recipe.hops])),
        base=_label(recipe.base),
        architecture=architecture(merged),
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        read_bytes=_read_bytes(merged),
        passes=built.passes,
        output_bytes=plan.tensor_bytes,
        disk_bytes=sum(shard.size for shard in plan.shards),
        shards=len(plan.shards),
        workers=execution.division.workers,
        memory_bytes=_memory(merged, execution),
        store=", ".join(sorted({info.dtype for info in infos})),
        warnings=tuple(dict.fromkeys(found)),
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


def _memory(merged: Checkpoint, execution: Execution) -> int:
    """What the processes may hold together: a worker's most, times the workers, within what is shared out among them."""
    division = execution.division
    elements = {name: min(division.chunk, max(merged.info(name).numel, 1)) for name in merged.names()}
    largest = max((merged.working_bytes(name, count) for name, count in elements.items()), default=0)
    return PROCESS_BYTES + min(division.capacity, division.workers * (WORKER_BYTES + largest))
