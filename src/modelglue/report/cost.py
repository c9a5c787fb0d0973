"""What the run needed: counts that are a function of the inputs, and (apart from them) the times in the log."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.report import text

#: event of the log -> what it is called on the page
_STEPS = {
    "zoo.json": "description of the zoo",
    "similarity": "similarity",
    "families.json": "families",
    "ranking": "ranking",
    "selection": "selection",
    "write": "writing merges",
    "mixture": "mixture and confirmation",
    "test": "final comparison",
}


def counts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost = results["cost"]
    return [
        ("models and candidates scored", text.count(cost["candidates"])),
        ("items scored", text.count(cost["items_scored"])),
        ("weights in the zoo", text.size(cost["weights_bytes"])),
    ]


def times(log: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Seconds per step, added up over all processes that worked on the run; None for an empty log."""
    spent: dict[str, float] = {}
    for line in log:
        seconds = line.get("seconds")
        if isinstance(seconds, int | float):
            # every merge is written under its own name
            event = line["event"].partition(" ")[0]
            spent[event] = spent.get(event, 0.0) + seconds
    stamps = [line["time"] for line in log if isinstance(line.get("time"), int | float)]
    if not spent and not stamps:
        return None
    total = sum(spent.values())
    return {
        "rows": [
            {
                "name": _STEPS.get(event, event),
                "seconds": seconds,
                "text": text.duration(seconds),
                "share": text.percent(seconds, total),
                "bar": f"--w:{seconds / total if total else 0:.4f}",
            }
            for event, seconds in spent.items()
        ],
        "total": text.duration(total),
        "batches": text.count(sum(line["event"] == "batch" for line in log)),
        "first": _stamp(min(stamps, default=None)),
        "last": _stamp(max(stamps, default=None)),
    }


def _stamp(seconds: float | None) -> str:
    if seconds is None:
        return text.NOTHING
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
