"""The Model-GLUE recipe: zoo -> families -> representatives -> mixture -> evaluation (arXiv 2410.05357).

`glue` walks through the steps; each leaves a file in the run folder. Selection is replayed, not resumed: it asks its
evaluator again from the start, and the store answers everything that an earlier process had scored.

Memory: one resident model per architecture while scoring, memory-mapped members, chunks while writing. Time goes into
scoring; `results.json` says how much was scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, save
from modelglue.errors import UserError
from modelglue.glue import decide, mix
from modelglue.glue.bench import Bench, Listener, open_bench
from modelglue.glue.replay import replay, replay_document, write_replay
from modelglue.glue.run_folder import RunFolder, open_run
from modelglue.glue.schema import GlueFile
from modelglue.recipe import read_document


@dataclass(frozen=True)
class GlueResult:
    """Where the run stands and what came out of it."""

    run: Path
    outcome: Mapping[str, Any]
    results: Mapping[str, Any]
    already_complete: bool


def glue(
    source: str | Path,
    directory: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    listener: Listener | None = None,
) -> GlueResult:
    """Run the recipe of `source` (a glue file, or the recipe.yaml of an earlier run) in the folder `directory`.

    Running it again continues a killed run, and answers "already complete" for a finished one. Raises RecipeError for
    the glue file, CheckpointError for a model, UserError for tasks, prompts and folders; all before anything is scored
    where that is possible.
    """
    path, root = Path(source), Path(directory)
    emit = listener or (lambda event, fields: None)
    if (document := replay_document(path)) is not None:
        return replay(document, path.parent, root, overwrite=overwrite, workers=workers)
    file = read_document(path, GlueFile)
    bench = open_bench(file, path.parent, emit)
    with open_run(root, run_key(file, bench), overwrite=overwrite) as run:
        if run.complete:
            return GlueResult(root, run.read_json("decisions.json")["outcome"], run.read_json("results.json"), True)
        with bench.scoring(run):
            _walk(file, bench, run, workers)
        run.finish()
        return GlueResult(root, run.read_json("decisions.json")["outcome"], run.read_json("results.json"), False)


def run_key(file: GlueFile, bench: Bench) -> str:
    """SHA-256 over settings, contents of the models and contents of the tasks: what a run is a function of."""
    content = {
        "file": file.model_dump(mode="json"),
        "models": {alias: checkpoint.identity for alias, checkpoint in bench.checkpoints.items()},
        "tasks": {split: bench.task_identity(split) for split in bench.splits},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _walk(file: GlueFile, bench: Bench, run: RunFolder, workers: int | None) -> None:
    emit = bench.emit
    run.step("zoo.json", lambda: decide.describe_zoo(file, bench))
    emit("step", {"name": "similarity"})
    with run.timed("similarity"):
        similarity = decide.similarity_of_zoo(file, bench, run.path("similarity.safetensors"))
    families = run.step("families.json", lambda: decide.find_families(file, bench, similarity))
    emit("families", families)

    emit("step", {"name": "ranking"})
    with run.timed("ranking"):
        ranking = decide.rank(bench)
    emit("ranking", {"ranking": ranking})
    emit("step", {"name": "selection"})
    with run.timed("selection"):
        chosen = [decide.merge_family(file, bench, similarity, family) for family in families["families"]]
    emit("selection", {"families": [family.trace for family in chosen]})

    for family in chosen:
        if family.candidate.members[1:]:
            with run.timed(f"write {family.name}"):
                save(bench.materialise(family.candidate), run.path("representatives") / family.name, workers=workers)

    verdicts = decide.experts(file, bench, chosen)
    emit("step", {"name": "mixture"})
    kept = [family for family, verdict in zip(chosen, verdicts, strict=True) if verdict.kept]
    with run.timed("mixture"):
        mixture = mix.build(file, bench, run, kept) if len(kept) > 1 else None
    outcome = mix.confirm(bench, kept, mixture)
    decisions = {
        "tasks": {split: bench.skills(split) for split in bench.splits},
        "ranking": ranking,
        "families": [family.trace for family in chosen],
        "experts": [
            {"name": family.name, "family": family.id, "won": list(v.won), "kept": v.kept, "reason": v.reason}
            for family, v in zip(chosen, verdicts, strict=True)
        ],
        "router": mixture.diagnostics if mixture else None,
        "outcome": outcome,
    }
    run.write_json("decisions.json", decisions)
    emit("decisions", decisions)

    emit("step", {"name": "test"})
    with run.timed("test"):
        results = run.step("results.json", lambda: mix.final_results(bench, chosen, mixture, outcome))
    write_replay(file, bench, run, chosen, mixture, outcome)
    emit("results", results)
