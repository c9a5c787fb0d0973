"""The Model-GLUE recipe: zoo -> families -> representatives -> mixture -> evaluation (arXiv 2410.05357).

`glue` walks through the steps; each leaves a file in the run folder. Selection is replayed, not resumed: it asks its
evaluator again from the start, and the store answers everything that an earlier process had scored.

Memory: one resident model while scoring candidates, all experts while scoring the mixture, chunks while writing. Time goes into
scoring; `results.json` says how much was scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import save
from modelglue.glue import decide, mix
from modelglue.glue.bench import Bench, Listener, open_bench, run_key
from modelglue.glue.levels import choose_level, opened
from modelglue.glue.replay import Replay, is_replay, rebuild, write_replay
from modelglue.glue.run_folder import RunFolder, open_run
from modelglue.glue.schema import GlueFile
from modelglue.mixture import Mixture
from modelglue.recipe import load_document, validate


@dataclass(frozen=True)
class GlueResult:
    """Where the run stands and what came out of it."""

    run: Path
    outcome: Mapping[str, Any]
    results: Mapping[str, Any] | None
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

    Running it again continues a killed run, and answers "already complete" for a finished one. A recipe.yaml is rebuilt without
    scoring anything. Raises RecipeError for the file, CheckpointError for a model, UserError for tasks, prompts and folders;
    all before anything is scored where that is possible.
    """
    path, root = Path(source), Path(directory)
    document = load_document(path)
    if is_replay(document):
        outcome = rebuild(validate(document, Replay), path.parent, root, overwrite=overwrite, workers=workers)
        return GlueResult(root, outcome, None, False)
    file = validate(document, GlueFile)
    bench = open_bench(file, path.parent, listener or (lambda _event, _fields: None))
    with open_run(root, run_key(bench), overwrite=overwrite) as run:
        complete = run.complete
        if not complete:
            with bench.scoring(run):
                _walk(bench, run, workers)
            run.finish()
        decisions = run.read_json("decisions.json")
        assert decisions is not None, "a finished run has decided"
        return GlueResult(root, decisions["outcome"], run.read_json("results.json"), complete)


def _walk(bench: Bench, run: RunFolder, workers: int | None) -> None:
    """The steps, in order; everything that was finished before is read or answered by the store."""

    def begin(step: str) -> None:
        bench.emit("step", {"name": step})

    begin("zoo")
    run.step("zoo.json", lambda: decide.describe_zoo(bench))
    begin("similarity")
    with run.timed("similarity"):
        found = decide.similarity_of_zoo(bench, run.path("similarity.safetensors"))
    families = run.step("families.json", lambda: decide.families_of(bench, found))
    bench.emit("families", families)

    begin("ranking")
    with run.timed("ranking"):
        ranking = decide.rank(bench)
    bench.emit("ranking", {"ranking": ranking})

    begin("selection")
    with run.timed("selection"):
        representatives = [decide.merge_family(bench, found, family) for family in families["families"]]
    bench.emit("selection", {"families": [r.trace for r in representatives]})

    begin("writing")
    folder = run.path("representatives")
    folder.mkdir(exist_ok=True)
    for r in representatives:
        if bench.is_written(r.candidate) and not (folder / r.name).is_dir():
            with run.timed(f"write {r.name}"):
                # Its recipe names the models as they are seen from where the recipe will stand.
                references = decide.references_from(bench, folder / r.name)
                save(bench.materialise(r.candidate, references), folder / r.name, workers=workers)

    begin("mixture")
    verdicts = decide.verdicts(bench, representatives)
    kept = [(r, verdict) for r, verdict in zip(representatives, verdicts, strict=True) if verdict.kept]
    plan = mix.plan_mixture(bench, run, kept) if len(kept) > 1 else None
    if plan is not None:
        plan = choose_level(bench, run, mix.learn(bench, run, kept, plan))
    with run.timed("mixture"):
        if plan is not None and not run.path("mixture").is_dir():
            plan.write(run.root, run.path("mixture"))
        mixture = opened(plan, run.path("mixture")) if plan is not None else None
        if plan is not None and mixture is not None:
            plan = plan.decided(mixture.manifest)
        outcome, scores = mix.confirm(bench, representatives, mixture)
    router = None
    if isinstance(mixture, Mixture) and scores is not None:
        router = mix.diagnose(bench, mixture, scores, {r.name: r.proxy for r, _ in kept})
        router["learned"] = mix.how_learned(run)
    decisions = {
        "tasks": {split: bench.skills(split) for split in bench.splits},
        "ranking": ranking,
        "families": [r.trace for r in representatives],
        "experts": [
            {"name": r.name, "family": r.id, "won": list(v.won), "kept": v.kept, "reason": v.reason}
            for r, v in zip(representatives, verdicts, strict=True)
        ],
        "router": router,
        "levels": (run.read_json("levels.json") or {}).get("levels"),
        "outcome": outcome,
    }
    run.write_json("decisions.json", decisions)
    bench.emit("decisions", decisions)

    begin("test")
    with run.timed("test"):
        results = mix.final_results(bench, representatives, verdicts, mixture, outcome)
    results["cost"] = _cost(bench)
    run.write_json("results.json", results)
    write_replay(run, bench, representatives, plan, outcome)
    bench.emit("results", results)


def _cost(bench: Bench) -> dict[str, int]:
    """What the run needed, whoever of its processes did it: a function of the inputs, like everything but the log."""
    candidates, items = bench.scored()
    weights = sum(c.info(name).nbytes for c in bench.checkpoints.values() for name in c.names())
    return {"candidates": candidates, "items_scored": items, "weights_bytes": weights}
