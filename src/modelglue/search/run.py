"""A search in a folder: begun, resumed, read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Evaluator
from modelglue.search.findings import SearchReport, findings
from modelglue.search.journal import Asked, Journal
from modelglue.search.settings import Facts, SearchSettings, make_budget, make_fitness, make_objective, make_searcher
from modelglue.search.study import Listener, Study

#: the file of a search, in its folder
JOURNAL = "search.sqlite"
_LIBRARIES = ("modelglue", "numpy", "scipy", "cmaes", "optuna")


def run_study(
    settings: SearchSettings,
    evaluator: Evaluator,
    folder: str | Path | None,
    *,
    confirm: Evaluator | None = None,
    facts: Facts | None = None,
    on_event: Listener | None = None,
) -> SearchReport:
    """Search with these settings, or go on where the search in `folder` was interrupted; None keeps nothing.

    A search is a function of its settings, evaluator and seed: going on asks everything again and finds the answers in the folder. A
    budget may be raised between two runs. UserError where settings or evaluator are not those of the folder's search, or its file is
    damaged (it is left as it is); ReplayError where a library answers otherwise than it did; RunError after too many failures.
    """
    facts = facts or Facts()
    objective, fitness, searcher = make_objective(settings), make_fitness(settings, facts), make_searcher(settings, facts)
    with Journal(None if folder is None else Path(folder) / JOURNAL) as journal:
        _same(journal, _description(settings, evaluator, confirm))
        study = Study(
            searcher, evaluator, journal, objective, fitness, make_budget(settings), settings.seed, settings.batch, settings.max_failures,
            confirm, settings.finalists, on_event or (lambda _name, _fields: None),
        )  # fmt: skip
        journal.note("began", {"versions": _versions(), "candidates": len(journal.asked())})
        study.run()
        found = findings(study)
        journal.note("ended", {"stopped": study.stopped, "searcher": found.searcher})
        return found


def read_settings(folder: str | Path) -> SearchSettings:
    """The settings that a folder's search began with, without its budget. UserError if there is none."""
    with Journal(Path(folder) / JOURNAL, read_only=True) as journal:
        return SearchSettings.model_validate(journal.run()["settings"])


def candidate_of(folder: str | Path, number: int) -> Candidate:
    """The recipe of a candidate of a search, by its number. UserError if there is none."""
    with Journal(Path(folder) / JOURNAL, read_only=True) as journal:
        asked = journal.asked()
    if not 0 <= number < len(asked):
        raise UserError(f"{folder}: there is no candidate {number}; the search asked for {len(asked)}.")
    text = asked[number].recipe
    if text is None:
        raise UserError(f"{folder}: candidate {number} is no model: {asked[number].params}.")
    return Candidate(text)


def progress_of(folder: str | Path) -> list[dict[str, Any]]:
    """What a search that runs or ended has told so far, batch by batch, without its evaluator."""
    with Journal(Path(folder) / JOURNAL, read_only=True) as journal:
        return [fields for kind, fields in journal.events(trace=True) if kind == "told"]


def warm_start(folder: str | Path, count: int = 5) -> tuple[dict[str, Any], ...]:
    """Parameters of the best candidates of a search, the best first: what another search may `start` from."""
    with Journal(Path(folder) / JOURNAL, read_only=True) as journal:
        batches = {fields["batch"]: fields for kind, fields in journal.events(trace=True) if kind == "told"}
        by_batch: dict[int, list[Asked]] = {}
        for asked in journal.asked():
            by_batch.setdefault(asked.batch, []).append(asked)
    whole = [
        (value, asked)
        for batch, fields in batches.items()
        for asked, value, status in zip(by_batch[batch], fields["values"], fields["statuses"], strict=True)
        if status == "ok"
    ]
    whole.sort(key=lambda pair: (-pair[0], pair[1].id))
    best = {asked.key: json.loads(asked.params) for _, asked in whole}
    return tuple(params for params in best.values() if params)[:count]


def _description(settings: SearchSettings, evaluator: Evaluator, confirm: Evaluator | None) -> dict[str, Any]:
    return {
        "settings": settings.content(),
        "evaluator": evaluator.identity,
        "confirmation": None if confirm is None else confirm.identity,
        "tasks": {task: len(evaluator.items(task)) for task in evaluator.tasks},
        "versions": _versions(),
    }


def _same(journal: Journal, now: Mapping[str, Any]) -> None:
    """The journal's search is this one, or it had none."""
    then = journal.describe(now)
    place = journal.path
    for name, what in (
        ("settings", "other settings"),
        ("evaluator", "other models, items or another way of scoring"),
        ("confirmation", "other items to confirm on"),
    ):
        if then[name] != now[name]:
            detail = ""
            if name == "settings":
                changed = [key for key in now[name] if then[name].get(key) != now[name][key]]
                detail = "; ".join(f" {key} was {json.dumps(then[name].get(key))}, is {json.dumps(now[name][key])}" for key in changed)
            raise UserError(
                f"{place}: this search was begun with {what}:{detail or ' their contents changed'}. Restore them, or choose another folder."
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
