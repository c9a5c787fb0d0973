"""The router: where the experts' own prompts go, where the items of each skill go, and what a perfect router would add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.report import text
from modelglue.report.charts import heat
from modelglue.report.results import bounds, cells

Counts = Mapping[str, Mapping[str, int]]


def experts_view(decisions: Mapping[str, Any]) -> dict[str, Any]:
    """Every representative's proxy scores, what it is best on, and whether it stays."""
    skills, experts = decisions["tasks"]["proxy"], decisions["experts"]
    representatives = {family["id"]: family["representative"] for family in decisions["families"]}
    low, high = bounds([value for one in representatives.values() for value in one["tasks"].values()])
    shown = []
    for expert in experts:
        found = representatives[expert["family"]]
        won = "best on " + ", ".join(expert["won"])
        shown.append(
            {
                "name": expert["name"],
                "family": expert["family"],
                "kept": expert["kept"],
                "reason": expert["reason"].removeprefix(won).lstrip(", ") if expert["won"] else expert["reason"],
                "score": text.score(found["proxy"]),
                "cells": list(cells([found["tasks"][s] for s in skills], [s in expert["won"] for s in skills], low, high)),
            }
        )
    return {"skills": skills, "rows": shown, "low": low, "high": high, "reasons": any(row["reason"] for row in shown)}


def router_view(decisions: Mapping[str, Any], routing: Counts | None, split: str | None) -> dict[str, Any]:
    """`routing`: counts per skill and expert on the items of `split`, from results.json."""
    router = decisions["router"]
    test = router["self_test"]
    experts, skills = test["experts"], decisions["tasks"]["proxy"]
    home = {skill: expert["name"] for expert in decisions["experts"] if expert["kept"] for skill in expert["won"]}
    own = {expert: expert for expert in experts}
    confusion = dict(zip(experts, (dict(zip(experts, row, strict=True)) for row in test["confusion"]), strict=True))
    loads = [{"split": "proxy", **counts(router["load"], skills, experts, home)}]
    if routing is not None and split != "proxy":
        loads.append({"split": split, **counts(routing, skills, experts, home)})
    return {
        "experts": experts,
        "confusion": counts(confusion, experts, experts, own),
        "loads": loads,
        "facts": [
            ("self-test", f"{100 * test['accuracy']:.1f} %", "of the experts' own prompts reach their expert; the gate was made from them"),
            ("oracle gap", text.gain(router["oracle_gap"]), "points on proxy items that knowing the best expert per skill would add"),
            ("worst margin", text.plain(router["margin"]), "smallest lead of the right expert over the next one, in logits"),
            ("condition number", text.plain(router["condition_number"]["gate"]), "of the gate; over 5, the prompts are too alike"),
            ("gate", router["gate_mode"], f"read at layer {router['router_layer']} of {router['encoder']}"),
        ],
        "warnings": router["warnings"],
    }


def counts(table: Counts, rows: Sequence[str], columns: Sequence[str], home: Mapping[str, str]) -> dict[str, Any]:
    """Cells shaded by their share of the row; `home` says where a row should go. The last row adds up all others."""
    shown = []
    for row in rows:
        total = sum(table[row].values())
        shown.append(
            {
                "name": row,
                "total": text.count(total),
                "cells": [
                    {
                        "text": text.count(table[row].get(column, 0)),
                        "style": heat(table[row].get(column, 0) / total if total else 0.0, 0.0, 1.0),
                        "right": home.get(row) == column,
                        "hint": f"{row} → {column}: {table[row].get(column, 0)} of {total}",
                    }
                    for column in columns
                ],
            }
        )
    everything = sum(sum(table[row].values()) for row in rows)
    return {
        "columns": columns,
        "rows": shown,
        "shares": [text.percent(sum(table[row].get(column, 0) for row in rows), everything) for column in columns],
        "total": text.count(everything),
        "right": right_share(table, home),
    }


def right_share(table: Counts, home: Mapping[str, str]) -> str | None:
    """Share of the rows that have a home which reach it; None when none has."""
    total = sum(sum(table[row].values()) for row in home if row in table)
    return text.percent(sum(table[row].get(column, 0) for row, column in home.items() if row in table), total) if total else None
