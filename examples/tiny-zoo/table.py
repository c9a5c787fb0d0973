"""Tables of finished runs, as Markdown: `python table.py RUN [RUN ...]`, one run per training seed.

Prints models x skills of the first run, then what every run gained: the numbers of the README.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skills import FAMILY_SKILLS


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def gain(comparison: Mapping[str, Any]) -> str:
    low, high = comparison["interval"]
    return f"{100 * comparison['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def models(results: Mapping[str, Any]) -> None:
    """Accuracy in % of every model on every skill."""
    print("| model | " + " | ".join(results["skills"]) + " | mean |")
    print("|---|" + "--:|" * (len(results["skills"]) + 1))
    for row in results["models"]:
        scores = [percent(row["tasks"][skill]["score"]) for skill in results["skills"]]
        print(f"| {row['name']} | " + " | ".join(scores) + f" | {percent(row['mean'])} |")
    print()


def seeds(runs: Mapping[str, Path]) -> None:
    """Per run: the result against the best single model, and the first family's merge against its best member and its average."""
    columns = (
        "training seed",
        "result",
        "best single model",
        "gain",
        "family's merge against its best member",
        "against the members' average",
    )
    print("| " + " | ".join(columns) + " |\n|---|--:|--:|---|---|---|")
    for name, run in runs.items():
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        outcome = json.loads((run / "decisions.json").read_text(encoding="utf-8"))["outcome"]
        means = {row["name"]: row["mean"] for row in results["models"]}
        best = results["comparisons"][0]
        family = [c for c in results["comparisons"][1:] if set(c["skills"]) == set(FAMILY_SKILLS)]
        member = next(c for c in family if not c["b"].startswith("average"))
        average = next(c for c in family if c["b"].startswith("average"))
        print(
            f"| {name} | {percent(means[outcome['name']])} | {percent(means[best['b']])} ({best['b']}) | {gain(best)} "
            f"| {gain(member)} ({member['b']}) | {gain(average)} |"
        )


if __name__ == "__main__":
    given = {Path(argument).name: Path(argument) for argument in sys.argv[1:]}
    models(json.loads((next(iter(given.values())) / "results.json").read_text(encoding="utf-8")))
    seeds(given)
