"""`modelglue glue`: a zoo in, one model and its report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def glue(
    source: Path,
    run: Path,
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Turn a zoo into one model: group, select, merge, route, report.

    Every score is remembered in the run folder: stopped at any moment, it goes on when it is called again, and ends with the same bytes.

    Parameters
    ----------
    source
        A glue file (zoo, tasks, settings), or the recipe.yaml of an earlier run, which is rebuilt without scoring anything.
    run
        Folder of the run: similarity, families, decisions, scores, representatives, mixture, recipe and report.
    workers
        Worker processes for writing models; default: one per core, one for small models.
    overwrite
        Start afresh if the folder holds a run of other inputs or settings.
    quiet
        Print nothing.
    json
        Print outcome and results as JSON.
    """
    from modelglue.cli.console import print_json, stdout
    from modelglue.cli.progress import glue_progress
    from modelglue.cli.summary import print_summary
    from modelglue.glue import glue as run_recipe
    from modelglue.report import write_report

    with glue_progress(quiet=quiet or json) as listener:
        result = run_recipe(source, run, overwrite=overwrite, workers=workers, listener=listener)
    report = write_report(result.run) if result.results is not None else None
    if json:
        print_json(
            {
                "run": str(result.run),
                "report": None if report is None else str(report),
                "already_complete": result.already_complete,
                "outcome": result.outcome,
                "results": result.results,
            }
        )
    elif not quiet:
        print_summary(result, report, stdout())
