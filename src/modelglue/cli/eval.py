"""`modelglue eval`: models (or mixtures) on tasks, item by item, remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.table import Table

    from modelglue.checkpoint import Checkpoint
    from modelglue.evaluation import ScoreStore, TaskSet
    from modelglue.mixture import Mixture
    from modelglue.recipe import Scores


def evaluate(
    *models: str,
    tasks: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    include: Path | None = None,
    store: Path | None = None,
    device: str = "cpu",
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Score models on lm-evaluation-harness tasks.

    With several models every one is compared with the first, item by item.

    Parameters
    ----------
    models
        Local folders, hub ids, mixture folders, or recipes (.yaml), which are merged in memory.
    tasks
        Task names; NAME:METRIC names another metric than the task's first.
    include
        Folder with task YAML files of your own.
    store
        SQLite file in which every item's score is remembered; a second call scores nothing.
    device
        Where models are scored: cpu, cuda, cuda:1, mps or another device of torch. Mixtures: cpu.
    json
        Print scores of every item as JSON.
    quiet
        No progress.
    """
    from modelglue.checkpoint import Checkpoint
    from modelglue.cli.console import print_json, print_table, print_warnings, stdout
    from modelglue.cli.opening import open_model
    from modelglue.errors import UserError
    from modelglue.evaluation import ScoreStore, TaskSet

    if not models:
        raise UserError("give at least one model: a folder, a hub id, a mixture folder, or a recipe.")
    if not tasks:
        raise UserError("give at least one task: --tasks NAME, or --tasks NAME:METRIC.")
    opened = {model: open_model(model) for model in models}  # all of them first, so that a wrong name costs nothing
    if device != "cpu" and (mixtures := [model for model, found in opened.items() if not isinstance(found, Checkpoint)]):
        raise UserError(f"{mixtures[0]}: is a mixture, and mixtures are scored on the processor. Leave --device out.")
    task_set = TaskSet.load(tasks, include)
    with ScoreStore(":memory:" if store is None else store) as scores_file:
        found = {
            model: _scores(model, checkpoint, task_set, scores_file, device, quiet=quiet or json) for model, checkpoint in opened.items()
        }
    if json:
        print_json({model: _summary(scores) for model, scores in found.items()})
        return
    console = stdout()
    print_table(console, _table(found, list(task_set.skills)))
    print_warnings(console, [f"{model}: {warning}" for model, scores in found.items() for warning in scores.warnings])


def _scores(name: str, model: Checkpoint | Mixture, task_set: TaskSet, store: ScoreStore, device: str, *, quiet: bool) -> Scores:
    from modelglue.checkpoint import Checkpoint
    from modelglue.cli.console import item_progress
    from modelglue.evaluation import evaluate as score
    from modelglue.evaluation import score_text_model

    total = sum(len(items) for items in task_set.skills.values())
    with item_progress(name, total, quiet=quiet) as advance:
        if isinstance(model, Checkpoint):
            return score(model, task_set, store=store, on_batch=advance, device=device)
        return score_text_model(model, model.identity, task_set, store, description=name, on_batch=advance)


def _summary(scores: Scores) -> dict[str, Any]:
    from modelglue.recipe import interval

    return {
        "mean": scores.mean,
        "interval": list(interval(scores)),
        "tasks": scores.tasks(),
        "items": {task: dict(values) for task, values in scores.items.items()},
        "warnings": list(scores.warnings),
    }


def _table(found: Mapping[str, Scores], skills: Sequence[str]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from modelglue.recipe import interval, paired_interval

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for column in [*skills, "mean", "95 % interval", *(["against the first"] if len(found) > 1 else [])]:
        table.add_column(escape(column), justify="right", no_wrap=True)
    first = next(iter(found.values()))
    for model, scores in found.items():
        low, high = interval(scores)
        values = [f"{scores.tasks()[skill] * 100:.1f}" for skill in skills]
        row = [f"[bold]{escape(model)}[/]", *values, f"{scores.mean * 100:.1f}", f"{low * 100:.1f} to {high * 100:.1f}"]
        if len(found) > 1 and scores is not first:
            gap, low, high = paired_interval(scores, first)
            row.append(f"{gap * 100:+.1f} ({low * 100:+.1f} to {high * 100:+.1f})")
        table.add_row(*row)
    return table
