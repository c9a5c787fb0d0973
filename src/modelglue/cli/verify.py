"""`modelglue verify`: is an output still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def verify(
    folder: Path,
    *,
    quick: Annotated[bool, Parameter(negative=())] = False,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Hash every tensor of an output and compare it with its record.

    The record, modelglue_record.json, is written beside every merge. Exit code 0: all is as it was written; 1: something is damaged;
    2: there is no record.

    Parameters
    ----------
    folder
        What `modelglue merge` wrote.
    quick
        Compare names, dtypes, shapes and the recipe only; hash nothing.
    workers
        Worker processes. Default: one per core, one for small models.
    json
        Print what was found as JSON.
    quiet
        No progress, no summary.
    """
    import time

    from modelglue.checkpoint.output.verify import verify as run
    from modelglue.cli.console import byte_progress, print_json, size, stdout
    from modelglue.errors import RunError, UserError

    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder. Give the folder of an output.")
    start = time.monotonic()
    with byte_progress("hashing", quiet=quiet or json) as progress:
        found = run(folder, quick=quick, workers=workers, progress=progress)
    if json:
        faults = [{"name": name, "fault": fault} for name, fault in found.faults]
        print_json({"folder": str(folder), "tensors": found.tensors, "bytes": found.bytes, "hashed": not quick, "faults": faults})
    elif found.faults:
        console = stdout()
        for name, fault in found.faults:
            console.print(f"{name}: {fault}", soft_wrap=True, markup=False)
    elif not quiet:
        what = "in the record's shapes and dtypes (not hashed)" if quick else "hold the numbers that were written"
        summary = f"{found.tensors} tensors, {size(found.bytes)}, {what}; {time.monotonic() - start:.1f} s"
        stdout().print(f"[green]ok[/]: {summary}", soft_wrap=True)
    if found.faults:
        count = f"{len(found.faults)} of its tensors and files {'is' if len(found.faults) == 1 else 'are'}"
        raise RunError(
            f"{folder}: {count} not as {'it was' if len(found.faults) == 1 else 'they were'} written. Merge it again, or restore it."
        )
