"""`modelglue report`: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    run: Path,
    *,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write the HTML report of a run: report.html in the run folder, one file that opens without a network.

    Parameters
    ----------
    run
        The folder that `modelglue glue` wrote, finished or not.
    json
        Print the path as JSON.
    quiet
        Print nothing.
    """
    from modelglue.cli.console import print_json
    from modelglue.report import write_report

    path = write_report(run)
    if json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    elif not quiet:
        print(path)
