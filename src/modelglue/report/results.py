"""The final comparison: a row per model, a column per skill, means with intervals, and who beats whom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from modelglue.report import text
from modelglue.report.charts import Axis, heat, verdict, whisker
from modelglue.report.headline import final_row

KINDS = {
    "base": "base",
    "single": "single model",
    "average": "uniform average",
    "representative": "merge",
    "mixture": "mixture",
}


def table(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Rows with the best mean first; equal means keep the order of results.json."""
    rows, skills = results["models"], results["skills"]
    low, high = bounds([task["score"] for row in rows for task in row["tasks"].values()])
    axis = Axis(*bounds([value for row in rows for value in row["interval"]]))
    best = {skill: max(row["tasks"][skill]["score"] for row in rows) for skill in skills}
    best_mean = max(row["mean"] for row in rows)
    final = final_row(results, outcome)
    items = {skill: rows[0]["tasks"][skill]["items"] for skill in skills}
    shown = [
        {
            "name": row["name"],
            "kind": KINDS.get(row["kind"], row["kind"]),
            "family": row["family"],
            "final": row is final,
            "cells": [_cell(row["tasks"][skill]["score"], best[skill], low, high) for skill in skills],
            "mean": _cell(row["mean"], best_mean, low, high),
            "plot": _mean(row, axis, row is final),
        }
        for row in sorted(rows, key=lambda row: -row["mean"])
    ]
    return {"skills": skills, "rows": shown, "item_counts": items, "low": low, "high": high, "axis": axis}


def bounds(values: list[float]) -> tuple[float, float]:
    """Ends of the colour scale: the tenths around all values, so that colours mean the same in every column."""
    return math.floor(10 * min(values, default=0.0)) / 10, math.ceil(10 * max(values, default=1.0)) / 10


def _cell(value: float, best: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "text": text.score(value), "style": heat(value, low, high), "best": value == best}


def _mean(row: Mapping[str, Any], axis: Axis, final: bool) -> Markup:
    hint = f"{text.score(row['mean'])} ({text.score(row['interval'][0])} to {text.score(row['interval'][1])})"
    return whisker(row["mean"], row["interval"], axis, kind="final" if final else "plain", hint=hint)


def comparisons(results: Mapping[str, Any], final: str) -> list[dict[str, Any]]:
    """Paired differences, in the order of results.json; `result` is the final model."""
    rows = results["comparisons"]
    axis = Axis.around([value for row in rows for value in row["interval"]], zero=True)
    shown = []
    for row in rows:
        judged = verdict(row["interval"])
        hint = f"{text.gain(row['difference'])} ({text.interval(row['interval'])})"
        everything = row["skills"] == results["skills"]
        shown.append(
            {
                "a": final if row["a"] == "result" else row["a"],
                "b": row["b"],
                "skills": "all skills" if everything else ", ".join(row["skills"]),
                "difference": text.gain(row["difference"]),
                "interval": text.interval(row["interval"]),
                "verdict": judged,
                "plot": whisker(row["difference"], row["interval"], axis, kind=judged, hint=hint, zero=True),
            }
        )
    return shown


def ranking(decisions: Mapping[str, Any], families: Mapping[str, int]) -> dict[str, Any]:
    """Every member of the zoo on proxy items, best first."""
    rows, skills = decisions["ranking"], decisions["tasks"]["proxy"]
    low, high = bounds([value for row in rows for value in row["tasks"].values()])
    best = {skill: max(row["tasks"][skill] for row in rows) for skill in skills}
    shown = [
        {
            "rank": rank,
            "name": row["alias"],
            "family": families.get(row["alias"]),
            "score": text.score(row["score"]),
            "bar": f"--w:{max(0.0, min(1.0, row['score'])):.3f}",
            "cells": [_cell(row["tasks"][skill], best[skill], low, high) for skill in skills],
        }
        for rank, row in enumerate(rows, start=1)
    ]
    return {"skills": skills, "rows": shown, "low": low, "high": high}
