"""`modelglue.evaluate`: one model, some tasks, scores per item."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.evaluation.places import Place
from modelglue.evaluation.resident import ResidentModel
from modelglue.evaluation.scoring import BatchListener, score_text_model
from modelglue.evaluation.store import ScoreStore
from modelglue.evaluation.tasks import TaskSet
from modelglue.recipe import Scores


def evaluate(
    model: str | Path | Checkpoint,
    tasks: Sequence[str] | TaskSet,
    *,
    include: str | Path | None = None,
    store: str | Path | ScoreStore | None = None,
    on_batch: BatchListener | None = None,
    device: str = "cpu",
) -> Scores:
    """Score a model (reference, path, or expression) on lm-evaluation-harness tasks.

    `tasks` are task names (`name` or `name:metric`), `include` is a folder with task YAML files of your own. With a `store` (a file)
    everything is remembered item by item under the model's content, and a second call scores nothing. `device`: where the model is, such
    as "cuda" or "cuda:1"; scores differ from the processor's by rounding. Raises CheckpointError for the model, UserError for tasks and a
    device that is not there. Memory: the model in float32 and one batch.
    """
    place = Place.named(device=device)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    task_set = tasks if isinstance(tasks, TaskSet) else TaskSet.load(tasks, Path(include) if include is not None else None)
    with contextlib.ExitStack() as stack:
        opened = store if isinstance(store, ScoreStore) else stack.enter_context(ScoreStore(":memory:" if store is None else store))
        identity = checkpoint.identity
        resident = ResidentModel(place.device)
        return score_text_model(
            lambda: resident.holding(checkpoint, identity), identity, task_set, opened, description=repr(checkpoint), on_batch=on_batch
        )
