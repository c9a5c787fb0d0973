"""`modelglue stack`: layers of models in, a deeper model out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number


def stack(
    *models: str,
    out: Path | None = None,
    drop: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    copies: Annotated[int | None, Parameter(validator=Number(gte=2))] = None,
    interleave: Annotated[bool, Parameter(negative=())] = False,
    identity_start: Annotated[bool, Parameter(negative=())] = False,
    layers: str | None = None,
    every: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    new_layers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    spread: Annotated[bool, Parameter(negative=())] = False,
    vocabulary: Literal["first", "union"] | None = None,
    allow_pattern_break: Annotated[bool, Parameter(negative=())] = False,
    print_: Annotated[bool, Parameter(name="--print", negative=())] = False,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    memory: str | None = None,
    shard_size: str = "5GB",
    strict: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Make a deeper model of the layers of one or more models.

    Models of one architecture and size are put on top of each other, the bottom one first (`--drop`, `--interleave`, `--identity-start`);
    copies of one model are depth up-scaling (`--copies 2 --drop 8`); `--every 4` or `--new-layers 8` is block expansion: copies of layers
    that begin as the identity, so that the model computes what it did. What is made is an ordinary recipe of slices: `--print` shows it,
    and `modelglue merge` gives the same weights from it. Killed at any moment, it continues when run again.

    A stack whose layers do not begin as the identity is of little use before it is trained further.

    Parameters
    ----------
    models
        Folders or hub ids, the bottom one first.
    out
        Folder to write: config, tokenizer, weights, recipe and card; `trainable_tensors.json` names the tensors of layers that begin as the
        identity.
    drop
        So many layers are left out on both sides of every seam: the last ones of the lower model, the first ones of the upper one.
    copies
        Stack one model on itself so many times.
    interleave
        Take one layer of each model in turn.
    identity_start
        Layers of all but the bottom model write nothing at first, and embedding, final norm and head are those of the bottom one instead of
        the mean.
    layers
        Layers of one model in any order, skipped or repeated: 0:24,8:32 or 0,1,1,2 (a:b is a to b - 1).
    every
        After every so many layers of one model, insert a copy that begins as the identity.
    new_layers
        Insert so many of these copies, evenly; the number must divide that of the layers.
    spread
        Insert them as evenly as they will go where it does not.
    vocabulary
        Where models number tokens differently: the vocabulary of the first, or the union.
    allow_pattern_break
        Accept an order of layers that a rule of the config, such as every sixth layer being of another kind, does not fit.
    print_
        Print the recipe and write nothing.
    workers
        Worker processes. Default: one per core, one for small models.
    memory
        Limit of private memory over all processes, such as 2GiB.
    shard_size
        Largest weight file, such as 500MB or 5GB.
    strict
        Treat warnings as errors.
    overwrite
        Replace an existing model folder; a folder that holds no model is refused.
    quiet
        No progress, no summary, no warnings.
    json
        Print the summary as JSON; with --print, the recipe.
    """
    from modelglue.checkpoint import save
    from modelglue.checkpoint.output.licence import licence_warnings, parents
    from modelglue.cli.console import byte_progress, parse_size, print_json, print_warnings, size, stderr
    from modelglue.errors import MergeError, UserError
    from modelglue.recipe import canonical, dump
    from modelglue.recipe import stack as stacked
    from modelglue.recipe.stacking import write_trainable

    start = time.monotonic()
    shard_bytes = parse_size(shard_size, "--shard-size")
    memory_bytes = None if memory is None else parse_size(memory, "--memory")
    if (out is None) != print_:
        raise UserError("--print writes nothing: leave out --out." if print_ else "where to? Say --out FOLDER, or --print.")
    made = stacked(
        models, drop=drop, copies=copies, interleave=interleave, identity_start=identity_start,
        layers=layers or (), every=every, new_layers=new_layers, spread=spread, vocabulary=vocabulary,
        allow_pattern_break=allow_pattern_break,
    )  # fmt: skip
    warnings = list(dict.fromkeys([*made.warnings, *licence_warnings(parents(made.checkpoint))]))
    if strict and warnings:
        raise MergeError("\n".join(warnings))
    if not quiet:
        print_warnings(stderr(), warnings)
    if out is None:
        if json:
            print_json(canonical(made.recipe))
        else:
            print(dump(made.recipe), end="")
        return
    with byte_progress(out.name, quiet=quiet or json) as progress:
        report = save(
            made.checkpoint, out, workers=workers, memory=memory_bytes, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress
        )
    write_trainable(made, out)
    if json:
        print_json(
            {
                "directory": str(report.directory), "layers": made.depth, "new_layers": list(made.new_layers), "tensors": report.tensors,
                "bytes": report.bytes, "shards": report.shards, "resumed_bytes": report.resumed_bytes,
                "already_complete": report.already_complete, "warnings": warnings,
            }
        )  # fmt: skip
    elif not quiet:
        state = "already complete" if report.already_complete else f"{time.monotonic() - start:.1f} s"
        new = f", {len(made.new_layers)} of them begin as the identity" if made.new_layers else "; train it further before use"
        stderr().print(
            f"{out}: {made.depth} layers{new}; {report.tensors} tensors, {size(report.bytes)} ({state})", soft_wrap=True, markup=False
        )
