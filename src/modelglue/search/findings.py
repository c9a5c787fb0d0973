"""What a search found: the best by every objective, the front, what was spent, and how far the best number may be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modelglue.recipe import Cost, Scores, interval
from modelglue.search.objective import Objective
from modelglue.search.pareto import hypervolume, non_dominated
from modelglue.search.searcher import Outcome, ranked
from modelglue.search.study import Study


@dataclass(frozen=True)
class SearchReport:
    """A finished search, or one that stopped; JSON-ready but for its candidates."""

    best: Outcome | None
    """By the objective; with confirmation items the best of the finalists on those."""
    by_task: Mapping[str, Outcome]
    front: Sequence[Outcome]
    """Candidates that no other one beats on every task; one entry where there is one task."""
    hypervolume: float | None
    """What the front covers above the worst score of every task; None for more than three tasks."""
    outcomes: Sequence[Outcome]
    confirmed: Mapping[int, Scores]
    counts: Mapping[str, int]
    spent: Mapping[str, float]
    bias: float | None
    """By about so much the best of so many noisy scores is too high: se * sqrt(2 ln N)."""
    stopped: str
    searcher: Mapping[str, Any]
    warnings: tuple[str, ...]

    def leaders(self, count: int) -> list[Outcome]:
        """The best candidates that were scored whole, each recipe once, the best first."""
        once = {outcome.proposal.candidate.key: outcome for outcome in reversed(ranked(self.outcomes)) if outcome.proposal.candidate}
        return list(reversed(once.values()))[:count]

    def history(self) -> list[dict[str, Any]]:
        """Every candidate in order, with the best value so far and the items that had been asked for."""
        rows = []
        best, items = -math.inf, 0
        paid: dict[str | None, int] = {}
        for outcome in self.outcomes:
            key = outcome.proposal.candidate.key if outcome.proposal.candidate else None
            items += max(0, outcome.scores.cost.items - paid.get(key, 0))
            paid[key] = max(paid.get(key, 0), outcome.scores.cost.items)
            best = max(best, outcome.value) if outcome.whole else best
            rows.append(
                {
                    "id": outcome.id, "tag": outcome.proposal.tag, "status": outcome.status,
                    "value": outcome.value if math.isfinite(outcome.value) else None, "best": best if math.isfinite(best) else None,
                    "items": items, "tasks": dict(outcome.tasks), "parents": list(outcome.proposal.parents),
                }
            )  # fmt: skip
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "best": None if self.best is None else self._entry(self.best),
            "by_task": {task: self._entry(outcome) for task, outcome in self.by_task.items()},
            "front": [self._entry(outcome) for outcome in self.front],
            "hypervolume": self.hypervolume,
            "confirmed": [{"id": id_, "score": scores.mean, "tasks": scores.tasks()} for id_, scores in self.confirmed.items()],
            "counts": dict(self.counts),
            "spent": dict(self.spent),
            "bias": self.bias,
            "stopped": self.stopped,
            "searcher": dict(self.searcher),
            "warnings": list(self.warnings),
            "history": self.history(),
        }

    def _entry(self, outcome: Outcome) -> dict[str, Any]:
        candidate = outcome.proposal.candidate
        confirmed = self.confirmed.get(outcome.id)
        return {
            "id": outcome.id, "recipe": None if candidate is None else candidate.recipe, "params": dict(outcome.proposal.params),
            "value": outcome.value, "tasks": dict(outcome.tasks), "confirmed": None if confirmed is None else confirmed.mean,
        }  # fmt: skip


def findings(study: Study) -> SearchReport:
    """The report of a study that has run."""
    return gathered(
        study.outcomes, study.confirmed, study.objective, tuple(study.evaluator.tasks), counts=study.counts, spent=study.spent,
        stopped=study.stopped, searcher=study.searcher.report(), confirms=study.confirm is not None,
    )  # fmt: skip


def gathered(
    outcomes: Sequence[Outcome], confirmed: Mapping[int, Scores], objective: Objective, tasks: Sequence[str], *, counts: Mapping[str, int],
    spent: Cost, stopped: str, searcher: Mapping[str, Any], confirms: bool,
) -> SearchReport:  # fmt: skip
    """The report of these outcomes."""
    order = ranked(outcomes)
    best = order[0] if order else None
    usable = {id_: scores for id_, scores in confirmed.items() if scores.status == "ok"}
    if usable:
        best = max((one for one in outcomes if one.id in usable), key=lambda one: (objective(usable[one.id].tasks()), one.merit, -one.id))
    distinct = list({outcome.proposal.candidate.key: outcome for outcome in reversed(order) if outcome.proposal.candidate}.values())
    distinct.sort(key=lambda outcome: outcome.id)
    front, volume = _front(distinct)
    statuses = {status: sum(outcome.status == status for outcome in outcomes) for status in ("ok", "pruned", "invalid", "failed")}
    return SearchReport(
        best=best,
        by_task={task: max(distinct, key=lambda one: (one.tasks[task], -one.id)) for task in tasks} if distinct else {},
        front=front,
        hypervolume=volume,
        outcomes=tuple(outcomes),
        confirmed=confirmed,
        counts={**counts, **statuses},
        spent={name: float(value) if name == "seconds" else value for name, value in asdict(spent).items()},
        bias=None if best is None else winners_curse(best.scores, len(distinct)),
        stopped=stopped,
        searcher=searcher,
        warnings=tuple(_warnings(outcomes, distinct, confirms=confirms)),
    )


def winners_curse(scores: Scores, count: int) -> float | None:
    """se * sqrt(2 ln N): by about so much the best of `count` scores as noisy as this one is too high. None without items."""
    if count < 2 or not any(len(values) > 1 for values in scores.items.values()):
        return None
    low, high = interval(scores, level=0.6827)
    return (high - low) / 2 * math.sqrt(2 * math.log(count))


def _front(outcomes: Sequence[Outcome]) -> tuple[list[Outcome], float | None]:
    if not outcomes:
        return [], None
    values = np.array([list(outcome.tasks.values()) for outcome in outcomes])
    chosen = [int(position) for position in non_dominated(values)]
    seen: dict[tuple[float, ...], Outcome] = {}
    for position in chosen:
        seen.setdefault(tuple(values[position].tolist()), outcomes[position])
    volume = hypervolume(values[chosen], values.min(axis=0)) if values.shape[1] <= 3 else None
    return list(seen.values()), volume


def _warnings(outcomes: Sequence[Outcome], distinct: Sequence[Outcome], *, confirms: bool) -> list[str]:
    found = list(dict.fromkeys(text for outcome in outcomes for text in outcome.scores.warnings))
    if len(distinct) > 1 and len({outcome.value for outcome in distinct}) == 1:
        found.append(f"the items cannot tell these candidates apart: every one scores {distinct[0].value:.4f}.")
    if failed := [outcome for outcome in outcomes if outcome.status == "failed"]:
        found.append(f"{len(failed)} candidates failed; the last one: {failed[-1].scores.error}")
    if not confirms and len(distinct) > 1:
        found.append("the best score was chosen and measured on the same items, so it is too high; confirm it on others.")
    return found
