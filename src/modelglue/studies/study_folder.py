"""A search in a folder, from its file to its result: begun, gone on with, read, written out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, DiskCheckpoint, SaveReport, save, write_bytes_atomic
from modelglue.checkpoint.adapted import AdaptedCheckpoint
from modelglue.errors import CheckpointError, MergeError, RecipeError, UserError
from modelglue.evaluation import CandidateEvaluator
from modelglue.evaluation.members import Members
from modelglue.evaluation.places import Place
from modelglue.recipe import FORMAT, Candidate, interval, load_document, paired_interval, validate
from modelglue.search import SearchReport, candidate_of, read_settings, recorded, run_study
from modelglue.search.journal import NotBegunError
from modelglue.search.study import Listener
from modelglue.studies.bench import Bench, open_bench, open_zoo
from modelglue.studies.facts import facts_of
from modelglue.studies.imported import Imported, imported
from modelglue.studies.schema import SearchFile

#: what a search folder holds besides its journal
FILE, RESULT, SCORES = "search.json", "result.json", "scores.sqlite"


@dataclass(frozen=True)
class Finished:
    """A search that has run to its end or its budget's."""

    folder: Path
    report: SearchReport
    result: Mapping[str, Any]
    """Content of result.json: the best candidate, and its score on items that no decision has seen."""


def read_search(path: str | Path) -> Imported:
    """The search of a file: ours, or a plan of mergekit-evolve or mergenetic, with what of it is not honoured.

    RecipeError lists every fault with file and line. Opens no model.
    """
    document = load_document(path)
    found = imported(document)
    return found if found is not None else Imported(validate(document, SearchFile), ())


def run_search(
    source: str | Path, folder: str | Path, *, workers: int | None = None, device: str = "cpu", executor: str = "local",
    store: Path | None = None, on_event: Listener | None = None,
) -> Finished:  # fmt: skip
    """Search as the file `source` says, in `folder`; a search that is there already goes on, if it is this one.

    `workers` processes score candidates and change no result (default: one per device). `device`: "cuda" for all GPUs, a worker each, or
    "cuda:0,cuda:1"; scores differ from the processor's by rounding. `executor`: "ray" or "ray://HOST:PORT" for workers on a cluster.
    `store`: a file of scores that several searches share. UserError for a folder with another search; RunError after too many candidates
    that cannot be scored.
    """
    path, folder = Path(source), Path(folder)
    place = Place.named(workers, device, executor)
    return _run(read_search(path).file, path.parent, folder, place, store, on_event)


def resume_search(
    folder: str | Path, *, workers: int | None = None, device: str = "cpu", executor: str = "local", store: Path | None = None,
    on_event: Listener | None = None,
) -> Finished:  # fmt: skip
    """Go on with the search in `folder`, by the file that it was begun with."""
    folder = Path(folder)
    place = Place.named(workers, device, executor)
    file, home = _remembered(folder)
    return _run(file, home, folder, place, store, on_event)


def limits_of(source: SearchFile | Path) -> dict[str, float | None]:
    """Candidates, items and seconds after which the search of a file, or the one in a folder, ends; None where that is open.

    What the file says: its budget, and the number of trials or generations, whichever is less.
    """
    file = source if isinstance(source, SearchFile) else _remembered(source)[0]
    said = file.searcher.options
    trials = said.get("trials") or (said.get("population") or 0) * (said.get("generations") or 0)
    known = [count for count in (file.budget.candidates, trials) if count]
    return {"candidates": min(known, default=None), "items": file.budget.items, "seconds": file.budget.seconds}


def _run(file: SearchFile, home: Path, folder: Path, place: Place, store: Path | None, on_event: Listener | None) -> Finished:
    bench = open_bench(file, home)
    try:
        mine = read_settings(folder).content() == bench.settings.content()
    except NotBegunError:
        mine = True
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / FILE, {"home": os.path.relpath(home.resolve(), folder.resolve()), "file": file.model_dump(mode="json")})
    facts = facts_of(bench.settings, bench.checkpoints, bench.tasks["proxy"], home)
    with bench.scoring(store or folder / SCORES, place) as evaluators:
        report = run_study(
            bench.settings, evaluators["proxy"], folder, confirm=evaluators.get("confirmation"), facts=facts, on_event=on_event
        )
        if "test" in evaluators and on_event is not None:
            on_event("test", {})
        result = _result(bench, report, evaluators.get("test"))
    _write(folder / RESULT, result)
    return Finished(folder, report, result)


