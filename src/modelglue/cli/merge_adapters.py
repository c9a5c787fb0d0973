"""`modelglue merge-adapters`: several LoRA adapters in, one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number


def merge_adapters(
    *adapters: str,
    out: Path,
    weights: Annotated[list[float] | None, Parameter(consume_multiple=True, negative=())] = None,
    mode: Literal[
        "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
        "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
    ] = "cat",
    density: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1))] = None,
    majority_sign: Literal["total", "frequency"] = "total",
    rank: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    clamp: Annotated[float | None, Parameter(validator=Number(gte=0, lte=1))] = None,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:  # fmt: skip
    """Combine LoRA adapters of one base into one adapter.

    The modes are those of PEFT. `cat` is exact: its update is the weighted sum, its rank the sum of the ranks. `svd` is the nearest adapter
    of a given rank. `linear` and the modes after it work on the factors and are not the weighted sum of the updates.

    Parameters
    ----------
    adapters
        Folders or hub ids of LoRA adapters.
    out
        Folder to write, which PEFT loads.
    weights
        One number per adapter, negative ones subtract. Default: 1 for each.
    mode
        How they are combined.
    density
        Share of entries that the pruning modes keep.
    majority_sign
        Who elects a sign in the TIES modes: the sum of the values, or their number.
    rank
        Rank of the result in the SVD modes. Default: the largest of the adapters.
    clamp
        Clamp the factors of the SVD modes to this quantile of their entries.
    seed
        Seed of the DARE modes.
    dtype
        How factors are stored.
    overwrite
        Replace an existing adapter folder.
    json
        Print the summary as JSON.
    quiet
        No summary, no warnings.
    """
    from modelglue.adapters import combine
    from modelglue.checkpoint import STORE_DTYPES
    from modelglue.checkpoint.adapter import open_adapter
    from modelglue.checkpoint.reference import resolve_adapter
    from modelglue.cli.console import print_json, print_warnings, size, stderr

    opened = [open_adapter(resolve_adapter(adapter)) for adapter in adapters]
    made = combine(
        opened,
        weights,
        mode,
        density=density,
        majority_sign=majority_sign,
        svd_rank=rank,
        svd_clamp=clamp,
        seed=seed,
        dtype=STORE_DTYPES[dtype],
    )
    written = made.write(out, overwrite=overwrite)
    if not quiet:
        print_warnings(stderr(), made.warnings)
    if json:
        summary = {
            "directory": str(out),
            "modules": len(made.modules),
            "rank": made.rank,
            "bytes": written,
            "warnings": list(made.warnings),
        }
        print_json(summary)
    elif not quiet:
        stderr().print(f"{out}: {len(made.modules)} modules of rank {made.rank}, {size(written)}", soft_wrap=True, markup=False)
