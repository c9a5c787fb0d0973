"""`modelglue recommend`: which merge methods suit a zoo, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def recommend(
    zoo: Path, *, base: str | None = None, json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:  # fmt: skip
    """Say which merge methods suit a zoo, and why, from what its weights and tasks are.

    Of every tensor that all models have, up to 65,536 elements at its start are read, once. No model is run.

    Parameters
    ----------
    zoo
        A zoo file, glue file or search file's zoo.
    base
        Common base of the models. Default: the zoo's.
    json
        Print measurements and recommendations as JSON.
    quiet
        Print no progress and no warnings.
    """
    from modelglue.checkpoint import open_checkpoint
    from modelglue.cli.console import print_json, print_table, print_warnings, stderr, stdout
    from modelglue.recipe import load_document
    from modelglue.zoo import read_zoo
    from modelglue.zoo.measure import measure
    from modelglue.zoo.recommend import recommendations

    found = read_zoo(zoo)
    folder = zoo.resolve().parent
    tasks = (load_document(zoo).value or {}).get("tasks")
    origin = base if base is not None else found.base
    models = {model.alias: open_checkpoint(model.reference, relative_to=folder) for model in found.models}
    home = None if base is None else Path()
    opened = None if origin is None else open_checkpoint(origin, relative_to=home or folder)
    measured = measure(
        models, opened, adapters=[model.alias for model in found.models if model.adapter or "+" in model.id],
        proxy=bool(isinstance(tasks, dict) and tasks.get("proxy")), domains=[list(model.domain) for model in found.models],
    )  # fmt: skip
    advice = recommendations(measured)
    if json:
        print_json({"measured": measured.to_json(), "recommendations": [one.to_json() for one in advice]})
        return
    if not quiet:
        print_warnings(stderr(), measured.warnings)
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    for line in measured.in_words():
        console.print(escape(line), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("verdict", "method", "why"):
        table.add_column(heading, overflow="fold")
    colour = {"first": "[bold green]first[/]", "try": "[green]try[/]", "reference": "reference", "avoid": "[red]avoid[/]"}
    for one in advice:
        table.add_row(colour[one.verdict], escape(one.method), escape(one.why))
    print_table(console, table)
