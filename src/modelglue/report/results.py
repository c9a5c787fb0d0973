"""The final comparison: skill by skill, a table of scores, the result against every model, and whether merging helped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modelglue.report import text
from modelglue.report.charts import Axis, Mark, field, gain_plot, heat, score_plot, verdict
from modelglue.report.headline import final_row

Row = Mapping[str, Any]
KINDS = {
    "base": "base",
    "single": "single model",
    "average": "uniform average",
    "representative": "merge",
    "mixture": "mixture",
}
MANY = 24
"""Longer tables are set tighter."""


def by_skill(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The final model in the field of all others: over all skills, then on each; against the best single model there."""
    final, rows = final_row(results, outcome), results["models"]
    views = [_over_all(row) for row in rows]
    axis = Axis.around(
        [mark.value for row in rows for mark in _marks(row, results["skills"], False)] + _ends(final, results["skills"]), most=8
    )
    shown = [_field("all skills", None, views, views[rows.index(final)], axis)]
    for skill in results["skills"]:
        views = [{**row["tasks"][skill], "name": row["name"], "kind": row["kind"]} for row in rows]
        shown.append(_field(skill, views[0]["items"], views, views[rows.index(final)], axis))
    return {"rows": shown, "axis": axis, "kinds": list(dict.fromkeys(row["kind"] for row in rows if row is not final))}


def _marks(row: Row, skills: Sequence[str], final: bool) -> list[Mark]:
    kind = "final" if final else row["kind"]
    found = [Mark(row["name"], kind, row["mean"], row["interval"])]
    return found + [Mark(row["name"], kind, row["tasks"][s]["score"], row["tasks"][s]["interval"]) for s in skills]


def _ends(row: Row, skills: Sequence[str]) -> list[float]:
    return [end for mark in _marks(row, skills, True) for end in mark.bounds]


def _over_all(row: Row) -> dict[str, Any]:
    """The row as if its mean were a skill."""
    return {key: row[key] for key in ("name", "kind", "interval", "result_minus")} | {"score": row["mean"]}


def _field(name: str, items: int | None, views: Sequence[Row], final: Row, axis: Axis) -> dict[str, Any]:
    best = max((view for view in views if view["kind"] == "single"), key=lambda view: view["score"])
    marks = [Mark(view["name"], view["kind"], view["score"], view["interval"]) for view in views if view is not final]
    own = Mark(final["name"], "final", final["score"], final["interval"])
    values = [mark.value for mark in (own, *marks)]
    label = f"{name}: {own.hint}; all models {text.score(min(values))} to {text.score(max(values))}"
    return {
        "name": name,
        "tested": items,
        "plot": field(marks, own, axis, label=label),
        "score": text.score(final["score"]),
        "best": best["name"],
        "best_score": text.score(best["score"]),
        **_difference(best["result_minus"], same=best is final),
    }


def _difference(found: Sequence[float], *, same: bool = False) -> dict[str, Any]:
    """(difference, low, high) as texts; of a model with itself there is none."""
    value, *bounds = found
    if same:
        return {"difference": text.NOTHING, "interval": "", "verdict": "same"}
    return {"difference": text.gain(value), "interval": text.interval(bounds), "verdict": verdict(bounds)}