def _result(bench: Bench, report: SearchReport, test: CandidateEvaluator | None) -> dict[str, Any]:
    """The outcome, and the final comparison on the test items: the best candidate, the members, the base and the plain average."""
    best = report.best
    if best is None or best.proposal.candidate is None:
        return {"best": None, "stopped": report.stopped, "test": None}
    found: dict[str, Any] = {
        "best": {"id": best.id, "recipe": best.proposal.candidate.recipe, "value": best.value, "tasks": dict(best.tasks)},
        "stopped": report.stopped,
        "test": None,
    }
    if test is None:
        return found
    members = list(bench.settings.members)
    rivals = {alias: Candidate.single(alias) for alias in members}
    if bench.settings.base is not None and bench.settings.base not in rivals:
        rivals[bench.settings.base] = Candidate.single(bench.settings.base)
    if len(members) > 1:
        rivals["uniform average"] = Candidate.linear(dict.fromkeys(members, 1.0))
    final = test.evaluate(best.proposal.candidate)
    rows: list[dict[str, Any]] = []
    for name, candidate in rivals.items():
        try:
            scores = test.evaluate(candidate)
        except (CheckpointError, MergeError, RecipeError) as error:
            rows.append({"name": name, "error": str(error)})
            continue
        if scores.status != "ok":
            rows.append({"name": name, "error": scores.error})
            continue
        gap = list(paired_interval(final, scores)) if final.status == "ok" else None
        rows.append({"name": name, "score": scores.mean, "interval": list(interval(scores)), "tasks": scores.tasks(), "best_minus": gap})
    score = (
        {"score": final.mean, "interval": list(interval(final)), "tasks": final.tasks()} if final.status == "ok" else {"error": final.error}
    )
    return {**found, "test": {"best": score, "rivals": rows}}


# -- what is in a folder -----------------------------------------------------------------------------------------------------------


def read_result(folder: str | Path) -> dict[str, Any] | None:
    """result.json, if the search has ended once."""
    path = Path(folder) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def best_of(folder: str | Path, number: int | None = None) -> Candidate:
    """The candidate of that number, or the best one. UserError if there is none."""
    if number is not None:
        return candidate_of(folder, number)
    best = recorded(folder).best
    if best is None or best.proposal.candidate is None:
        raise UserError(f"{folder}: no candidate has been scored yet. Resume the search.")
    return best.proposal.candidate


def expression_of(folder: str | Path, candidate: Candidate) -> Checkpoint:
    """A candidate of the search in `folder` as a checkpoint over its models, named by references; nothing is computed."""
    file, home = _remembered(Path(folder))
    checkpoints, _, _ = open_zoo(file, home)
    names: dict[str, Any] = {}
    opened: dict[str, Checkpoint] = {}
    for alias in candidate.aliases:
        member = checkpoints[alias]
        called = {str(source.describe()["model"]): _from_here(source) for source in member.sources()}
        if isinstance(member, DiskCheckpoint | AdaptedCheckpoint):
            names[alias] = _from_here(member)
            opened[names[alias]] = member.called(names[alias])
        else:
            names[alias] = _renamed(member.describe(), called)
            for source in member.sources():
                assert isinstance(source, DiskCheckpoint | AdaptedCheckpoint), "a recipe is made of models on disk"
                opened[_from_here(source)] = source.called(_from_here(source))
    return Members(opened, file.dtype.store).expression(candidate.over(names))


def _from_here(checkpoint: Checkpoint) -> str:
    """Hub ids as they were written; other models by their paths from the working folder."""
    if checkpoint.hub_id is not None or not checkpoint.places:
        return str(checkpoint.describe()["model"])
    return "+".join(os.path.relpath(place) for place in checkpoint.places)


def recipe_of(folder: str | Path, candidate: Candidate) -> dict[str, Any]:
    """The recipe of a candidate over references that can be opened from anywhere: what `modelglue merge` makes the same model of."""
    checkpoint = expression_of(folder, candidate)
    places = {
        str(source.describe()["model"]): "+".join(str(place.resolve()) for place in source.places)
        for source in checkpoint.sources()
        if source.places and source.hub_id is None
    }
    described = _renamed(checkpoint.describe(), places)
    return described if "method" in described else {"format": FORMAT, "method": "passthrough", "models": [described]}


def _renamed(description: Any, places: Mapping[str, str]) -> Any:
    if isinstance(description, list):
        return [_renamed(value, places) for value in description]
    if not isinstance(description, dict):
        return description
    return {
        key: places.get(value, value) if key in ("model", "base") and isinstance(value, str) else _renamed(value, places)
        for key, value in description.items()
    }


def write_candidate(
    folder: str | Path, out: str | Path, number: int | None = None, *, overwrite: bool = False, workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SaveReport:  # fmt: skip
    """Write the model of a candidate (default: the best), as `save` does."""
    checkpoint = expression_of(folder, best_of(folder, number))
    return save(checkpoint, out, overwrite=overwrite, workers=workers, progress=progress)


def _remembered(folder: Path) -> tuple[SearchFile, Path]:
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder}: is not the folder of a search (it has no {FILE}). Begin one with `modelglue search run`.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return SearchFile.model_validate(content["file"]), folder / content["home"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}). Begin the search again with its file.") from error


def _write(path: Path, value: Any) -> None:
    write_bytes_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
