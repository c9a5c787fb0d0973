"""`modelglue diff`: where two models differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from rich.table import Table

    from modelglue.checkpoint import Checkpoint
    from modelglue.zoo import Difference, Sums


def diff(
    a: str,
    b: str,
    *,
    tensors: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Show where two models differ, by layer and role.

    Tensors are compared bit by bit and by norm and cosine. What only one of the two has, or has in another shape, is listed.

    Parameters
    ----------
    a
        Local folder, .safetensors file, hub id, or a recipe (compared without writing the merge).
    b
        The other model.
    tensors
        List every tensor, the most changed first.
    out
        Also draw it: an .svg picture, or an .html page around it.
    overwrite
        Replace that file if it exists.
    workers
        Worker processes. Default: one per core, one for small models.
    json
        Print all of it as JSON.
    quiet
        No progress.
    """
    from modelglue.cli.console import byte_progress, print_json, print_table, print_warnings, stdout
    from modelglue.report.difference import write_difference
    from modelglue.zoo import diff as compare

    if out is not None:
        _check_free(out, overwrite)
    opened = [_open(model) for model in (a, b)]
    with byte_progress("comparing", quiet=quiet or json) as progress:
        found = compare(opened[0], opened[1], labels=_labels(a, b), workers=workers, progress=progress)
    if out is not None:
        write_difference(found, out)
    if json:
        print_json(found.to_json())
        return
    console = stdout()
    print_table(console, _by_layer(found))
    console.print()
    print_table(console, _by_tensor(found) if tensors else _by_role(found))
    print_warnings(console, found.warnings)
    if found.identical:
        console.print("[green]identical[/]: every tensor has the same bits in both")
    if out is not None:
        console.print(f"wrote {out}", soft_wrap=True, markup=False)


def _check_free(out: Path, overwrite: bool) -> None:
    from modelglue.errors import UserError
    from modelglue.report.difference import SUFFIXES

    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: a picture ends in {' or '.join(SUFFIXES)}. Choose another name.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out}: exists already. Choose another path, or pass --overwrite to replace the file.")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist. Make it first.")


def _open(model: str) -> Checkpoint:
    from modelglue.checkpoint import Checkpoint
    from modelglue.cli.opening import open_model
    from modelglue.errors import UserError

    found = open_model(model)
    if not isinstance(found, Checkpoint):
        raise UserError(f"{model}: is a mixture, which has no tensors of its own. Compare its experts.")
    return found


def _labels(a: str, b: str) -> tuple[str, str]:
    """The last part of the references where they differ, else the references."""
    short = [model.rstrip("/").rpartition("/")[2] for model in (a, b)]
    return (short[0], short[1]) if short[0] != short[1] else (a, b)


def _by_layer(found: Difference) -> Table:
    """Relative differences: a row per layer, a column per role."""
    from rich.markup import escape
    from rich.table import Table

    title = f"relative difference |b - a| / |a|, a: {escape(found.labels[0])}, b: {escape(found.labels[1])}"
    table = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False)
    table.add_column("layer")
    for role in found.roles:
        table.add_column(role.replace("_", "-"), justify="right")
    for layer, roles in found.layers.items():
        name = "outside" if layer is None else f"{layer.stack}.{layer.number}"
        table.add_row(escape(name), *(_relative(roles[role]) if role in roles else "" for role in found.roles))
    return table


def _by_role(found: Difference) -> Table:
    rows = [(role.replace("_", "-"), sums) for role, sums in found.roles.items()]
    return _numbers("role", [*rows, ("all", found.total)])


def _by_tensor(found: Difference) -> Table:
    order = sorted(found.tensors, key=lambda one: (-one.sums.changed_share if not one.sums.a else -one.sums.relative, one.name))
    return _numbers("tensor", [(one.name, one.sums) for one in order])


def _numbers(first: str, rows: list[tuple[str, Sums]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in ("relative", "norm", "cosine", "changed", "elements"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, sums in rows:
        cosine = "-" if sums.cosine != sums.cosine else f"{sums.cosine:.6f}"
        table.add_row(escape(name), _relative(sums), f"{sums.norm:.4g}", cosine, _share(sums), f"{sums.numel:,}")
    return table


def _relative(sums: Sums) -> str:
    if not sums.changed:
        return "="
    return "-" if sums.relative != sums.relative else f"{sums.relative:.3g}"


def _share(sums: Sums) -> str:
    """Never 0 % where something changed, never 100 % where something did not."""
    percent = 100 * sums.changed_share
    if 0 < sums.changed < sums.numel:
        percent = min(max(percent, 0.01), 99.99)
    return f"{percent:.2f} %"
