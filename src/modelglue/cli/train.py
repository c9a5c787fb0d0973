"""`modelglue train`: a model and texts in, the trained model out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number


def train(
    model: str,
    *texts: Path,
    out: Path,
    tensors: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    context: Annotated[int, Parameter(validator=Number(gte=2))] = 1024,
    batch: Annotated[int, Parameter(validator=Number(gte=1))] = 8,
    micro_batch: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    epochs: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    steps: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    rate: Annotated[float, Parameter(validator=Number(gt=0))] = 3e-5,
    warm_up: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.1,
    decay: Annotated[float, Parameter(validator=Number(gte=0))] = 0.1,
    clip: Annotated[float, Parameter(validator=Number(gt=0))] = 1.0,
    precision: Literal["float32", "bfloat16"] = "float32",
    gating: Literal["soft", "topk", "straight_through"] = "soft",
    device: str = "cpu",
    seed: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    keep_every: Annotated[int, Parameter(validator=Number(gte=1))] = 100,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train new layers, routers or all of a model on texts.

    A small trainer for what stacks and mixtures need afterwards: AdamW, a cosine after a linear rise, gradients added up over micro
    batches. What is not trained keeps its bytes. The defaults are those with which stacked models were trained. Killed at any moment, it
    continues from its last state when run again, with the same result.

    Parameters
    ----------
    model
        Folder or hub id, such as what `modelglue stack` has written.
    texts
        Text files, or `.jsonl` files whose lines are {"text"}, or {"prompt", "response"} of which the response is learned.
    out
        Folder to write.
    tensors
        What is trained: new (layers that begin as the identity), routers, all, or names of tensors. Default: new where the model names
        them, else all.
    context
        Tokens of a row; longer texts are several rows.
    batch
        Rows of one step.
    micro_batch
        Rows that are in memory at once.
    epochs
        How often every text is read.
    steps
        Stop after so many steps instead.
    rate
        Largest learning rate.
    warm_up
        Share of the steps in which the rate rises.
    decay
        Weight decay of matrices.
    clip
        Largest norm of a step's gradient.
    precision
        What products are computed in; weights stay in float32.
    gating
        While routers of a mixture of modelglue's own are trained: all experts work, or only the chosen ones.
    device
        Where to train: cpu, cuda, cuda:1 or another device of torch.
    seed
        Seed of the order of rows.
    keep_every
        Steps after which the state is written.
    overwrite
        Replace an existing model folder.
    quiet
        No progress, no summary.
    json
        Print the summary as JSON, with the loss of every step.
    """
    from modelglue.checkpoint import open_checkpoint
    from modelglue.cli.console import print_json, stderr
    from modelglue.recipe.stacking import TRAINABLE_FILE
    from modelglue.training import Training
    from modelglue.training import train as trained

    start = time.monotonic()
    source = open_checkpoint(model)
    which = tensors or (["new"] if any((place / TRAINABLE_FILE).is_file() for place in source.places) else ["all"])
    training = Training(
        rate=rate, context=context, batch=batch, micro_batch=micro_batch, epochs=epochs, steps=steps, warm_up=warm_up, decay=decay,
        clip=clip, seed=seed, precision=precision, gating=gating, device=device, keep_every=keep_every,
    )  # fmt: skip
    words = ("new", "routers", "all")
    chosen = which[0] if len(which) == 1 and which[0] in words else which
    with _step_progress(out.name, quiet=quiet or json) as progress:
        report = trained(source, texts, out, tensors=chosen, training=training, overwrite=overwrite, progress=progress)
    if json:
        print_json(
            {
                "directory": str(report.directory), "trained": list(report.trained), "rows": report.rows, "losses": list(report.losses),
                "resumed_steps": report.resumed_steps,
            }
        )  # fmt: skip
    elif not quiet:
        resumed = f", {report.resumed_steps} of them from an earlier run" if report.resumed_steps else ""
        text = f"{out}: {len(report.trained)} tensors trained in {len(report.losses)} steps{resumed}, loss {report.losses[0]:.4f} to "
        stderr().print(f"{text}{report.losses[-1]:.4f} nats a token ({time.monotonic() - start:.1f} s)", soft_wrap=True, markup=False)


@contextmanager
def _step_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A bar of steps with the last loss, on standard error; None when quiet or not on a terminal."""
    from modelglue.cli.console import stderr

    console = stderr()
    if quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, description=f"{title}, loss {loss:.3f}")
