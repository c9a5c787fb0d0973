"""`modelglue inspect`: what is in a model, from its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.table import Table

    from modelglue.checkpoint import Checkpoint


def inspect(
    model: str,
    *,
    tensors: Annotated[bool, Parameter(negative=())] = False,
    identity: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Show a model's layers, roles, dtypes, sizes and tensors.

    Reads headers, config and tokenizer; no weight unless the identity is asked for.

    Parameters
    ----------
    model
        Local folder, .safetensors file, or hub id.
    tensors
        List every tensor, instead of one row for what repeats in every layer.
    identity
        Also hash every byte: the identity under which scores are remembered.
    json
        Print all of it as JSON.
    """
    from modelglue.checkpoint import open_checkpoint
    from modelglue.cli.console import print_json, print_table, size, stdout

    checkpoint = open_checkpoint(model, headers_only=not identity)
    summary = {"model": model, **_summary(checkpoint)}
    if tensors:
        summary["list"] = _list(checkpoint)
    if identity:
        summary["identity"] = checkpoint.identity
    if json:
        print_json(summary)
        return
    from rich.markup import escape

    console = stdout()
    console.print(
        f"[bold]{escape(model)}[/]  {summary['architecture'] or 'no config'}: {summary['parameters'] / 1e6:,.2f} M parameters in "
        f"{summary['tensors']} tensors, {size(summary['bytes'])}, {summary['layers']} layers",
        soft_wrap=True,
    )
    for name, value in _facts(summary):
        console.print(f"[dim]{name:<12}[/] {escape(value)}", soft_wrap=True)
    console.print()
    print_table(console, _roles_table(summary["roles"]))
    console.print()
    print_table(console, _list_table(summary["list"]) if tensors else _groups_table(summary["groups"]))
    if identity:
        console.print(f"identity {summary['identity']}", soft_wrap=True)


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    from modelglue.checkpoint import quantisation_of
    from modelglue.checkpoint.tensor_names import ROLES, layer_of, role_of

    infos = {name: checkpoint.info(name) for name in checkpoint.names()}
    stacks: dict[str, set[int]] = {}
    dtypes: dict[str, dict[str, int]] = {}
    roles: dict[str, dict[str, int]] = {}
    for name, info in infos.items():
        if layer := layer_of(name):
            stacks.setdefault(layer.stack, set()).add(layer.number)
        for table, key in ((dtypes, info.dtype), (roles, role_of(name))):
            row = table.setdefault(key, {"tensors": 0, "parameters": 0, "bytes": 0})
            row["tensors"] += 1
            row["parameters"] += info.numel
            row["bytes"] += info.nbytes
    return {
        "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos.values()),
        "bytes": sum(info.nbytes for info in infos.values()),
        "layers": max(map(len, stacks.values()), default=0),
        "stacks": {stack: len(numbers) for stack, numbers in sorted(stacks.items())},
        "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])),
        "roles": {role: roles[role] for role in ROLES if role in roles},
        "quantised": quantisation_of(checkpoint),
        "vocabulary": _vocabulary(checkpoint),
        "head": _head(checkpoint),
        "files": sorted(checkpoint.files),
        "groups": _groups(checkpoint),
    }


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int | None]:
    """Tokens of the tokenizer, rows of the embedding, and what the config says; None where it is not known."""
    from modelglue.checkpoint.vocabulary import all_tokens, tables_of
    from modelglue.checkpoint.vocabulary.tables import config_rows

    found = all_tokens(checkpoint)
    return {
        "tokens": None if found is None else len(found[0]),
        "highest_id": None if found is None else max(found[0].values(), default=-1),
        "rows": tables_of(checkpoint).rows or None,
        "config": config_rows(checkpoint.config),
    }


