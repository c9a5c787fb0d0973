"""The end of a run on the terminal: families, decisions, experts, and the table of final scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from modelglue.cli.console import print_table, print_warnings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from modelglue.glue import GlueResult

_KINDS = {"merge": "merged model", "single": "single model"}


def print_summary(result: GlueResult, report: Path | None, console: Console) -> None:
    """Print what a finished run decided and how well it does; a replayed recipe has decisions only in the recipe it came from."""
    if result.results is None:
        console.print(f"{escape(str(result.run))}: rebuilt; the result is the {escape(_outcome(result.outcome, []))}", soft_wrap=True)
        return
    zoo, families, decisions = (
        json.loads((result.run / f"{name}.json").read_text(encoding="utf-8")) for name in ("zoo", "families", "decisions")
    )
    console.print()
    for family in decisions["families"]:
        _print_family(family, console)
    kept = [expert["name"] for expert in decisions["experts"] if expert["kept"]]
    console.print()
    for expert in decisions["experts"]:
        mark = "[green]expert[/]  " if expert["kept"] else "[dim]left out[/]"
        console.print(f"{mark} [bold]{escape(expert['name'])}[/]  [dim]{escape(expert['reason'])}[/]")
    if learned := (decisions["router"] or {}).get("learned"):
        console.print(f"router   {escape(learned['message'])}", soft_wrap=True)
    if warnings := _warnings(zoo, families, decisions):
        console.print()
        print_warnings(console, warnings)
    console.print()
    print_table(console, _table(result.results, result.outcome))
    console.print()
    for comparison in result.results["comparisons"]:
        console.print(_comparison(comparison))
    cost = result.results["cost"]
    console.print(
        f"\nresult  [bold]{escape(_outcome(result.outcome, kept))}[/]\n"
        f"scored  {cost['candidates']:,} models and candidates, {cost['items_scored']:,} items"
        + (" [dim](already complete, nothing was done)[/]" if result.already_complete else ""),
        soft_wrap=True,
    )
    if report is not None:
        console.print(f"report  {escape(str(report))}", soft_wrap=True)


def _outcome(outcome: Mapping[str, Any], experts: Sequence[str]) -> str:
    if outcome["kind"] == "mixture":
        return f"mixture of {', '.join(experts)}" if experts else "mixture"
    return f"{_KINDS[outcome['kind']]} {outcome['name']}"


def _warnings(zoo: Mapping[str, Any], families: Mapping[str, Any], decisions: Mapping[str, Any]) -> list[str]:
    """Everything that a step of the run warned of, in the order of the steps, each once."""
    found = [*zoo["warnings"], *families["warnings"]]
    found += [warning for row in decisions["ranking"] for warning in row.get("warnings", [])]
    found += [warning for family in decisions["families"] for strategy in family["strategies"] for warning in strategy["warnings"]]
    found += (decisions["router"] or {}).get("warnings", [])
    return list(dict.fromkeys(found))


def _print_family(family: Mapping[str, Any], console: Console) -> None:
    representative = family["representative"]
    console.print(f"[bold]family {family['id']}[/]  {escape(', '.join(family['members']))}")
    if representative["kind"] == "merge":
        parts = " + ".join(f"{weight:.3f} {escape(alias)}" for alias, weight in representative["weights"].items())
        console.print(f"  [green]{escape(representative['name'])}[/] = {parts}  [dim]({representative['strategy']})[/]")
        if family["rejected"]:
            console.print(f"  [red]rejected[/] {escape(', '.join(family['rejected']))}")
    elif len(family["members"]) > 1:
        console.print(f"  [green]{escape(representative['name'])}[/]  [dim]no merge of them scores higher on the proxy[/]")


def _table(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"accuracy in % on the {results['split']} items", title_justify="left", title_style="dim", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for skill in results["skills"]:
        table.add_column(escape(skill), justify="right", no_wrap=True)
    table.add_column("mean", justify="right", style="bold", no_wrap=True)
    table.add_column("95 % interval", justify="right", style="dim", no_wrap=True)
    for row in results["models"]:
        final = row["name"] == outcome["name"] and row["kind"] == {"merge": "representative"}.get(outcome["kind"], outcome["kind"])
        low, high = row["interval"]
        name = f"[bold green]{escape(row['name'])}[/]" if final else escape(row["name"])
        scores = [f"{row['tasks'][skill]['score'] * 100:.1f}" for skill in results["skills"]]
        table.add_row(name, *scores, f"{row['mean'] * 100:.1f}", f"{low * 100:.1f} to {high * 100:.1f}")
    return table


def _comparison(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["interval"]
    skills = ", ".join(comparison["skills"])
    return (
        f"[bold]{escape(comparison['a'])}[/] against {escape(comparison['b'])}: {comparison['difference'] * 100:+.1f} points "
        f"[dim]({low * 100:+.1f} to {high * 100:+.1f}; {escape(skills)})[/]"
    )
