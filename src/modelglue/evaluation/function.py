"""A Python function as the evaluator of a search: whatever can be measured of a model.

The function gets the candidate as a `Checkpoint` (`load_live` makes a module of it, `save` a folder) and returns one number, or numbers by
task, or numbers by task and item; larger is better:

    def score(model): return -perplexity(load_live(model))
    def score(model): return {"taste": 0.4, "speed": 120.0}

If it takes `items` it is asked for some of them only, and says beforehand which there are, so that candidates can be raced:

    def score(model, items): return {task: {item: ask(model, item) for item in chosen} for task, chosen in items.items()}
    score.items = {"riddles": [riddle.id for riddle in RIDDLES]}

What it returned is remembered under the candidate's content, the function's name and the text of its file, and `score.version`, if it has
one: raise that when something else changes that the numbers depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.errors import UserError, did_you_mean
from modelglue.evaluation.failures import judged
from modelglue.evaluation.items import Mark
from modelglue.evaluation.members import Members
from modelglue.evaluation.store import ScoreStore
from modelglue.recipe import WHOLE, Candidate, Cost, Level, Plan, Scores

_VERSION = 1


class FunctionEvaluator:
    """Scores candidates over `checkpoints` with `function`, or with the function that a text names ("module:function").

    A module is looked for in the folder `relative_to`, then where Python looks. `tasks` names what the function returns: needed where it
    returns numbers by task and has no `items` (default: one number, the task "score"). `settings` are passed on as keyword arguments.
    Levels: E0 and E1, and with `items` E2 and E3.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        checkpoints: Mapping[str, Checkpoint],
        store: ScoreStore,
        *,
        tasks: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        store_dtype: str | None = None,
        relative_to: Path | None = None,
    ) -> None:
        self._function = load_function(function, relative_to) if isinstance(function, str) else function
        self.members = Members(checkpoints, store_dtype)
        self._store = store
        self._settings = dict(settings or {})
        self._name = f"{self._function.__module__}:{getattr(self._function, '__qualname__', type(self._function).__qualname__)}"
        declared = getattr(self._function, "items", None)
        self._items = {str(task): tuple(map(str, names)) for task, names in declared.items()} if isinstance(declared, Mapping) else None
        if self._items is not None and tasks is not None and list(tasks) != list(self._items):
            said = f"its items are of the tasks {', '.join(self._items)}, but the tasks given are {', '.join(tasks)}"
            raise UserError(f"{self._name}: {said}. Leave the tasks out.")
        self._rules = self._known_by()
        self._tasks = list(self._items or tasks or ["score"])

    @property
    def tasks(self) -> Sequence[str]:
        return self._tasks

    @property
    def levels(self) -> frozenset[Level]:
        return frozenset({"E0", "E1", "E2", "E3"} if self._items is not None else {"E0", "E1"})

    @property
    def identity(self) -> str:
        members = {alias: checkpoint.identity for alias, checkpoint in self.members.checkpoints.items()}
        return _digest([_VERSION, members, self.members.store_dtype, self._rules, self._items, self._tasks])

    def items(self, task: str) -> Sequence[str]:
        """Ids in a shuffled order that is a function of the ids alone."""
        if self._items is None:
            return (WHOLE,)
        return sorted(self._items[task], key=lambda name: hashlib.sha256(f"order {name}".encode()).digest())

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        """Calls the function for what the store does not have; see `Evaluator` for what becomes of failures."""
        started = time.perf_counter()
        asked = {task: tuple(names) for task, names in plan.items.items()} if plan.items is not None else self._everything()
        self._check(asked)
        key = self.members.identity(candidate)
        keys = {(task, item): self._key(task, item) for task, names in asked.items() for item in names}
        known = self._store.known(key, list(keys.values()))
        missing = {task: [item for item in names if keys[task, item] not in known] for task, names in asked.items()}
        missing = {task: names for task, names in missing.items() if names}
        computed = sum(map(len, missing.values()))
        if missing:
            try:
                found = self._call(candidate, missing)
            except Exception as error:  # the function may raise anything
                status, text = judged(error)
                return Scores({}, status=status, error=f"{candidate.describe()}: {text}")
            fresh = {keys[place]: Mark(value if math.isfinite(value) else math.nan) for place, value in found.items()}
            self._store.add(key, candidate.key, fresh)
            known |= fresh
        values = {task: {item: known[keys[task, item]].value for item in names} for task, names in asked.items()}
        bad = sum(math.isnan(value) for names in values.values() for value in names.values())
        cost = Cost(len(keys), 0, computed, time.perf_counter() - started)
        scores = Scores(values, cost=cost)
        if not bad:
            return scores
        worst = {task: {item: 0.0 if math.isnan(value) else value for item, value in names.items()} for task, names in values.items()}
        text = f"{candidate.describe()}: {self._name} returned {bad} numbers that are none"
        return replace(scores, items=worst, status="invalid", error=text, warnings=(text + "; they count as 0.",))

    def evaluate_many(self, requests: Sequence[tuple[Candidate, Plan]]) -> Iterator[tuple[int, Scores]]:
        """One after the other."""
        for number, (candidate, plan) in enumerate(requests):
            yield number, self.evaluate(candidate, plan)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _everything(self) -> dict[str, tuple[str, ...]]:
        return dict(self._items) if self._items is not None else dict.fromkeys(self._tasks, (WHOLE,))

    def _check(self, asked: Mapping[str, Sequence[str]]) -> None:
        everything = self._everything()
        for task, names in asked.items():
            if task not in everything:
                raise UserError(f"{self._name}: there is no task '{task}'.{did_you_mean(task, everything)}")
            if unknown := [name for name in names if name not in everything[task]]:
                raise UserError(f"{self._name}: task '{task}' has no item '{unknown[0]}'.")

    def _call(self, candidate: Candidate, missing: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], float]:
        model = self.members.expression(candidate)
        options = {**self._settings, "items": missing} if self._items is not None else self._settings
        found = self._function(model, **options)
        by_task = found if isinstance(found, Mapping) else {self._tasks[0]: found}
        values: dict[tuple[str, str], float] = {}
        for task, names in missing.items():
            for item in names:
                value = by_task.get(task)
                if self._items is not None:
                    value = value.get(item) if isinstance(value, Mapping) else None
                if not isinstance(value, numbers.Real):
                    what = f"item '{item}' of task '{task}'" if self._items is not None else f"task '{task}'"
                    raise UserError(f"{self._name}: returned {value!r} for {what}; allowed is a number.")
                values[task, item] = float(value)
        return values

    def _known_by(self) -> list[Any]:
        """What the function is known by."""
        try:
            function = inspect.unwrap(self._function)
            text = Path(inspect.getfile(function if hasattr(function, "__qualname__") else type(function))).read_bytes()
        except (TypeError, OSError):  # built in, or typed at a prompt
            text = b""
        return [self._name, hashlib.sha256(text).hexdigest(), str(getattr(self._function, "version", "")), self._settings]

    def _key(self, task: str, item: str) -> str:
        return _digest([_VERSION, "function", self._rules, task, item])


def load_function(reference: str, relative_to: Path | None = None) -> Callable[..., Any]:
    """The function of "module:function". UserError if there is no such module, or nothing in it that can be called."""
    module_name, colon, name = reference.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"'{reference}' is no function; allowed is module:function, such as my_scores:taste.")
    folder = [str(relative_to.resolve())] if relative_to is not None else []
    with _import_from(folder):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the module may do anything while it is imported
            raise UserError(f"'{reference}': the module {module_name} cannot be imported ({type(error).__name__}: {error}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"'{reference}': {module_name} has no function '{name}'.{did_you_mean(name, dir(module))}")
    found: Callable[..., Any] = function
    return found


@contextlib.contextmanager
def _import_from(folders: Sequence[str]) -> Iterator[None]:
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
