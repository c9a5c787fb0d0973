"""Decisions inside a family: what every strategy tried, what it took, and what its merge is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.report import text
from modelglue.report.charts import Axis, best_trial, trials, verdict, whisker

STRATEGIES = {
    "average": "Average",
    "coefficient": "Coefficient",
    "similarity_highest": "Similarity, nearest first",
    "similarity_lowest": "Similarity, farthest first",
}
_ABOUT = {
    "average": "adds a member to the uniform average if the average gets no worse",
    "coefficient": "blends in one member after the other, best score first, trying every coefficient",
    "similarity_highest": "the same, the member most similar to the current merge first",
    "similarity_lowest": "the same, the member least similar to the current merge first",
}


def family_view(family: Mapping[str, Any]) -> dict[str, Any]:
    """One family of decisions.json, ready for the template."""
    representative = family["representative"]
    weights = representative["weights"]
    coefficients = [
        {"name": alias, "value": weights.get(alias), "bar": f"--w:{weights.get(alias, 0.0):.4f}", "text": _weight(weights.get(alias))}
        for alias in family["members"]
    ]
    runs = family["strategies"]
    axis = Axis.around([end for run in runs for one in run["rounds"] for end in one["interval"]], zero=True)
    scores = [run["individual"][run["order"][0]] for run in runs]
    scores += [value for run in runs for one in run["rounds"] for value in (one["scores"] or {"": one["score"]}).values()]
    scale = Axis.around(scores)
    difference, *bounds = representative["interval_vs_best_member"]
    return {
        "id": family["id"],
        "members": family["members"],
        "representative": representative,
        "score": text.score(representative["proxy"]),
        "best_member": representative["best_member"],
        "gain": text.gain(difference),
        "interval": text.interval(bounds),
        "verdict": verdict(bounds),
        "coefficients": coefficients,
        "confirmed": any(run["confirmation"] is not None for run in runs),
        "strategies": [_strategy(run, family["chosen"], scale, axis) for run in runs],
        "grid": _ends(runs),
    }


def _weight(value: float | None) -> str:
    return "left out" if value is None else f"{value:.3f}"


def _best(scores: Mapping[str, float] | None) -> str:
    """Coefficient of the best trial; of equal ones the largest, as the search has it."""
    return f"{best_trial(scores)[0]:g}" if scores else ""


def _ends(runs: list[Mapping[str, Any]]) -> str:
    """First and last coefficient of the grid."""
    found = sorted({float(c) for run in runs for one in run["rounds"] for c in one["scores"] or {}})
    return f"{found[0]:g} to {found[-1]:g}" if found else ""


def _strategy(run: Mapping[str, Any], chosen: str | None, scale: Axis, axis: Axis) -> dict[str, Any]:
    name = run["strategy"]
    rounds = []
    before = run["individual"][run["order"][0]]
    for one in run["rounds"]:
        difference, *bounds = one["interval"]
        judged = verdict(bounds) if one["accepted"] else "plain"
        hint = f"{text.gain(difference)} ({text.interval(bounds)})"
        rounds.append(
            {
                "candidate": one["candidate"],
                "own": text.score(run["individual"].get(one["candidate"])),
                "before": text.score(before),
                "score": text.score(one["score"]),
                "accepted": one["accepted"],
                "best": _best(one["scores"]),
                "trials": trials(one["scores"], before, scale, taken=one["accepted"]) if one["scores"] else None,
                "gain": text.gain(difference),
                "interval": text.interval(bounds),
                "plot": whisker(difference, bounds, axis, kind=judged, hint=hint, zero=True, width=110),
            }
        )
        before = one["current"]
    return {
        "name": STRATEGIES.get(name, name),
        "about": _ABOUT.get(name, ""),
        "chosen": name == chosen,
        "start": run["order"][0],
        "start_score": text.score(run["individual"][run["order"][0]]),
        "kept": sum(1 for weight in run["weights"].values() if weight),
        "members": len(run["order"]),
        "evaluations": text.count(run["evaluations"]),
        "score": text.score(run["score"]),
        "confirmation": text.score(run["confirmation"]),
        "rounds": rounds,
        "grid": any(one["scores"] for one in run["rounds"]),
        "warnings": run["warnings"],
    }
