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
    return {"skills": skills, "rows": shown, "low": low, "high": high, "reasons": any(row["reason"] for row in shown),
            "levels": _levels(decisions.get("levels")), "inside": sum(expert["kept"] for expert in experts) > 1}  # fmt: skip


def _levels(found: Sequence[Mapping[str, Any]] | None) -> str | None:
    """The ways to join the experts that were tried, with their proxy scores; those that are closed are named."""
    if not found:
        return None
    open_ = [f"{row['name']} {text.score(row['score'])}" for row in found if row["score"] is not None]
    closed = [row["name"] for row in found if row["score"] is None]
    return "Ways to join them, on proxy items: " + ", ".join([*open_, *(f"{name}: these experts do not allow it" for name in closed)]) + "."


def router_view(decisions: Mapping[str, Any], routing: Counts | None, split: str | None) -> dict[str, Any]:
    """`routing`: counts per skill and expert on the items of `split`, from results.json."""
    router = decisions["router"]
    test, skills = router["self_test"], decisions["tasks"]["proxy"]
    experts = [expert["name"] for expert in decisions["experts"] if expert["kept"]]
    home = {skill: expert["name"] for expert in decisions["experts"] if expert["kept"] for skill in expert["won"]}
    own = {expert: expert for expert in experts}
    loads = [{"split": "proxy", **counts(router["load"], skills, experts, home)}]
    if routing is not None and split != "proxy":
        loads.append({"split": split, **counts(routing, skills, experts, home)})
    return {
        "experts": experts,
        "confusion": counts(_confusion(test), experts, experts, own) if test is not None else None,
        "learned": _learned(router.get("learned")),
        "loads": loads,
        "facts": [*_prompt_facts(router), *_gate_facts(router)],
        "warnings": router["warnings"],
    }


def _confusion(test: Mapping[str, Any]) -> Counts:
    return {own: dict(zip(test["experts"], row, strict=True)) for own, row in zip(test["experts"], test["confusion"], strict=True)}


def _prompt_facts(router: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the experts' own prompts say; nothing where there are none."""
    if router["self_test"] is None:
        return []
    about = "of the experts' own prompts reach their expert"
    if router["gate_mode"] != "scores":
        about += "; the gate was made from them"
    return [("self-test", f"{100 * router['self_test']['accuracy']:.1f} %", about)]


def _gate_facts(router: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    condition, margin = router["condition_number"]["gate"], router["margin"]
    facts = [("oracle gap", text.gain(router["oracle_gap"]), "points on proxy items that knowing the best expert per skill would add")]
    if margin is not None:
        facts.append(("worst margin", text.plain(margin), "smallest lead of the right expert over the next one, in logits"))
    if condition is not None:
        facts.append(("condition number", text.plain(condition), "of the gate; over 5, the prompts are too alike"))
    made = "learned" if router["gate_mode"] == "scores" else router["gate_mode"]
    return [*facts, ("gate", made, f"read at layer {router['router_layer']} of {router['encoder']}")]


def _learned(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What learning from scores came to: a sentence, and per skill the held-out scores of both routers and of the best expert."""
    if found is None:
        return None
    rows = [
        {"name": task, "cells": [text.score(row[kind]) for kind in ("reference", "trained", "oracle")]}
        for task, row in found["held_out_tasks"].items()
    ]
    against = found["training"]["held_out"]["against"] if found["training"] is not None else None
    return {"message": found["message"], "rows": rows, "against": against}


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
