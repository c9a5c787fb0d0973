"""A search as a process that can be killed: `python -m tests.search.kill_driver FOLDER LOG NAME WHERE [PAUSE]`.

Writes a line into LOG for every request that was answered. Kills itself with SIGKILL when it has answered WHERE requests (before the
answer can be stored); -1: never. At the end the report goes to FOLDER/report.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from modelglue.recipe import Candidate, Scores
from modelglue.search import SearchSettings, SyntheticEvaluator, run_study
from tests.search.doubles import Counting

OPTIONS: dict[str, dict[str, Any]] = {
    "coefficient": {}, "cma": {"trials": 40}, "evolution": {"population": 8, "generations": 4}, "map": {"points": 20, "generations": 5},
    "recycling": {"trials": 20}, "random": {"trials": 40},
}  # fmt: skip


def settings(name: str) -> SearchSettings:
    return SearchSettings(members=("m0", "m1", "m2"), base="o", searcher={"name": name, **OPTIONS[name]}, batch=4)  # type: ignore[arg-type]


def content(report: Any) -> str:
    """What must be the same however often the search was interrupted."""
    found = report.to_json()
    del found["counts"]["replayed"]
    return json.dumps(found, sort_keys=True)


def main(folder: str, log: str, name: str, where: str, pause: str = "0") -> None:
    def before(candidate: Candidate, number: int) -> Scores | None:
        with Path(log).open("a") as file:
            file.write(json.dumps([candidate.key, number]) + "\n")
        if number == int(where):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(pause))
        return None

    evaluator = Counting(SyntheticEvaluator(3, 2, 60), before=before)
    confirm = Counting(SyntheticEvaluator(3, 2, 60, split="confirm"))
    print("ready", flush=True)
    report = run_study(settings(name), evaluator, folder, confirm=confirm)
    (Path(folder) / "report.json").write_text(content(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
