"""`modelglue convert`: mergekit's recipe in, ours out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def convert(
    recipe: Path,
    out: Path | None = None,
    *,
    strict: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Print a recipe of mergekit's as one of ours, which gives the same merge.

    Slices, modules, gradients, filters, tokenizer sections and files of several documents included. Reads the recipe only; paths of
    models stay as they are, so the result belongs into the same folder. A recipe of ours is printed in its canonical form.

    Parameters
    ----------
    recipe
        YAML in mergekit's dialect, or in ours.
    out
        File to write instead of printing.
    strict
        Treat warnings about the recipe as errors.
    overwrite
        Replace an existing file.
    json
        Print JSON instead of YAML.
    """
    from modelglue.checkpoint import write_bytes_atomic
    from modelglue.cli.console import print_json, print_warnings, stderr
    from modelglue.errors import UserError
    from modelglue.recipe import canonical, dump, read_recipe

    read = read_recipe(recipe, strict=strict)
    for note in read.notes:
        stderr().print(f"note: {note}", soft_wrap=True, markup=False)
    print_warnings(stderr(), read.warnings)
    if out is not None:
        if out.exists() and not overwrite:
            raise UserError(f"{out}: exists. Choose another name, or say --overwrite.")
        write_bytes_atomic(out, dump(read).encode())
    if json:
        print_json(canonical(read))
    elif out is None:
        print(dump(read), end="")
