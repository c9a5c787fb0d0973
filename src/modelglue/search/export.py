"""A search for other tools: a table of its candidates, an Optuna storage for its dashboard, TensorBoard event files."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.checkpoint import write_bytes_atomic
from modelglue.errors import UserError
from modelglue.search.event_file import event_file
from modelglue.search.findings import SearchReport

#: TensorBoard reads every file with "tfevents" in its name
EVENTS = "events.out.tfevents.modelglue"


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

    Pruned candidates are pruned trials with their estimate, those without a score are failed. UserError without Optuna, where the storage
    has a study of this name, and for a file that is no storage.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise UserError(f'this export needs the extra "optuna": pip install "modelglue[optuna]" ({error}).') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = optuna.trial.TrialState
    state = {"ok": states.COMPLETE, "pruned": states.PRUNED, "invalid": states.FAIL, "failed": states.FAIL}
    params = [
        {key: value for key, value in _flat(outcome.proposal.params).items() if isinstance(value, bool | int | float | str)}
        for outcome in report.outcomes
    ]
    distributions = _distributions(optuna, params)
    trials = [
        optuna.trial.create_trial(
            state=state[outcome.status],
            value=outcome.value if math.isfinite(outcome.value) else None,
            params=found,
            distributions={key: distributions[key] for key in found},
            user_attrs={"id": outcome.id, "tag": outcome.proposal.tag, **{f"task {task}": v for task, v in outcome.tasks.items()}},
        )
        for outcome, found in zip(report.outcomes, params, strict=True)
    ]
    storage = None
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{Path(path).absolute()}")
        optuna.create_study(study_name=name, storage=storage, direction="maximize").add_trials(trials)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise UserError(f"{path}: has a study '{name}' already. Choose another file.") from error
    except SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be used as a storage of Optuna ({reason}). Choose another file.") from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()
    return len(trials)


def to_tensorboard(report: SearchReport, folder: str | Path) -> int:
    """Write the course of a search for TensorBoard (value, best, items and tasks over candidates); returns the number of points.

    One file in `folder`, which another export replaces.
    """
    points = []
    for row in report.history():
        values = {"value": row["value"], "best": row["best"], "items": row["items"], **{f"task/{k}": v for k, v in row["tasks"].items()}}
        points.append((row["id"], {f"search/{tag}": float(value) for tag, value in values.items() if value is not None}))
    place = Path(folder) / EVENTS
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}). Choose another one, where you may write.") from error
    write_bytes_atomic(place, event_file(points, time.time()))
    return sum(len(values) for _, values in points)


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Lists and mappings as one entry per part."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else [(None, value)]
        found |= {name if key is None else f"{name}[{key}]": part for key, part in parts}
    return found


def _distributions(optuna: Any, params: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As wide as what was tried, and the same for all trials: an export says what happened, not what could have."""
    tried: dict[str, list[Any]] = {}
    for one in params:
        for key, value in one.items():
            tried.setdefault(key, []).append(value)
    found = {}
    for key, values in tried.items():
        if any(isinstance(value, bool | str) for value in values):
            found[key] = optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
        else:
            found[key] = optuna.distributions.FloatDistribution(min(map(float, values)), max(map(float, values)))
    return found
