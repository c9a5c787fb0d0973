"""`modelglue merge`: a recipe in, a model folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def merge(
    recipe: Path,
    out: Path,
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    memory: str | None = None,
    device: str = "cpu",
    executor: str = "local",
    shard_size: str = "5GB",
    seed: Annotated[int | None, Parameter(validator=Number(gte=0))] = None,
    allow_mixed: Annotated[bool, Parameter(negative=())] = False,
    truncate_vocabulary: Annotated[bool, Parameter(negative=())] = False,
    strict: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Merge models by a recipe.

    Streams chunk by chunk, so memory does not grow with the models. Killed at any moment, it continues when run again;
    nothing half-written ever stands under the final name. A finished output of the same recipe is left alone.

    mergekit's own flags (--cuda, --allow-crimes, --lazy-unpickle and so on) are accepted as well: what they mean here is done, and
    what means nothing here is answered with one line.

    Parameters
    ----------
    recipe
        YAML in modelglue's dialect, or mergekit's.
    out
        Folder to write: config, tokenizer, weights, recipe and card.
    workers
        Worker processes. Default: one per core, one for small models.
    memory
        Limit of private memory over all processes, such as 2GiB; workers and chunks are chosen for it. Default: 1GB, or what one
        worker needs if that is more.
    device
        Where to compute: cpu, cuda, cuda:0,cuda:1 (one worker each), mps or another device of torch.
    executor
        Where workers run: local (this machine), ray or ray://HOST:PORT (a Ray cluster on a shared disk; needs modelglue[ray]).
    shard_size
        Largest weight file, such as 500MB or 5GB.
    seed
        Seed of random methods. Default: the recipe's.
    allow_mixed
        Merge models of different classes all the same, where their tensors fit.
    truncate_vocabulary
        Where vocabularies differ, keep the rows that all models have.
    strict
        Treat warnings about the recipe as errors.
    overwrite
        Replace an existing model folder; a folder that holds no model is refused.
    quiet
        No progress, no summary, no warnings.
    json
        Print the summary as JSON.
    """
    from modelglue.checkpoint import save
    from modelglue.checkpoint.output.licence import licence_warnings, parents
    from modelglue.cli.console import byte_progress, parse_size, print_json, print_warnings, size, stderr
    from modelglue.recipe import build_with_warnings, read_with_models, warnings_of
    from modelglue.recipe.override import overridden

    start = time.monotonic()
    shard_bytes = parse_size(shard_size, "--shard-size")
    memory_bytes = None if memory is None else parse_size(memory, "--memory")
    read, models = read_with_models(recipe, strict=strict)
    changed = overridden(read, seed=seed, allow_mixed=allow_mixed or None, vocabulary_mismatch="truncate" if truncate_vocabulary else None)
    built = build_with_warnings(changed, models.__getitem__, strict=strict)
    found = [*read.warnings, *built.warnings, *warnings_of(list(models.values())), *licence_warnings(parents(built.checkpoint))]
    warnings = list(dict.fromkeys(found))
    if not quiet:
        print_warnings(stderr(), warnings)
    with byte_progress(out.name, quiet=quiet or json) as progress:
        report = save(
            built.checkpoint, out, workers=workers, memory=memory_bytes, device=device, executor=executor, shard_bytes=shard_bytes,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if json:
        print_json(
            {
                "directory": str(report.directory), "tensors": report.tensors, "bytes": report.bytes, "shards": report.shards,
                "resumed_bytes": report.resumed_bytes, "already_complete": report.already_complete, "warnings": warnings,
            }
        )  # fmt: skip
    elif not quiet:
        state = "already complete" if report.already_complete else f"{time.monotonic() - start:.1f} s"
        resumed = f", {size(report.resumed_bytes)} of it from an earlier run" if report.resumed_bytes else ""
        stderr().print(f"{out}: {report.tensors} tensors, {size(report.bytes)}{resumed} ({state})", soft_wrap=True, markup=False)
