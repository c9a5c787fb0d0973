"""A search for other tools: a table of its candidates, an Optuna storage for its dashboard, TensorBoard event files."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelglue.errors import UserError
from modelglue.search.findings import SearchReport


def to_csv(report: SearchReport) -> str:
    """One row per candidate in the order of asking: number, tag, status, value, best so far, items so far, tasks, parameters."""
    rows = report.history()
    params = [_flat(outcome.proposal.params) for outcome in report.outcomes]
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    names = list(dict.fromkeys(name for one in params for name in one))
    columns = ["id", "tag", "status", "value", "best", "items", *(f"task:{task}" for task in tasks), *(f"param:{name}" for name in names)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row, one in zip(rows, params, strict=True):
        found: dict[str, Any] = {key: "" if row[key] is None else row[key] for key in columns[:6]}
        found |= {f"task:{task}": value for task, value in row["tasks"].items()} | {f"param:{name}": value for name, value in one.items()}
        writer.writerow(found)
    return text.getvalue()


def to_optuna(report: SearchReport, path: str | Path, name: str = "modelglue") -> int:
    """Write a search as a study of an SQLite storage that Optuna's dashboard opens; returns the number of trials.

    Pruned candidates are pruned trials with their bound, those without a score are failed. UserError without Optuna, or where the storage
    has a study of this name.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(f'this export needs the extra "optuna": pip install "modelglue[optuna]" ({error}).') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = optuna.trial.TrialState
    state = {"ok": states.COMPLETE, "pruned": states.PRUNED, "invalid": states.FAIL, "failed": states.FAIL}
    storage = optuna.storages.RDBStorage(f"sqlite:///{Path(path).absolute()}")
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError as error:
        raise UserError(f"{path}: has a study '{name}' already. Choose another file.") from error
    finally:
        storage.remove_session()
    for outcome in report.outcomes:
        params = {key: value for key, value in _flat(outcome.proposal.params).items() if isinstance(value, bool | int | float | str)}
        distributions = {key: _distribution(optuna, value) for key, value in params.items()}
        study.add_trial(
            optuna.trial.create_trial(
                state=state[outcome.status],
                value=outcome.value if math.isfinite(outcome.value) else None,
                params=params,
                distributions=distributions,
                user_attrs={"id": outcome.id, "tag": outcome.proposal.tag, **{f"task {task}": v for task, v in outcome.tasks.items()}},
            )
        )
    storage.remove_session()
    storage.engine.dispose()
    return len(report.outcomes)


def to_tensorboard(report: SearchReport, folder: str | Path) -> int:
    """Write the course of a search as TensorBoard events (value, best and tasks over candidates); returns the number of points."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise UserError(f"this export needs TensorBoard: pip install tensorboard ({error}).") from error
    writer = EventFileWriter(str(folder))
    count = 0
    for row in report.history():
        points = {"value": row["value"], "best": row["best"], "items": row["items"], **{f"task/{k}": v for k, v in row["tasks"].items()}}
        values = [Summary.Value(tag=f"search/{tag}", simple_value=value) for tag, value in points.items() if value is not None]
        writer.add_event(Event(wall_time=time.time(), step=row["id"], summary=Summary(value=values)))
        count += len(values)
    writer.close()
    return count


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Lists and mappings as one entry per part."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else [(None, value)]
        found |= {name if key is None else f"{name}[{key}]": part for key, part in parts}
    return found


def _distribution(optuna: Any, value: Any) -> Any:
    """Wide enough for what was tried: an export says what happened, not what could have."""
    if isinstance(value, bool | str):
        return optuna.distributions.CategoricalDistribution([value] if isinstance(value, str) else [False, True])
    width = max(1.0, 2 * abs(float(value)))
    return optuna.distributions.FloatDistribution(-width, width)
