"""`modelglue recommend`: which merge methods suit a zoo, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.zoo.measure import Measured

#: keys that only a search file (or another tool's) has; anything else is read as a zoo or glue file
_OF_SEARCHES = {"searcher", "space", "budget", "fitness", "members", "objective", "genome", "pop_size"}


def recommend(
    zoo: Path, *, base: str | None = None, json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:  # fmt: skip
    """Say which merge methods suit a zoo, and why, from what its weights and tasks are.

    Of every tensor that all models have, up to 65,536 elements at its start are read, once. No model is run.

    Parameters
    ----------
    zoo
        A zoo file, glue file or search file; also a plan of mergekit-evolve or a configuration of mergenetic.
    base
        Common base of the models. Default: the zoo's.
    json
        Print measurements and recommendations as JSON.
    quiet
        Print no progress and no warnings.
    """
    from modelglue.cli.console import print_json, print_table, print_warnings, stderr, stdout
    from modelglue.zoo.recommend import recommendations

    measured = _measured(zoo, base)
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


def _measured(path: Path, base: str | None) -> Measured:
    """What the file names, opened and measured; a base given on the command line is seen from the working folder."""
    from modelglue.checkpoint import open_checkpoint
    from modelglue.recipe import load_document
    from modelglue.zoo import read_zoo
    from modelglue.zoo.measure import measure

    folder = path.resolve().parent
    content: Any = load_document(path).value
    keys = set(content) if isinstance(content, dict) else set()
    given = None if base is None else open_checkpoint(base, relative_to=Path())
    if keys & _OF_SEARCHES or ("zoo" in keys and isinstance(content["zoo"], str)):
        from modelglue.studies import read_search
        from modelglue.studies.bench import open_zoo

        opened, members, origin = open_zoo(read_search(path).file, folder)
        start = given if given is not None else None if origin is None else opened[origin]
        return measure({alias: opened[alias] for alias in members}, start, proxy=True)
    found = read_zoo(path)
    tasks = content.get("tasks")
    models = {model.alias: open_checkpoint(model.reference, relative_to=folder) for model in found.models}
    origins = {model.reference.rpartition("+")[0] for model in found.models}
    origin = found.base or (origins.pop() if len(origins) == 1 else None)  # adapters of one base name it themselves
    if given is None and origin:
        given = open_checkpoint(origin, relative_to=folder)
    proxy = bool(isinstance(tasks, dict) and tasks.get("proxy"))
    return measure(models, given, proxy=proxy, domains=[list(model.domain) for model in found.models])
