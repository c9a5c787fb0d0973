"""What a search has found so far, from its journal alone: no model, no task and no searcher is needed, and the search may be running."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from modelglue.recipe import Candidate, Cost, Scores
from modelglue.search.findings import SearchReport, gathered
from modelglue.search.journal import Asked, Journal
from modelglue.search.run import JOURNAL
from modelglue.search.searcher import Outcome, Proposal
from modelglue.search.settings import SearchSettings, make_objective
from modelglue.search.study import CONFIRM, SEARCH, joined


def recorded(folder: str | Path) -> SearchReport:
    """The report of a search in a folder, as far as it has told its searcher. UserError if there is none.

    Tasks of an item-response fitness are the means of the items that were scored; values are what the searcher was told.
    """
    with Journal(Path(folder) / JOURNAL, read_only=True) as journal:
        run, asked = journal.run(), journal.asked()
        events = journal.events()
        parts = list(journal.results(SEARCH))
        confirmed = dict(journal.results(CONFIRM))
    settings = SearchSettings.model_validate(run["settings"])
    scores, spent = _scored(parts)
    first = _rows(asked, scores)
    batches: dict[int, list[Asked]] = {}
    for one in asked:
        batches.setdefault(one.batch, []).append(one)
    told = {fields["batch"]: fields for kind, fields in events if kind == "told"}
    objective, whole = make_objective(settings), _whole(settings, run["tasks"])
    outcomes = []
    for batch, members in batches.items():
        fields = told.get(batch)
        for place, one in enumerate(members):
            known = scores.get(first.get(one.key or "", one.id), Scores({}))
            if fields is not None and place < len(fields["values"]):
                value, status = fields["values"][place], fields["statuses"][place]
            elif known.status == "ok" and sum(map(len, known.items.values())) == whole:  # of a batch that was cut short
                value, status = objective(known.tasks()), "ok"
            else:
                continue
            tasks = known.tasks() if status in ("ok", "pruned") and known.items else {}
            candidate = None if one.recipe is None else Candidate(one.recipe)
            proposal = Proposal(candidate, json.loads(one.params), tuple(json.loads(one.parents)), one.tag)
            outcomes.append(Outcome(one.id, proposal, status, -math.inf if value is None else value, tasks, replace(known, status=status)))
    ended = [fields for kind, fields in events if kind == "ended"]
    last = ended[-1] if ended and [kind for kind, _ in events if kind in ("began", "ended", "stopped")][-1] == "ended" else {}
    keys = [one.proposal.candidate.key for one in outcomes if one.proposal.candidate is not None]
    return gathered(
        outcomes, {id_: found for id_, found in confirmed.items() if id_ in {one.id for one in outcomes}}, objective, tuple(run["tasks"]),
        counts={"candidates": len(scores), "duplicates": len(keys) - len(set(keys)), "replayed": 0}, spent=spent,
        stopped=last.get("stopped", ""), searcher=last.get("searcher", {}), confirms=run.get("confirmation") is not None,
    )  # fmt: skip


def _whole(settings: SearchSettings, sizes: Mapping[str, int]) -> int:
    """Items of a candidate that was not given up."""
    most = settings.fitness.items if settings.fitness.kind == "item_response" else settings.fitness.limit
    return sum(size if most is None else min(size, most) for size in sizes.values())


def _scored(parts: list[tuple[int, Scores]]) -> tuple[dict[int, Scores], Cost]:
    """Scores by the candidate that they are kept under, all parts together, and what they cost."""
    scores: dict[int, Scores] = {}
    spent = Cost()
    for id_, part in parts:
        scores[id_] = joined(scores[id_], part) if id_ in scores else part
        spent += part.cost
    return scores, spent


def _rows(asked: list[Asked], scores: dict[int, Scores]) -> dict[str, int]:
    """Key -> the candidate under which its scores are kept."""
    found: dict[str, int] = {}
    for one in asked:
        if one.key is not None and one.id in scores:
            found.setdefault(one.key, one.id)
    return found
