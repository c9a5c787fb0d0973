"""Step 6 of the recipe: which representatives become experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether one representative stays, and why."""

    name: str
    won: tuple[str, ...]
    kept: bool
    reason: str


def choose_experts(
    scores: Mapping[str, Mapping[str, float]], *, keep: str = "winners", min_gain: float = 0.0, max_experts: int | None = None
) -> list[Verdict]:
    """Keep a representative if it has the best proxy value on at least one task.

    `scores[name][task]` in [0, 1]; a tie goes to the higher mean, then to the earlier name. With `min_gain` a win counts only
    if it beats the best other representative by that much. With `max_experts` those with the most tasks, then the highest mean, stay.
    `keep="all"` keeps everyone. At least one is always kept. The rule is a reconstruction: it yields the four experts
    that the Model-GLUE paper (arXiv 2410.05357) mixes from its five families.
    """
    names = list(scores)
    means = {name: sum(scores[name].values()) / len(scores[name]) for name in names}
    won: dict[str, list[str]] = {name: [] for name in names}
    for task in scores[names[0]]:
        ranked = sorted(names, key=lambda name: (-scores[name][task], -means[name], names.index(name)))
        lead = scores[ranked[0]][task] - (scores[ranked[1]][task] if len(ranked) > 1 else 0.0)
        if lead >= min_gain:
            won[ranked[0]].append(task)
    best = max(names, key=lambda name: (means[name], -names.index(name)))
    kept = [name for name in names if won[name]] or [best]
    if keep == "all":
        kept = names
    if max_experts is not None and len(kept) > max_experts:
        kept = sorted(kept, key=lambda name: (-len(won[name]), -means[name], names.index(name)))[:max_experts]
    return [_verdict(name, won[name], name in kept, keep) for name in names]


def _verdict(name: str, won: Sequence[str], kept: bool, keep: str) -> Verdict:
    if won:
        reason = "best on " + ", ".join(won) if kept else "best on " + ", ".join(won) + ", but over max_experts"
    elif kept:
        reason = "kept by request" if keep == "all" else "highest mean"
    else:
        reason = "best on no proxy task"
    return Verdict(name, tuple(won), kept, reason)
