"""Steps 1 to 6 of the recipe: describe, compare, cluster, rank, merge inside families, choose experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.checkpoint.reference import moved_reference
from modelglue.errors import CheckpointError
from modelglue.glue.bench import Bench
from modelglue.glue.experts import Verdict, choose_experts
from modelglue.recipe import Candidate, interval, paired_interval
from modelglue.search import Selection, select
from modelglue.settings import CHUNK_ELEMENTS
from modelglue.zoo import Similarity, find_families, groups, signature, similarity


def describe_zoo(bench: Bench) -> dict[str, Any]:
    """zoo.json: who is in the zoo, and whose contents are equal. Reads every weight: CheckpointError for one that is no number."""
    for checkpoint in bench.checkpoints.values():
        check_values(checkpoint)
    models = []
    for alias in bench.members:
        checkpoint, model = bench.checkpoints[alias], bench.models[alias]
        models.append(
            {
                "alias": alias,
                "reference": model.reference,
                "identity": checkpoint.identity,
                "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
                "parameters": sum(checkpoint.info(name).numel for name in checkpoint.names()),
                "bytes": sum(checkpoint.info(name).nbytes for name in checkpoint.names()),
                "domain": list(model.domain),
                "prompts": model.prompts.model_dump() if model.prompts else {"positive": [], "negative": []},
            }
        )
    first: dict[str, str] = {}
    warnings = []
    for entry in models:
        twin = first.setdefault(str(entry["identity"]), str(entry["alias"]))
        if twin != entry["alias"]:
            warnings.append(f"'{entry['alias']}' and '{twin}' are the same model, byte for byte.")
    return {"name": bench.file.zoo.name, "base": bench.base, "models": models, "warnings": warnings}


def check_values(checkpoint: Checkpoint) -> None:
    """CheckpointError naming model and tensor for values that are NaN or infinite: they would spoil every merge without a word."""
    for name in checkpoint.names():
        for start, stop in checkpoint.pieces(name, CHUNK_ELEMENTS):
            values = checkpoint.read(name, start, stop)
            if values.is_floating_point() and not bool(values.float().isfinite().all()):
                raise CheckpointError(
                    f"{checkpoint!r}: tensor '{name}' holds values that are NaN or infinite. Leave the model out, or restore its weights."
                )


def similarity_of_zoo(bench: Bench, path: Path) -> Similarity:
    """similarity.safetensors: the matrix and the inner products from which similarities to any merge follow."""
    if path.is_file():
        return Similarity.load(path)
    options = bench.file.similarity
    base = bench.checkpoints[bench.base] if options.delta and bench.base else None
    found = similarity(
        [bench.checkpoints[alias] for alias in bench.members], labels=bench.members,
        mode=options.mode, scope=options.scope, base=base, keep_gram=True,
    )  # fmt: skip
    found.save(path)
    return found


def families_of(bench: Bench, found: Similarity) -> dict[str, Any]:
    """families.json: who may be merged with whom."""
    options = bench.file.cluster
    signatures = [signature(bench.checkpoints[alias]) for alias in bench.members]
    result = find_families(
        found.matrix, threshold=options.threshold, linkage=options.linkage,
        groups=groups(signatures, allow_config_mismatch=options.allow_config_mismatch), labels=bench.members,
    )  # fmt: skip
    return result.to_json()


def rank(bench: Bench) -> list[dict[str, Any]]:
    """Proxy score of every member of the zoo, best first; equal scores keep the zoo's order."""
    rows = []
    for alias in bench.members:
        scores = bench.score(Candidate.single(alias), "proxy")
        row = {"alias": alias, "score": scores.mean, "interval": list(interval(scores)), "tasks": scores.tasks()}
        rows.append({**row, "warnings": list(scores.warnings)})
    return sorted(rows, key=lambda row: -row["score"])


@dataclass(frozen=True)
class Representative:
    """The one model that stands for a family: a merge, or a member as it is."""

    id: int
    name: str
    members: tuple[str, ...]
    candidate: Candidate
    proxy: Mapping[str, float]
    trace: Mapping[str, Any]

    @property
    def is_merge(self) -> bool:
        return len(self.candidate.members) > 1


def merge_family(bench: Bench, found: Similarity, family: Mapping[str, Any]) -> Representative:
    """Run the strategies on one family; the representative is their best merge, unless a member scores higher."""
    members = list(family["members"])
    number = int(family["id"])
    singles = {alias: bench.score(Candidate.single(alias), "proxy") for alias in members}
    best = max(members, key=lambda alias: (singles[alias].mean, -members.index(alias)))
    traces: list[dict[str, Any]] = []
    chosen: Selection | None = None
    if len(members) > 1:
        options = bench.file.select
        places = {alias: bench.members.index(alias) for alias in members}

        def to_merge(weights: Mapping[str, float], other: str) -> float:
            return found.to_merge({places[alias]: weight for alias, weight in weights.items()}, places[other])

        result = select(
            members, bench.evaluator("proxy"), strategy=options.strategy, coefficients=options.coefficients, accept=options.accept,
            similarity_to=to_merge, confirm=bench.evaluator("confirmation") if "confirmation" in bench.tasks else None,
            on_event=bench.emit,
        )  # fmt: skip
        traces = [selection.to_json() for selection in result.selections]
        chosen = result.chosen
    candidate = Candidate.single(best)
    strategy = None
    if chosen is not None and chosen.score >= singles[best].mean:
        candidate, strategy = Candidate.linear(chosen.weights), chosen.strategy
    scores = bench.score(candidate, "proxy")
    is_merge = len(candidate.members) > 1
    name = f"family-{number}" if is_merge else candidate.members[0]
    weights = dict(zip(candidate.members, candidate.weights, strict=True))
    trace = {
        "id": number,
        "members": members,
        "strategies": traces,
        "chosen": strategy,
        "rejected": [alias for alias in members if alias not in weights],
        "representative": {
            "name": name,
            "kind": "merge" if is_merge else "single",
            "strategy": strategy,
            "weights": weights,
            "proxy": scores.mean,
            "tasks": scores.tasks(),
            "best_member": best,
            "interval_vs_best_member": list(paired_interval(scores, singles[best])),
        },
    }
    return Representative(number, name, tuple(members), candidate, scores.tasks(), trace)


def verdicts(bench: Bench, representatives: Sequence[Representative]) -> list[Verdict]:
    """Which representatives become experts."""
    options = bench.file.mixture
    return choose_experts(
        {representative.name: representative.proxy for representative in representatives},
        keep=options.keep, min_gain=options.min_gain, max_experts=options.max_experts,
    )  # fmt: skip


def references_from(bench: Bench, folder: Path) -> dict[str, str]:
    """How a file in `folder` refers to the zoo's models: relative paths for local ones, hub ids as they are."""
    names = {alias: model.reference for alias, model in bench.models.items()}
    if bench.base is not None:
        names[bench.base] = str(bench.file.zoo.base)
    return {alias: moved_reference(name, bench.folder, folder) for alias, name in names.items()}