def scores(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Every model's scores; the best mean first, equal means in the order of results.json."""
    rows, skills = results["models"], results["skills"]
    low, high = bounds([task["score"] for row in rows for task in row["tasks"].values()])
    axis = Axis.around([value for row in rows for value in row["interval"]])
    best = {skill: max(row["tasks"][skill]["score"] for row in rows) for skill in skills}
    best_mean = max(row["mean"] for row in rows)
    final, dense = final_row(results, outcome), len(rows) > MANY
    shown = [
        {
            **_who(row, row is final),
            "mean": _cell(row["mean"], best_mean, low, high, row["interval"]),
            "plot": score_plot(row["mean"], row["interval"], axis, final=row is final, dense=dense),
            "cells": [_cell(row["tasks"][s]["score"], best[s], low, high, row["tasks"][s]["interval"]) for s in skills],
        }
        for row in _best_first(rows)
    ]
    return {"skills": skills, "rows": shown, "low": low, "high": high, "axis": axis, "dense": dense}


def against(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The final model minus every other one, paired over items: over all skills, then on each."""
    final, skills = final_row(results, outcome), results["skills"]
    rows = [row for row in _best_first(results["models"]) if row is not final]
    axis = Axis.around([value for row in rows for value in row["result_minus"]], signed=True)
    largest = max((abs(row["tasks"][skill]["result_minus"][0]) for row in rows for skill in skills), default=0.0)
    best = results["comparisons"][0]["b"]
    dense = len(rows) > MANY
    shown = [
        {
            **_who(row, False),
            **_difference(row["result_minus"]),
            "rival": row["kind"] == "single" and row["name"] == best,
            "value": row["result_minus"][0],
            "plot": gain_plot(row["result_minus"], axis, dense=dense),
            "cells": [_gap(row["tasks"][skill]["result_minus"], largest) for skill in skills],
        }
        for row in rows
    ]
    return {"skills": skills, "rows": shown, "axis": axis, "dense": dense, "count": len(rows) * len(skills)}


def merges(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each merge against the best member and the uniform average of its family, in the order of results.json; None without merges."""
    rows = [row for row in results["comparisons"] if row["a"] != "result"]
    if not rows:
        return None
    axis = Axis.around([value for row in rows for value in row["interval"]], signed=True)
    shown = []
    for row in rows:
        found = [row["difference"], *row["interval"]]
        skills = "all skills" if row["skills"] == results["skills"] else ", ".join(row["skills"])
        shown.append({"a": row["a"], "b": row["b"], "skills": skills, **_difference(found), "plot": gain_plot(found, axis)})
    return {"rows": shown, "axis": axis}


def ranking(decisions: Mapping[str, Any], families: Mapping[str, int]) -> dict[str, Any]:
    """Every member of the zoo on proxy items, best first."""
    rows, skills = decisions["ranking"], decisions["tasks"]["proxy"]
    low, high = bounds([value for row in rows for value in row["tasks"].values()])
    axis = Axis.around([value for row in rows for value in row["interval"]])
    best = {skill: max(row["tasks"][skill] for row in rows) for skill in skills}
    dense = len(rows) > MANY
    shown = [
        {
            "rank": rank,
            "name": row["alias"],
            "family": families.get(row["alias"]),
            "score": text.score(row["score"]),
            "plot": score_plot(row["score"], row["interval"], axis, dense=dense),
            "cells": [_cell(row["tasks"][skill], best[skill], low, high) for skill in skills],
        }
        for rank, row in enumerate(rows, start=1)
    ]
    warnings = [f"{row['alias']}: {warning}" for row in rows for warning in row.get("warnings", ())]
    return {"skills": skills, "rows": shown, "low": low, "high": high, "axis": axis, "dense": dense, "warnings": warnings}


def bounds(values: list[float]) -> tuple[float, float]:
    """Ends of the colour scale: the tenths around all values, so that colours mean the same in every column."""
    return math.floor(10 * min(values, default=0.0)) / 10, math.ceil(10 * max(values, default=1.0)) / 10


def cells(values: Sequence[float], best: Sequence[bool], low: float, high: float) -> Iterator[dict[str, Any]]:
    """Scores on a colour scale; the best ones are set bold."""
    for value, is_best in zip(values, best, strict=True):
        yield {"value": value, "text": text.score(value), "style": heat(value, low, high), "best": is_best, "hint": None}


def _cell(value: float, best: float, low: float, high: float, ends: Sequence[float] | None = None) -> dict[str, Any]:
    (found,) = cells([value], [value == best], low, high)
    return {**found, "hint": f"{text.score(ends[0])} to {text.score(ends[1])}" if ends else None}


def _gap(found: Sequence[float], largest: float) -> dict[str, Any]:
    """A difference on one skill: coloured when its interval does not hold 0, the stronger the larger."""
    value, *ends = found
    return {
        "value": value,
        "text": text.gain(value),
        "verdict": verdict(ends),
        "style": heat(abs(value), 0.0, largest),
        "hint": text.interval(ends),
    }


def _who(row: Row, final: bool) -> dict[str, Any]:
    kind = KINDS.get(row["kind"], row["kind"])
    return {"name": row["name"], "kind": kind, "family": row["family"], "final": final}


def _best_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -float(row["mean"]))
