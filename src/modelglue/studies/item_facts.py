"""What is known of items before a search: their parameters from a file, or the answers of many models from a store of scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelglue.errors import UserError
from modelglue.evaluation import ScoreStore, TaskSet
from modelglue.search.item_response import ItemParameters
from modelglue.search.settings import FitnessSettings


def item_facts(fitness: FitnessSettings, tasks: TaskSet, folder: Path) -> tuple[dict[str, ItemParameters], dict[str, Any]]:
    """(task -> item parameters, task -> answers [models, items]), in the order in which items are visited; empty where nothing is said.

    References start from `folder`. UserError for a file that is missing, unreadable, or does not fit the tasks.
    """
    parameters = {} if fitness.item_parameters is None else read_item_parameters(folder / fitness.item_parameters, tasks)
    responses = {} if fitness.responses is None else _responses(folder / fitness.responses, tasks)
    return parameters, responses


def read_item_parameters(path: Path, tasks: TaskSet) -> dict[str, ItemParameters]:
    """JSON: task -> {"a": [...], "b": [...]} in the order of the task's documents, or task -> {item id: {"a": ..., "b": ...}}.

    a is an item's discrimination (a number, or one per dimension), b its difficulty (the same, or one number for all dimensions).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). fitness.item_parameters is taken from the search file's folder."
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping from tasks to item parameters.")
    found, faults = {}, []
    for task in tasks.skills:
        if task not in content:
            faults.append(f"{path}: has no item parameters for task '{task}', but for {', '.join(map(str, content)) or 'none'}.")
            continue
        try:
            found[task] = _parameters(content[task], tasks, task)
        except (UserError, ValueError, TypeError, KeyError) as error:
            faults.append(f"{path}: task '{task}': {error}")
    if faults:
        raise UserError("\n".join(faults))
    return found


def _parameters(said: Any, tasks: TaskSet, task: str) -> ItemParameters:
    ids = [item.id for item in tasks.skills[task]]
    if not isinstance(said, Mapping):
        raise UserError('allowed are {"a": [...], "b": [...]} and {item id: {"a": ..., "b": ...}}.')
    if set(said) == {"a", "b"} and isinstance(said["a"], list):
        if not len(said["a"]) == len(said["b"]) == len(ids):
            raise UserError(f"{len(said['a'])} values of a and {len(said['b'])} of b for {len(ids)} items; allowed is one for each.")
        by_id = {id_: {"a": a, "b": b} for id_, a, b in zip(ids, said["a"], said["b"], strict=True)}
    else:
        by_id = dict(said)
        if missing := [id_ for id_ in ids if id_ not in by_id]:
            raise UserError(f"{len(missing)} of {len(ids)} items have no parameters, such as {missing[0]}.")
    rows = [by_id[id_] for id_ in tasks.order[task]]
    a, b = (np.array([np.atleast_1d(np.asarray(row[key], dtype=np.float64)) for row in rows]) for key in ("a", "b"))
    return ItemParameters(a, b)


def _responses(path: Path, tasks: TaskSet) -> dict[str, Any]:
    """A row per model of the store that has all items of a task, ordered by what the models are, not by when they were scored."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. fitness.responses is taken from the search file's folder.")
    found = {}
    with ScoreStore(path) as store:
        for task, items in tasks.skills.items():
            key = {item.id: item.key for item in items}
            ordered = [key[id_] for id_ in tasks.order[task]]
            found[task] = np.array([[row[item] for item in ordered] for row in store.complete(ordered)]).reshape(-1, len(ordered))
    return found
