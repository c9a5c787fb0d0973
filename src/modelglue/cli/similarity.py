"""`modelglue similarity`: how close the weights of models are, and which of them may be merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint
    from modelglue.zoo import Families, Pair, Similarity


def similarity(
    *models: str,
    zoo: Path | None = None,
    mode: Literal["column", "tensor", "global"] = "column",
    scope: Literal["all", "attn", "mlp"] = "all",
    base: str | None = None,
    threshold: float = 0.95,
    linkage: Literal["complete", "leader", "single"] = "complete",
    out: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Compare the weights of models and find the families.

    Parameters
    ----------
    models
        Local folders, .safetensors files, or hub ids; or one zoo file (or glue file).
    zoo
        The same zoo file, named.
    mode
        Mean cosine of columns, of whole tensors, or one cosine over everything.
    scope
        Compare attention and feed-forward weights, or one of them only.
    base
        Subtract this model's weights first.
    threshold
        Every pair of a family is more similar than this.
    linkage
        How families are formed; only complete holds the threshold for every pair.
    out
        Write the matrix, and what similarities to merges need, to this safetensors file.
    overwrite
        Replace the file if it exists.
    json
        Print it as JSON.
    quiet
        No progress.
    """
    from rich.markup import escape

    from modelglue.checkpoint import open_checkpoint
    from modelglue.cli.console import byte_progress, print_json, size, stdout
    from modelglue.errors import UserError
    from modelglue.zoo import config_warnings, find_families, groups, signature
    from modelglue.zoo import similarity as compare

    if out is not None and (out.is_dir() or (out.exists() and not overwrite)):
        raise UserError(f"{out}: exists already. Choose another path, or pass --overwrite to replace the file.")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist. Make it first.")
    checkpoints = _open(models, zoo)
    labels = list(checkpoints)
    opened = list(checkpoints.values())
    with byte_progress("comparing", quiet=quiet) as progress:
        found = compare(
            opened,
            labels=labels,
            mode=mode,
            scope=scope,
            base=None if base is None else open_checkpoint(base),
            keep_gram=out is not None,
            progress=progress,
        )
    signatures = dict(zip(labels, map(signature, opened), strict=True))
    families = find_families(found.matrix, threshold=threshold, linkage=linkage, groups=groups(list(signatures.values())), labels=labels)
    warnings = [*found.warnings, *families.warnings]
    for family in families.families:
        warnings += config_warnings([signatures[alias] for alias in family.members], family.members)
    if out is not None:
        found.save(out)
    if json:
        print_json(_summary(found, families, warnings))
        return
    console = stdout()
    console.print(_table(found))
    console.print()
    for family in families.families:
        console.print(f"[bold]family {family.id}[/]  {escape(', '.join(family.members))}{_pair(family.weakest_pair)}")
    if families.strongest_across is not None:
        console.print(f"between families{_pair(families.strongest_across)}")
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    if out is not None:
        console.print(f"wrote {escape(str(out))} ({size(out.stat().st_size)})")


def _open(models: tuple[str, ...], zoo: Path | None) -> dict[str, Checkpoint]:
    """Models by label: aliases of the zoo, else the last part of the reference where that is unique."""
    from modelglue.checkpoint import open_checkpoint
    from modelglue.errors import UserError
    from modelglue.zoo import read_zoo

    named = [Path(model) for model in models if Path(model).suffix in (".yaml", ".yml")]
    if zoo is None and len(named) == len(models) == 1:
        return _open((), named[0])
    if bool(models) == (zoo is not None):
        raise UserError("give models or --zoo FILE, one of the two.")
    if zoo is None:
        if len(set(models)) < len(models):
            raise UserError("a model is given twice. Name each once.")
        short = [model.rstrip("/").rpartition("/")[2] for model in models]
        labels = [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
        return {label: open_checkpoint(model) for label, model in zip(labels, models, strict=True)}
    folder = zoo.resolve().parent
    return {model.alias: open_checkpoint(model.reference, relative_to=folder) for model in read_zoo(zoo).models}


def _table(found: Similarity) -> Any:
    """The matrix, models numbered in the heading; '-' where two models are not comparable."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "model", *[str(number) for number in range(len(found.labels))], box=None, pad_edge=False)
    for number, (label, row) in enumerate(zip(found.labels, found.matrix, strict=True)):
        table.add_row(str(number), f"[bold]{escape(label)}[/]", *[_show(float(value)) for value in row])
    return table


def _pair(pair: Pair | None) -> str:
    """The pair that holds a family together least, or that of two families that comes closest."""
    from rich.markup import escape

    if pair is None:
        return ""
    return f"  [dim]{escape(' - '.join(pair.models))} {_show(pair.similarity)}[/]"


def _show(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _summary(found: Similarity, families: Families, warnings: list[str]) -> dict[str, Any]:
    return {
        "models": list(found.labels),
        "mode": found.mode,
        "scope": found.scope,
        "delta": found.delta,
        "similarity": [[None if math.isnan(value) else value for value in row] for row in found.matrix.tolist()],
        "families": families.to_json(),
        "warnings": warnings,
    }