def _head(checkpoint: Checkpoint) -> str:
    """Stored, tied (to the embedding), or none: no head and nothing said about it."""
    from modelglue.checkpoint.tensor_names import role_of
    from modelglue.checkpoint.vocabulary import tables_of

    tied = checkpoint.config.get("tie_word_embeddings") is True
    if tables_of(checkpoint).heads or any(role_of(name) == "head" for name in checkpoint.names()):
        return "stored, though the config ties it" if tied else "stored"
    return "tied" if tied else "none"


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What is worth a line of its own."""
    from modelglue.cli.console import size

    facts = [("dtypes", ", ".join(f"{dtype} {size(row['bytes'])} in {row['tensors']}" for dtype, row in summary["dtypes"].items()))]
    if len(summary["stacks"]) > 1:
        facts.append(("stacks", ", ".join(f"{stack} ({count})" for stack, count in summary["stacks"].items())))
    if summary["quantised"]:
        facts.append(("quantised", summary["quantised"].removeprefix("is quantised ")))
    found = summary["vocabulary"]
    if found["rows"] is not None or found["tokens"] is not None:
        tokens = "no tokenizer" if found["tokens"] is None else f"{found['tokens']:,} tokens, ids to {found['highest_id']:,}"
        rows = "no embedding" if found["rows"] is None else f"{found['rows']:,} embedding rows"
        said = f", vocab_size {found['config']:,}" if isinstance(found["config"], int) and found["config"] != found["rows"] else ""
        lost = found["tokens"] is not None and found["rows"] is not None and found["highest_id"] >= found["rows"]
        facts.append(("vocabulary", f"{tokens}; {rows}{said}" + ("; some tokens have no row" if lost else "")))
    facts.append(("head", summary["head"]))
    if summary["files"]:
        facts.append(("files", ", ".join(summary["files"])))
    return facts


def _groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors that differ only in their layer's number, together."""
    from modelglue.checkpoint.tensor_names import layer_of

    found: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for name in checkpoint.names():
        info, layer = checkpoint.info(name), layer_of(name)
        start = "" if layer is None else f"{layer.stack}.{layer.number}."
        general = name if layer is None else f"{layer.stack}.*.{name.removeprefix(start)}"
        group = found.setdefault(
            (general, info.shape, info.dtype),
            {"name": general, "count": 0, "shape": list(info.shape), "dtype": info.dtype, "bytes": 0},
        )
        group["count"] += 1
        group["bytes"] += info.nbytes
    return list(found.values())


def _list(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    from modelglue.checkpoint.tensor_names import layer_of, role_of

    found = []
    for name in checkpoint.names():
        info, layer = checkpoint.info(name), layer_of(name)
        row = {"name": name, "layer": layer and layer.number, "role": role_of(name)}
        found.append({**row, "shape": list(info.shape), "dtype": info.dtype, "bytes": info.nbytes})
    return found


def _roles_table(roles: dict[str, dict[str, int]]) -> Table:
    from rich.table import Table

    from modelglue.cli.console import size

    table = Table("role", box=None, pad_edge=False)
    for name in ("tensors", "parameters", "bytes"):
        table.add_column(name, justify="right")
    for role, row in roles.items():
        table.add_row(role.replace("_", "-"), f"{row['tensors']:,}", f"{row['parameters']:,}", size(row["bytes"]))
    return table


def _groups_table(groups: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from modelglue.cli.console import size

    table = Table("tensor", "times", "shape", "dtype", "bytes", box=None, pad_edge=False)
    for group in groups:
        table.add_row(escape(group["name"]), str(group["count"]), _shape(group["shape"]), group["dtype"], size(group["bytes"]))
    return table


def _list_table(rows: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from modelglue.cli.console import size

    table = Table("tensor", "layer", "role", "shape", "dtype", "bytes", box=None, pad_edge=False)
    for row in rows:
        layer = "" if row["layer"] is None else str(row["layer"])
        table.add_row(escape(row["name"]), layer, row["role"].replace("_", "-"), _shape(row["shape"]), row["dtype"], size(row["bytes"]))
    return table


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
