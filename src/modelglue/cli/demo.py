"""`modelglue demo`: the whole recipe on the tiny zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def demo(
    run: Path = Path("runs/demo"),
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """The whole recipe on the tiny zoo that comes with the repository.

    Twelve models that were really trained: it groups them, finds which to merge and how, joins the results with a router, and reports.

    Parameters
    ----------
    run
        Folder of the run; a run that was stopped there goes on.
    workers
        Worker processes for writing models.
    overwrite
        Start afresh if the folder holds a run of other inputs.
    quiet
        Print nothing.
    json
        Print the outcome as JSON.
    """
    from modelglue.cli.glue import glue

    glue(_zoo_file(), run, workers=workers, overwrite=overwrite, quiet=quiet, json=json)


def _zoo_file() -> Path:
    """The zoo beside the sources, or below the working folder."""
    from modelglue.errors import UserError

    inside = Path("examples") / "tiny-zoo" / "zoo.yaml"
    places = [Path(__file__).resolve().parents[3] / inside, Path.cwd() / inside]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"the tiny zoo is not here (looked for {places[0]} and {places[1]}). "
        "It comes with the repository: clone it and run `make demo` there."
    )
