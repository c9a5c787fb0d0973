"""The first thing on the page: what came out, and whether it beats the best single model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelglue.report.charts import verdict
from modelglue.report.read import RunData

#: kind of the outcome -> kind of its row in results.json
ROW_KIND = {"mixture": "mixture", "merge": "representative", "single": "single"}
UNSEEN = "test"


@dataclass(frozen=True)
class Headline:
    """Final model against the best single model, on the items named by `split`."""

    kind: str
    name: str
    reason: str
    parts: Sequence[str]
    """Experts of a mixture, members of a merge."""
    score: float
    interval: Sequence[float] | None
    """Of the final model's score; None before the final comparison."""
    items: int | None
    skills: int
    best_single: str
    best_single_score: float
    difference: float
    bounds: tuple[float, float]
    split: str

    @property
    def verdict(self) -> str:
        """better, worse, undecided; `same` when the final model is the best single model."""
        if self.kind == "single" and self.name == self.best_single:
            return "same"
        return verdict(self.bounds)

    @property
    def unseen(self) -> bool:
        """Whether no decision has seen these items."""
        return self.split == UNSEEN


def headline(data: RunData) -> Headline | None:
    """From results.json; without it, from the confirmation; None before that."""
    if data.decisions is None:
        return None
    outcome = data.decisions["outcome"]
    difference, *bounds = outcome["interval_vs_best_single"]
    confirmed = Headline(
        kind=outcome["kind"], name=outcome["name"], reason=outcome["reason"], parts=_parts(data.decisions),
        score=outcome["score"], interval=None, items=None, skills=len(data.decisions["tasks"][outcome["split"]]),
        best_single=outcome["best_single"], best_single_score=outcome["score"] - difference,
        difference=difference, bounds=(bounds[0], bounds[1]), split=outcome["split"],
    )  # fmt: skip
    return confirmed if data.results is None else _measured(confirmed, data.results, outcome)


def _measured(confirmed: Headline, results: Mapping[str, Any], outcome: Mapping[str, Any]) -> Headline:
    """The same with the scores of the final comparison."""
    comparison = results["comparisons"][0]
    final, single = final_row(results, outcome), _row(results, comparison["b"], "single")
    low, high = comparison["interval"]
    return replace(
        confirmed, score=final["mean"], interval=final["interval"], items=sum(task["items"] for task in final["tasks"].values()),
        best_single=comparison["b"], best_single_score=single["mean"],
        difference=comparison["difference"], bounds=(low, high), split=results["split"],
    )  # fmt: skip


def final_row(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the final model; an alias may be called like it, so the kind decides."""
    return _row(results, outcome["name"], ROW_KIND[outcome["kind"]])


def _row(results: Mapping[str, Any], name: str, kind: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in results["models"] if row["name"] == name and row["kind"] == kind)
    return found


def _parts(decisions: Mapping[str, Any]) -> list[str]:
    outcome = decisions["outcome"]
    if outcome["kind"] == "mixture":
        return [expert["name"] for expert in decisions["experts"] if expert["kept"]]
    if outcome["kind"] == "merge":
        family = next(f for f in decisions["families"] if f["representative"]["name"] == outcome["name"])
        return [alias for alias in family["members"] if alias in family["representative"]["weights"]]
    return []


def walk(data: RunData) -> list[tuple[int, str]]:
    """How the zoo became one model: numbers and what they count, step by step."""
    steps = [(len(data.aliases), "models")]
    if data.families:
        steps.append((len(data.families["families"]), "families"))
    if data.decisions:
        families = data.decisions["families"]
        steps.append((sum(f["representative"]["kind"] == "merge" for f in families), "merges"))
        steps.append((sum(expert["kept"] for expert in data.decisions["experts"]), "experts"))
    return [(number, word if number != 1 else _SINGULAR[word]) for number, word in steps]


_SINGULAR = {"models": "model", "families": "family", "merges": "merge", "experts": "expert"}
