"""`modelglue check`: will this recipe work, and what will it need?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def check(
    recipe: Path,
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say from headers alone whether a recipe will work and what it needs.

    Reads no tensor. Everything that `merge` would refuse before reading weights is refused here: exit code 2, all faults at once.

    Parameters
    ----------
    recipe
        YAML in modelglue's dialect, or mergekit's.
    workers
        Worker processes to plan for. Default: what `merge` would use.
    json
        Print the report as JSON.
    """
    from modelglue.cli.console import print_json, print_warnings, size, stdout
    from modelglue.recipe import check as run

    report = run(recipe, workers=workers)
    if json:
        print_json(asdict(report))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in (
        ("method", report.method),
        ("models", "\n".join(report.models)),
        ("base", report.base or "none"),
        ("architecture", report.architecture or "unknown (no config)"),
        ("tensors", f"{report.tensors}, {report.parameters / 1e6:,.1f} M parameters, stored as {report.store}"),
        ("reads", f"{size(report.read_bytes)}, {'twice' if report.passes == 2 else 'once'}"),
        ("writes", size(report.output_bytes)),
        (
            "memory",
            f"{size(report.memory_bytes)} of chunks in {report.workers} worker{'s' if report.workers > 1 else ''}, besides torch itself",
        ),
    ):
        table.add_row(name, Text(value))
    console = stdout()
    console.print(table)
    print_warnings(console, report.warnings)
    console.print("[green]ok[/]: this merge will run")
