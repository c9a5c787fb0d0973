"""The first thing on the page: what came out, and whether it beats the best single model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    score: float | None
    best_single: str
    best_single_score: float | None
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
    best, split, score, best_score = outcome["best_single"], outcome["split"], outcome["score"], outcome["score"] - difference
    if data.results is not None:
        comparison = data.results["comparisons"][0]
        best, split = comparison["b"], data.results["split"]
        difference, bounds = comparison["difference"], comparison["interval"]
        final, single = final_row(data.results, outcome), _row(data.results, best, "single")
        score, best_score = final and final["mean"], single and single["mean"]
    return Headline(
        outcome["kind"], outcome["name"], outcome["reason"], _parts(data.decisions), score, best, best_score,
        difference, (bounds[0], bounds[1]), split,
    )  # fmt: skip


def final_row(results: Mapping[str, Any], outcome: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the final model; an alias may be called like it, so the kind decides."""
    return _row(results, outcome["name"], ROW_KIND[outcome["kind"]])


def _row(results: Mapping[str, Any], name: str, kind: str) -> Mapping[str, Any] | None:
    return next((row for row in results["models"] if row["name"] == name and row["kind"] == kind), None)


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
