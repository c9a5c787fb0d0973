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
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Merge models by a recipe.

    Streams chunk by chunk, so memory does not grow with the models. Killed at any moment, it continues when run again;
    nothing half-written ever stands under the final name. A finished output of the same recipe is left alone.

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
    overwrite
        Replace an existing model folder; a folder that holds no model is refused.
    quiet
        No progress, no summary, no warnings.
    json
        Print the summary as JSON.
    """
    from modelglue.checkpoint import save
    from modelglue.cli.console import byte_progress, print_json, print_warnings, size, stderr
    from modelglue.recipe import build, read_with_models, warnings_of

    start = time.monotonic()
    shard_bytes = _bytes(shard_size, "--shard-size")
    limit = None if memory is None else _bytes(memory, "--memory")
    read, models = read_with_models(recipe)
    merged = build(read, resolve=models.__getitem__)
    warnings = warnings_of(list(models.values()))
    if not quiet:
        print_warnings(stderr(), warnings)
    with byte_progress(out.name, quiet=quiet or json) as progress:
        report = save(
            merged, out, workers=workers, memory=limit, device=device, executor=executor, shard_bytes=shard_bytes, overwrite=overwrite,
            progress=progress,
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


def _bytes(text: str, option: str) -> int:
    from modelglue.errors import UserError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}
    upper = text.strip().upper()
    for unit, factor in units.items():
        number = upper.removesuffix(unit).strip()
        if upper.endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) * factor >= 1:
            return int(float(number) * factor)
    raise UserError(f"{option} is '{text}'; allowed is a positive size such as 500MB, 5GB or 2GiB.")
