"""Decisions inside a family: what every strategy tried, what it took, and what its merge is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.report import text
from modelglue.report.charts import Axis, best_trial, gain_plot, trials, verdict

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


def families_view(families: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All families of decisions.json, and what there is to explain about them."""
    views = [_family(family) for family in families]
    return {
        "families": views,
        "searched": any(view["strategies"] for view in views),
        "confirmed": any(view["confirmed"] for view in views),
        "grid": any(view["grid"] for view in views),
    }


def _family(family: Mapping[str, Any]) -> dict[str, Any]:
    """One family of decisions.json, ready for the template."""
    representative, runs = family["representative"], family["strategies"]
    weights = representative["weights"]
    axis = Axis.around([end for run in runs for one in run["rounds"] for end in one["interval"]], signed=True)
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
        "coefficients": [_coefficient(alias, weights.get(alias)) for alias in family["members"]],
        "confirmed": any(run["confirmation"] is not None for run in runs),
        "strategies": [_strategy(run, family["chosen"], axis) for run in runs],
        "axis": axis,
        "grid": _ends(runs),
    }


def _coefficient(alias: str, weight: float | None) -> dict[str, Any]:
    return {
        "name": alias,
        "kept": weight is not None,
        "bar": f"--w:{weight or 0.0:.4f}",
        "text": "left out" if weight is None else f"{weight:.3f}",
    }


def _best(scores: Mapping[str, float] | None) -> str:
    """Coefficient of the best trial; of equal ones the largest, as the search has it."""
    return f"{best_trial(scores)[0]:g}" if scores else ""


def _ends(runs: Sequence[Mapping[str, Any]]) -> str:
    """First and last coefficient of the grid."""
    found = sorted({float(c) for run in runs for one in run["rounds"] for c in one["scores"] or {}})
    return f"{found[0]:g} to {found[-1]:g}" if found else ""


def _strategy(run: Mapping[str, Any], chosen: str | None, axis: Axis) -> dict[str, Any]:
    name, start = run["strategy"], run["order"][0]
    rounds = []
    before = run["individual"][start]
    for one in run["rounds"]:
        rounds.append(_round(one, run["individual"], before, axis))
        before = one["current"]
    weights = {alias: weight for alias, weight in run["weights"].items() if weight}
    return {
        "name": STRATEGIES.get(name, name),
        "about": _ABOUT.get(name, ""),
        "chosen": name == chosen,
        "start": start,
        "start_score": text.score(run["individual"][start]),
        "weights": [(alias, f"{weights[alias]:.3f}") for alias in run["order"] if alias in weights],
        "kept": len(weights),
        "members": len(run["order"]),
        "evaluations": text.count(run["evaluations"]),
        "score": text.score(run["score"]),
        "confirmation": text.score(run["confirmation"]),
        "rounds": rounds,
        "grid": any(one["scores"] for one in run["rounds"]),
        "warnings": run["warnings"],
    }


def _round(one: Mapping[str, Any], individual: Mapping[str, float], before: float, axis: Axis) -> dict[str, Any]:
    difference, *bounds = one["interval"]
    return {
        "candidate": one["candidate"],
        "own": text.score(individual.get(one["candidate"])),
        "before": text.score(before),
        "score": text.score(one["score"]),
        "accepted": one["accepted"],
        "best": _best(one["scores"]),
        "trials": trials(one["scores"], before, taken=one["accepted"]) if one["scores"] else None,
        "gain": text.gain(difference),
        "interval": text.interval(bounds),
        "plot": gain_plot(one["interval"], axis),
    }
