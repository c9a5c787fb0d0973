"""`modelglue mix`: experts in, one model out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from modelglue.checkpoint import SaveReport
    from modelglue.recipe import Document

    Refuse = Callable[[Sequence[str]], None]


def mix(
    recipe: Path,
    out: Path,
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    memory: str | None = None,
    shard_size: str = "5GB",
    strict: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Join models as experts of one model.

    Experts may be feed-forward networks (level ffn), decoder layers (block) or complete models (model); `level: auto` takes the first of
    these that the experts allow. The file names experts, level, shared parts and router; a zoo file will do, and a file of mergekit-moe is
    obeyed as it is. Where a class of transformers holds the mixture (Mixtral, Qwen2-MoE, Qwen3-MoE, ...), it is written in that class;
    else with two small modelling files that need only torch and transformers. Complete models become a mixture folder.
    With `router: {tasks: [...]}` the router is learned from what the experts score on these tasks: scores come from `router.store`, or are
    made once and kept in OUT.scores.sqlite beside the output.
    Experts stream chunk by chunk; killed at any moment, it continues when run again.

    Parameters
    ----------
    recipe
        YAML in modelglue's dialect or mergekit-moe's, or a zoo file.
    out
        Folder to write: config, tokenizer, weights, recipe and card.
    workers
        Worker processes. Default: one per core, one for small models.
    memory
        Limit of private memory over all processes while experts are written, such as 2GiB.
    shard_size
        Largest weight file, such as 500MB or 5GB.
    strict
        Treat warnings as errors.
    overwrite
        Replace an existing model folder; a folder that holds no model is refused.
    quiet
        No progress, no summary, no warnings.
    json
        Print the summary as JSON.
    """
    from modelglue.cli.console import byte_progress, parse_size, print_json, print_warnings, stderr
    from modelglue.errors import MergeError
    from modelglue.mixture.exports import is_moe_recipe
    from modelglue.recipe import load_document

    start = time.monotonic()
    shard_bytes = parse_size(shard_size, "--shard-size")
    memory_bytes = None if memory is None else parse_size(memory, "--memory")
    document = load_document(recipe)
    make = _sparse if is_moe_recipe(document) else _levels
    with byte_progress(out.name, quiet=quiet or json) as progress:

        def refuse(warnings: Sequence[str]) -> None:
            if strict and warnings:
                raise MergeError("\n".join(warnings))

        result, text = make(
            document, out, refuse, folder=recipe.parent, quiet=quiet or json, overwrite=overwrite, workers=workers, memory=memory_bytes,
            shard_bytes=shard_bytes, progress=progress,
        )  # fmt: skip
    if not quiet:
        print_warnings(stderr(), result["warnings"])
    if json:
        print_json(result)
    elif not quiet:
        state = "already complete" if result.get("already_complete") else f"{time.monotonic() - start:.1f} s"
        stderr().print(f"{out}: {text} ({state})", soft_wrap=True, markup=False)


def _sparse(document: Document, out: Path, refuse: Refuse, *, folder: Path, quiet: bool, **options: Any) -> tuple[dict[str, Any], str]:
    """What a file of mergekit-moe says."""
    from modelglue.checkpoint import save
    from modelglue.checkpoint.output.licence import licence_warnings, parents
    from modelglue.mixture.exports import upcycle

    made = upcycle(document, folder)
    refuse(list(made.warnings))
    report = save(made.checkpoint, out, **options)
    warnings = list(dict.fromkeys([*made.warnings, *licence_warnings(parents(made.checkpoint))]))
    result = {**_saved(report), "class": made.export, "condition_numbers": list(made.conditions), "warnings": warnings}
    return result, _summary(made.export, report)


def _levels(document: Document, out: Path, refuse: Refuse, *, folder: Path, quiet: bool, **options: Any) -> tuple[dict[str, Any], str]:
    """What a file of ours, or a zoo, says."""
    from modelglue.cli.console import item_progress
    from modelglue.glue.router_scores import RouterScores
    from modelglue.mixture.levels import prepare

    scores = RouterScores(out.with_name(f"{out.name}.scores.sqlite"), partial(item_progress, quiet=quiet))
    made = prepare(document, folder, scores)
    refuse(list(made.warnings))
    done = made.write(out, **options)
    result: dict[str, Any] = {"level": made.level, "passed_by": list(made.why), "class": made.model_class, "warnings": list(made.warnings)}
    router = ""
    if made.learned is not None:
        result["router"] = {**made.learned, "newly_scored": scores.fresh}
        router = f"\n  {made.learned['message']}"
    if done.saved is None:
        assert done.manifest is not None
        names = [expert.name for expert in done.manifest.experts]
        found = {"directory": str(out), **result, "experts": names}
        kept, text = _differences(out)
        return {**found, **kept}, f"level {made.level}, complete models: {', '.join(names)}{text}{_because(made.why)}{router}"
    return {
        **_saved(done.saved),
        **result,
    }, f"level {made.level}, {_summary(str(made.model_class), done.saved)}{_because(made.why)}{router}"


def _differences(out: Path) -> tuple[dict[str, Any], str]:
    """What experts that are kept as differences take and lose, where they are."""
    import json

    from modelglue.cli.console import size
    from modelglue.mixture.deltas import REPORT

    if not (out / REPORT).is_file():
        return {}, ""
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    lines = [f"\n  as differences: {size(report['bytes'])} instead of {size(report['whole_bytes'])}"]
    for one in report["experts"]:
        roles = ", ".join(f"{role} {loss['lost']:.1%}" for role, loss in one["loss"].items() if role != "all")
        what = f"of the difference {one['loss']['all']['lost']:.1%} is lost ({roles})" if one["loss"] else f"whole: {one['why_whole']}"
        lines.append(f"  {one['name']}: {size(one['bytes'])}, {what}")
    if report["bytes"] >= report["whole_bytes"]:
        lines.append("  that is more than the models themselves: pack: true copies them; a lower energy or density takes less")
    return {"deltas": report}, "\n".join(lines)


def _saved(report: SaveReport) -> dict[str, Any]:
    return {
        "directory": str(report.directory), "tensors": report.tensors, "bytes": report.bytes, "shards": report.shards,
        "resumed_bytes": report.resumed_bytes, "already_complete": report.already_complete,
    }  # fmt: skip


def _summary(model_class: str, report: SaveReport) -> str:
    from modelglue.cli.console import size

    return f"{model_class}, {report.tensors} tensors, {size(report.bytes)}"


def _because(why: Sequence[str]) -> str:
    return "".join(f"; {reason}" for reason in why)
