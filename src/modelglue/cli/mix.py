"""`modelglue mix`: experts in, one model out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def mix(
    recipe: Path,
    out: Path,
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    memory: str | None = None,
    shard_size: str = "5GB",
    strict: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Join models as experts of one model.

    A file of mergekit-moe is obeyed as it is: the base's attention and embeddings, every model's feed-forward networks as experts, gates
    from prompts. The output is a class that transformers and vLLM have (Mixtral, Qwen2-MoE, Qwen3-MoE, ...); it runs without modelglue.
    Experts stream chunk by chunk; killed at any moment, it continues when run again.

    Parameters
    ----------
    recipe
        YAML in mergekit-moe's dialect.
    out
        Folder to write: config, tokenizer, weights, recipe and card.
    workers
        Worker processes. Default: one per core, one for small models.
    memory
        Limit of private memory over all processes while experts are written, such as 2GiB.
    shard_size
        Largest weight file, such as 500MB or 5GB.
    strict
        Treat warnings as errors.
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
    from modelglue.errors import MergeError
    from modelglue.mixture.exports import upcycle

    start = time.monotonic()
    shard_bytes = parse_size(shard_size, "--shard-size")
    memory_bytes = None if memory is None else parse_size(memory, "--memory")
    made = upcycle(recipe)
    if strict and made.warnings:
        raise MergeError("\n".join(made.warnings))
    warnings = list(dict.fromkeys([*made.warnings, *licence_warnings(parents(made.checkpoint))]))
    if not quiet:
        print_warnings(stderr(), warnings)
    with byte_progress(out.name, quiet=quiet or json) as progress:
        report = save(
            made.checkpoint, out, workers=workers, memory=memory_bytes, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress
        )
    if json:
        print_json(
            {
                "directory": str(report.directory), "class": made.export, "tensors": report.tensors, "bytes": report.bytes,
                "shards": report.shards, "resumed_bytes": report.resumed_bytes, "already_complete": report.already_complete,
                "condition_numbers": list(made.conditions), "warnings": warnings,
            }
        )  # fmt: skip
    elif not quiet:
        state = "already complete" if report.already_complete else f"{time.monotonic() - start:.1f} s"
        text = f"{out}: {made.export}, {report.tensors} tensors, {size(report.bytes)} ({state})"
        stderr().print(text, soft_wrap=True, markup=False)
