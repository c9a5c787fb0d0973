"""The end of a search on the terminal: the best candidates, what they score on unseen items, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from modelglue.cli.console import print_table, print_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from modelglue.studies import Finished

_SHOWN = 5


def print_search(found: Finished, page: Path, console: Console) -> None:
    """Print what a search found."""
    from rich.table import Table

    report = found.report
    best = report.best
    table = Table(box=None, pad_edge=False, title="best candidates, in %", title_justify="left", title_style="dim")
    for heading in ("candidate", "searched", "confirmed", "recipe"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", overflow="fold")
    for outcome in report.leaders(_SHOWN):
        candidate = outcome.proposal.candidate
        confirmed = report.confirmed.get(outcome.id)
        table.add_row(
            f"[bold green]{outcome.id}[/]" if best is not None and outcome.id == best.id else str(outcome.id),
            f"{100 * outcome.value:.1f}", "" if confirmed is None or confirmed.status != "ok" else f"{100 * confirmed.mean:.1f}",
            escape(candidate.describe() if candidate else ""),
        )  # fmt: skip
    print_table(console, table)
    if best is None:
        console.print("[red]no candidate could be scored[/]")
    if report.bias is not None:
        console.print(f"the best of so many noisy scores is too high by about {100 * report.bias:.1f} points")
    test = found.result["test"]
    if test is not None and "score" in test["best"]:
        low, high = test["best"]["interval"]
        console.print(f"test    [bold]{100 * test['best']['score']:.1f}[/] ({100 * low:.1f} to {100 * high:.1f})")
        for row in test["rivals"]:
            if "score" in row:
                gap, low, high = row["best_minus"]
                console.print(
                    f"        {escape(row['name'])} {100 * row['score']:.1f}: best {100 * gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                )
    print_warnings(console, report.warnings)
    console.print(
        f"scored  {report.counts['candidates']:,} candidates, {int(report.spent['items']):,} items "
        f"({report.counts['pruned']} given up early); {escape(report.stopped)}\nreport  {escape(str(page))}",
        soft_wrap=True,
    )
