"""`modelglue methods`: the catalogue, generated from the signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.methods import Method


def methods(name: str | None = None, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """List the merge methods, or explain one.

    Parameters
    ----------
    name
        The method to explain. Default: list them all.
    json
        Print what the methods declare as JSON.
    """
    from modelglue.cli.console import print_json, stdout
    from modelglue.methods import all_methods, get

    chosen = [get(name)] if name else all_methods()
    if json:
        print_json([_schema(method) for method in chosen])
        return
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    if name is None:
        table = Table("method", "base", "reads inputs", "holds", "what it does", box=None, pad_edge=False)
        for method in chosen:
            table.add_row(
                f"[bold]{method.id}[/]",
                "yes" if method.needs_base else "may" if method.takes_base else "",
                "twice" if method.surveys else "once",
                method.units[0],
                escape(method.summary),
            )
        console.print(table)
        console.print("\n[dim]modelglue methods NAME explains one.[/]")
        return
    method = chosen[0]
    text, _, _ = method.doc.partition("Parameters:\n")
    console.print(f"[bold]{method.id}[/]  [dim]{escape(method.source)}[/]\n", soft_wrap=True)
    console.print("\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")), markup=False)
    console.print(f"\n{_takes(method)}", markup=False)
    if not method.parameters:
        return
    table = Table("parameter", "per", "type", "default", "allowed", "", box=None, pad_edge=False)
    for parameter in method.parameters:
        allowed = " | ".join(parameter.choices) or (str(parameter.range) if parameter.range else "")
        default = "required" if parameter.required else str(parameter.default).lower()
        table.add_row(
            f"[bold]{parameter.name}[/]",
            "model" if parameter.per_model else "merge",
            parameter.type.__name__,
            default,
            escape(allowed),
            escape(parameter.doc),
        )
    console.print()
    console.print(table)


def _takes(method: Method) -> str:
    """Which models a merge needs, and what a recipe of mergekit means otherwise."""
    most, plural = method.max_models, "s" if method.min_models > 1 else ""
    models = f"{method.min_models} model{plural}" + ("" if most == method.min_models else " or more" if most is None else f" to {most}")
    base = "a base and " if method.needs_base else "a base, if one is given, and " if method.takes_base else ""
    found = [f"Takes {base}{models}." + ("" if method.parameters else " It has no parameters.")]
    if method.mergekit:
        said = ", ".join(f"{name}: {str(value).lower()}" for name, value in method.mergekit.items())
        found.append(f"Where a recipe of mergekit does not say, it means {said}.")
    if ignored := [name for name in method.without_effect if name != "int8_mask"]:
        found.append(f"There, {' and '.join(ignored)} may stand and have no effect.")
    return " ".join(found)


def _schema(method: Method) -> dict[str, Any]:
    return {
        "id": method.id, "summary": method.summary, "source": method.source, "units": list(method.units), "returns": method.returns,
        "needs_base": method.needs_base, "takes_base": method.takes_base, "surveys": method.surveys, "random": method.needs_uniform,
        "symmetric": method.symmetric,
        "models": {"least": method.min_models, "most": method.max_models},
        "parameters": [
            {
                "name": p.name, "per_model": p.per_model, "type": p.type.__name__, "required": p.required,
                "default": None if p.required else p.default, "choices": list(p.choices),
                "range": str(p.range) if p.range else None, "doc": p.doc,
            }
            for p in method.parameters
        ],
    }  # fmt: skip
