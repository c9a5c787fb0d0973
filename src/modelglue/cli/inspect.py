"""`modelglue inspect`: what is in a model, from its headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint

_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<number>\d+)\.(?P<after>.*)$")


def inspect(
    model: str,
    *,
    identity: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Show a model's tensors, layers, dtypes and sizes.

    Parameters
    ----------
    model
        Local folder, .safetensors file, or hub id.
    identity
        Also hash every byte: the identity under which scores are remembered.
    json
        Print all of it as JSON.
    """
    from modelglue.checkpoint import open_checkpoint
    from modelglue.cli.console import print_json, print_table, size, stdout

    checkpoint = open_checkpoint(model)
    groups = _groups(checkpoint)
    summary: dict[str, Any] = {
        "model": model,
        "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
        "tensors": len(checkpoint.names()),
        "parameters": sum(checkpoint.info(name).numel for name in checkpoint.names()),
        "bytes": sum(checkpoint.info(name).nbytes for name in checkpoint.names()),
        "layers": max((group["count"] for group in groups if "*" in group["name"].split(".")), default=0),
        "files": sorted(checkpoint.files),
        "groups": groups,
    }
    if identity:
        summary["identity"] = checkpoint.identity
    if json:
        print_json(summary)
        return
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    console.print(
        f"[bold]{escape(model)}[/]  {summary['architecture'] or 'no config'}: {summary['parameters'] / 1e6:,.2f} M parameters in "
        f"{summary['tensors']} tensors, {size(summary['bytes'])}, {summary['layers']} layers",
        soft_wrap=True,
    )
    table = Table("tensor", "times", "shape", "dtype", "bytes", box=None, pad_edge=False)
    for group in groups:
        table.add_row(
            escape(group["name"]), str(group["count"]), " x ".join(map(str, group["shape"])), group["dtype"], size(group["bytes"])
        )
    print_table(console, table)
    if identity:
        console.print(f"identity {summary['identity']}", soft_wrap=True)


def _groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors that differ only in their layer's number, together."""
    found: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for name in checkpoint.names():
        info = checkpoint.info(name)
        match = _LAYER.match(name)
        general = f"{match['before']}.*.{match['after']}" if match else name
        group = found.setdefault(
            (general, info.shape, info.dtype),
            {"name": general, "count": 0, "shape": list(info.shape), "dtype": info.dtype, "bytes": 0},
        )
        group["count"] += 1
        group["bytes"] += info.nbytes
    return list(found.values())
