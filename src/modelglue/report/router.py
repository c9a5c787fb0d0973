"""The router: where the experts' own prompts go, where the items of each skill go, and what a perfect router would add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.report import text
from modelglue.report.charts import heat


def router_view(decisions: Mapping[str, Any], routing: Mapping[str, Mapping[str, int]] | None, split: str | None) -> dict[str, Any]:
    """`routing`: counts per skill and expert on the items of `split`, from results.json."""
    router = decisions["router"]
    test = router["self_test"]
    experts, skills = test["experts"], decisions["tasks"]["proxy"]
    won = {(skill, expert["name"]) for expert in decisions["experts"] for skill in expert["won"]}
    own = {(expert, expert) for expert in experts}
    confusion = dict(zip(experts, (dict(zip(experts, row, strict=True)) for row in test["confusion"]), strict=True))
    loads = [{"split": "proxy", **_counts(router["load"], skills, experts, won)}]
    if routing is not None and split != "proxy":
        loads.append({"split": split, **_counts(routing, skills, experts, won)})
    return {
        "experts": experts,
        "confusion": _counts(confusion, experts, experts, own),
        "loads": loads,
        "facts": [
            ("self-test", f"{100 * test['accuracy']:.1f} %", "share of the experts' own prompts that reach their expert"),
            ("oracle gap", text.gain(router["oracle_gap"]), "points that a router which knows the best expert per skill would add"),
            ("worst margin", f"{router['margin']:.3g}".replace("-", "−"), "smallest lead of the right expert over the next one, in logits"),
            ("condition number", f"{router['condition_number']['gate']:.2f}", "of the gate; over 5, the prompts are too alike"),
            ("gate", router["gate_mode"], f"read at layer {router['router_layer']} of {router['encoder']}"),
        ],
        "warnings": router["warnings"],
    }


def _counts(
    table: Mapping[str, Mapping[str, int]], rows: Sequence[str], columns: Sequence[str], right: set[tuple[str, str]]
) -> dict[str, Any]:
    """Cells shaded by their share of the row; `right` marks where a row should go."""
    shown = []
    for row in rows:
        total = sum(table[row].values())
        cells = []
        for column in columns:
            number = table[row].get(column, 0)
            share = number / total if total else 0.0
            cells.append(
                {
                    "text": text.count(number),
                    "style": heat(share, 0.0, 1.0),
                    "right": (row, column) in right,
                    "hint": f"{row} → {column}: {number} of {total}",
                }
            )
        shown.append({"name": row, "cells": cells})
    return {"columns": columns, "rows": shown}
