"""`modelglue check`: will this recipe work, and what will it need?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from modelglue.recipe import CheckReport


def check(
    recipe: Path,
    out: Path | None = None,
    *,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    memory: str | None = None,
    allow_mixed: Annotated[bool, Parameter(negative=())] = False,
    truncate_vocabulary: Annotated[bool, Parameter(negative=())] = False,
    strict: Annotated[bool, Parameter(negative=())] = False,
    similarity: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say from headers alone whether a recipe will work and what it needs.

    Reads no tensor. Everything that `merge` would refuse before reading weights is refused here: exit code 2, all faults at once.

    Parameters
    ----------
    recipe
        YAML in modelglue's dialect, or mergekit's.
    out
        The folder that `merge` would write: its disk's free space is looked at. Default: the working folder.
    workers
        Worker processes to plan for. Default: what `merge` would use.
    memory
        Limit of private memory to plan for, such as 2GiB. Default: what `merge` would use.
    allow_mixed
        Merge models of different classes all the same, where their tensors fit.
    truncate_vocabulary
        Where vocabularies differ, keep the rows that all models have.
    strict
        Treat warnings about the recipe as errors.
    similarity
        Also read the weights once and say which models are too far apart, or pull against each other.
    json
        Print the report as JSON.
    quiet
        No progress.
    """
    from modelglue.cli.console import byte_progress, parse_size, print_json, print_warnings, stdout
    from modelglue.recipe import check as run

    report = run(
        recipe, workers=workers, memory=None if memory is None else parse_size(memory, "--memory"), strict=strict,
        allow_mixed=allow_mixed, truncate_vocabulary=truncate_vocabulary,
    )  # fmt: skip
    free = {"disk_free": _disk_free(out or Path()), "memory_free": _memory_free()}
    found: dict[str, Any] = {}
    if similarity:
        with byte_progress("comparing", quiet=quiet or json) as progress:
            found = _similarity(recipe, progress)
    warnings = [*report.warnings, *_too_little(report, free), *found.get("warnings", [])]
    if json:
        extra = {"similarity": found} if similarity else {}
        print_json({**asdict(report), **free, **extra, "warnings": warnings})
        return
    console = stdout()
    console.print(_table(report, free, found))
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    print_warnings(console, warnings)
    console.print("[green]ok[/]: this merge will run")


_TIMES = {1: "once", 2: "twice"}


def _table(report: CheckReport, free: dict[str, int | None], found: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from modelglue.cli.console import size

    def against(key: str) -> str:
        value = free[key]
        return "" if value is None else f"; {size(value)} free"

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    plural = "s" if report.workers > 1 else ""
    rows = [
        ("method", report.method),
        ("models", "\n".join(report.models)),
        ("base", report.base or "none"),
        ("architecture", report.architecture or "unknown (no config)"),
        ("tensors", f"{report.tensors}, {report.parameters / 1e6:,.1f} M parameters, stored as {report.store}"),
        ("reads", f"{size(report.read_bytes)}, {_TIMES.get(report.passes, f'{report.passes} times')}"),
        ("disk", f"{size(report.disk_bytes)} in {report.shards} file{'s' if report.shards > 1 else ''}{against('disk_free')}"),
        ("memory", f"up to {size(report.memory_bytes)} private in {report.workers} worker{plural}{against('memory_free')}"),
    ]
    if (vocabulary := report.alignment) is not None:
        lines = [f"{vocabulary.tokens:,} tokens in {vocabulary.rows:,} rows"]
        lines += [f"{model.label}: {model.before:,} rows before; now {model.rows}" for model in vocabulary.models]
        rows.append(("vocabulary", "\n".join(lines)))
    if found:
        rows.append(("similarity", "\n".join(f"{' - '.join(one['models'])}: {one['text']}" for one in found["pairs"])))
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _disk_free(out: Path) -> int | None:
    """Free bytes on the disk of a folder that may not exist yet."""
    import shutil

    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _memory_free() -> int | None:
    """What the system can give without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _too_little(report: CheckReport, free: dict[str, int | None]) -> list[str]:
    from modelglue.cli.console import size

    found = []
    for what, need, key in (("disk", report.disk_bytes, "disk_free"), ("memory", report.memory_bytes, "memory_free")):
        have = free[key]
        if have is not None and have < need:
            remedy = "Choose another disk." if what == "disk" else "Set --memory, or use fewer --workers."
            found.append(f"{what}: the merge needs {size(need)}, {size(have)} are free now. {remedy}")
    return found


#: below this, fine-tunes of one base are seldom mergeable: the default threshold of families
_FAR = 0.95


def _similarity(recipe: Path, progress: Any) -> dict[str, Any]:
    """Pairs of the models: the cosine of their weights, and of their task vectors where there is a base; and what that warns of."""
    import math

    from modelglue.recipe import read_with_models
    from modelglue.recipe.schema import Source
    from modelglue.zoo import similarity

    read, models = read_with_models(recipe)
    base = read.base.model if isinstance(read.base, Source) else read.base
    labels = [name for name in models if name != base]
    opened = [models[name] for name in labels]
    if len(labels) < 2:
        return {"pairs": [], "warnings": []}
    near = similarity(opened, labels=labels, progress=progress)
    pull = similarity(opened, labels=labels, mode="global", base=models[base], progress=progress) if isinstance(base, str) else None
    pairs, warnings = [], list(near.warnings)
    for i, a in enumerate(labels):
        for j, b in enumerate(labels[i + 1 :], i + 1):
            value, task = float(near.matrix[i, j]), math.nan if pull is None else float(pull.matrix[i, j])
            text = "not comparable" if math.isnan(value) else f"weights {value:.4f}"
            text += "" if math.isnan(task) else f", task vectors {task:+.4f}"
            pairs.append({"models": [a, b], "weights": _number(value), "task_vectors": _number(task), "text": text})
            if math.isnan(value):
                warnings.append(f"{a} and {b} cannot be compared: they have other sizes, or share too few tensors.")
            elif value < _FAR:
                warnings.append(f"{a} and {b} are {value:.4f} alike; below {_FAR} a merge seldom keeps what either can do.")
            if task < 0:
                warnings.append(
                    f"the task vectors of {a} and {b} point in opposite directions ({task:+.4f}): one takes back what the other adds."
                )
    return {"pairs": pairs, "warnings": warnings}


def _number(value: float) -> float | None:
    return None if value != value else value
