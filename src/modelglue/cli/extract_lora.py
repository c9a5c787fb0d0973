"""`modelglue extract-lora`: what a model has learned beyond its base, as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from rich.table import Table

    from modelglue.adapters import Extraction, TensorReport
    from modelglue.checkpoint import Checkpoint


def extract_lora(
    model: str,
    base: str,
    out: Path,
    *,
    rank: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    energy: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1))] = None,
    sv_epsilon: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0,
    include: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    exclude: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    embed_lora: Annotated[bool, Parameter(negative=())] = False,
    skip_others: Annotated[bool, Parameter(negative=())] = False,
    scale_in_a: Annotated[bool, Parameter(negative=())] = False,
    exact: Annotated[bool, Parameter(negative=())] = False,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    base_name: str | None = None,
    workers: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Extract a LoRA adapter from a model and its base.

    Every linear weight's difference is decomposed and cut off at the smallest rank that the limits allow. Killed at any moment, it
    continues when run again.

    Parameters
    ----------
    model
        Local folder, hub id, or a recipe (whose merge is not written).
    base
        The model that it was made from.
    out
        Folder to write, which PEFT loads.
    rank
        Largest rank. Default: 64, unless --energy or --sv-epsilon is given.
    energy
        Share of each squared difference that is kept, such as 0.9.
    sv_epsilon
        Drop singular values up to this one.
    include
        Only these modules: globs on a module's name or its last part, such as `q_proj` or `model.layers.*.mlp.*`.
    exclude
        Not these modules; they keep the base's weights.
    embed_lora
        Decompose embeddings as well, instead of saving them whole.
    skip_others
        Leave out what cannot be decomposed (norms, changed tables) instead of saving it whole.
    scale_in_a
        Put the singular values into A instead of splitting them between A and B.
    exact
        Never find the leading directions by a random sketch.
    dtype
        How factors are stored.
    base_name
        What the adapter calls its base. Default: its hub id or path.
    workers
        Matrices decomposed at the same time; each takes memory for about four of them.
    overwrite
        Replace an existing adapter folder.
    json
        Print the report on every tensor as JSON.
    quiet
        No progress, no table, no warnings.
    """
    from modelglue.adapters import extract_lora as extract
    from modelglue.cli.console import byte_progress, print_json, print_table, print_warnings, size, stderr, stdout

    opened = [_open(name) for name in (model, base)]
    with byte_progress(out.name, quiet=quiet or json) as progress:
        found = extract(
            opened[0],
            opened[1],
            out,
            max_rank=rank,
            sv_epsilon=sv_epsilon,
            energy=energy,
            include=include or (),
            exclude=exclude or (),
            embed_lora=embed_lora,
            distribute=not scale_in_a,
            save_others=not skip_others,
            exact=exact,
            dtype=dtype,
            base_name=base_name,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    if not quiet:
        print_warnings(stderr(), found.warnings)
    if json:
        print_json(_summary(found))
    elif not quiet:
        print_table(stdout(), _table(found.tensors))
        stderr().print(
            f"{out}: rank up to {found.rank}, {size(found.bytes)}, {found.error:.1%} of the decomposed difference is lost",
            soft_wrap=True,
            markup=False,
        )


def _open(model: str) -> Checkpoint:
    from modelglue.checkpoint import Checkpoint
    from modelglue.cli.opening import open_model
    from modelglue.errors import UserError

    found = open_model(model)
    if not isinstance(found, Checkpoint):
        raise UserError(f"{model}: is a mixture, which has no tensors of its own. Give one of its experts.")
    return found


def _summary(found: Extraction) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "directory": str(found.directory), "rank": found.rank, "bytes": found.bytes, "error": found.error, "resumed": found.resumed,
        "warnings": list(found.warnings), "tensors": [asdict(one) for one in found.tensors],
    }  # fmt: skip


def _table(tensors: Sequence[TensorReport]) -> Table:
    """A row per kind of module (the last part of its name): how many, their ranks, what is lost, how many directions they have."""
    from rich.markup import escape
    from rich.table import Table

    from modelglue.cli.console import size

    table = Table(box=None, pad_edge=False)
    table.add_column("module")
    table.add_column("as")
    for name in ("tensors", "rank", "error", "stable rank", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[TensorReport]] = {}
    for one in tensors:
        module = one.name.rpartition(".")[0].rpartition(".")[2] or one.name
        groups.setdefault((one.kind, module), []).append(one)
    for (kind, module), group in sorted(groups.items()):
        decomposed = kind in ("lora", "embedding")
        table.add_row(
            escape(module),
            kind,
            str(len(group)),
            _span([one.rank for one in group]) if decomposed else "",
            f"{_overall(group):.1%}" if decomposed else "",
            f"{sum(one.stable_rank for one in group) / len(group):.1f}" if decomposed else "",
            size(sum(one.bytes for one in group)) if any(one.bytes for one in group) else "",
        )
    return table


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def _overall(group: Sequence[TensorReport]) -> float:
    whole = sum(one.norm**2 for one in group)
    return float((sum((one.error * one.norm) ** 2 for one in group) / whole) ** 0.5) if whole else 0.0
