"""How far a run is: its steps in order, and which of them are done."""

from __future__ import annotations

from typing import Any

from modelglue.report.read import RunData


def steps(data: RunData) -> list[dict[str, Any]]:
    """Ranking and selection leave no file of their own: the log says that their scores are stored."""
    logged = {line["event"] for line in data.log}
    found = [
        ("description of the zoo", True),
        ("similarities", data.similarity is not None),
        ("families", data.families is not None),
        ("ranking", "ranking" in logged),
        ("merges", "selection" in logged),
        ("experts and outcome", data.decisions is not None),
        ("final comparison", data.results is not None),
        ("recipe", data.complete),
    ]
    last = max(number for number, (_, done) in enumerate(found) if done)
    return [
        {"name": name, "state": "done" if number <= last else "next" if number == last + 1 else "open"}
        for number, (name, _) in enumerate(found)
    ]
