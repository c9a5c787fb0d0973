"""Item sets: lm-evaluation-harness defines prompts, answers and metrics; our runner asks the model.

A *skill* is one entry of a task list: a task, or a group whose tasks' items are taken together. Its name is the task's alias, so the proxy,
confirmation and test tasks of one skill can be told to belong together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modelglue.errors import UserError, did_you_mean

#: part of every item's key: raise it when the same replies would be marked otherwise, or requests be answered otherwise
_VERSION = 1
#: the harness's own defaults
_MAX_NEW_TOKENS = 256
_FEWSHOT_SEED = 1234
#: output types that give one value in [0, 1] per item
_OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "generate_until")


@dataclass(frozen=True)
class Generation:
    """How a continuation is generated: greedily, up to a stop string or this many tokens."""

    until: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Request:
    """One question to the model: (context, continuation) to be scored, or (prompt,) to be continued."""

    texts: tuple[str, ...]
    generation: Generation | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """One question of a task, and how its answer is marked."""

    id: str
    """Stable name of the document: equal documents, equal ids, whatever else is in the set."""
    key: str
    """SHA-256 of all that the value depends on besides the model."""
    requests: tuple[Request, ...]
    _task: Any
    _instances: tuple[Any, ...]
    _metric: str

    @property
    def context(self) -> str:
        """What stands before the answer; the text that a router reads."""
        return self.requests[0].texts[0]

    def mark(self, replies: Sequence[object]) -> float:
        """The metric's value in [0, 1] for the model's replies, in the order of the requests; NaN if one of them is NaN."""
        if any(isinstance(reply, tuple) and reply[0] != reply[0] for reply in replies):
            return float("nan")
        instances = [
            dataclasses.replace(instance, resps=[reply], filtered_resps={})
            for instance, reply in zip(self._instances, replies, strict=True)
        ]
        pipeline = self._task._filters[0]
        pipeline.apply(instances)
        results = [instance.filtered_resps[pipeline.name] for instance in instances]
        found = self._task.process_results(instances[0].doc, results)
        if self._metric not in found:
            raise UserError(
                f"task '{self._task.task_name}': gives no '{self._metric}', but {', '.join(found)}. Name one as TASK:METRIC in the task list."
            )
        value = found[self._metric]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(
                f"task '{self._task.task_name}': its metric '{self._metric}' gives {value!r} for one item; "
                "allowed is a number from 0 to 1 per item. Choose another metric as TASK:METRIC."
            )
        return float(value)


@dataclass(frozen=True)
class TaskSet:
    """Items by skill, in the order of the task list."""

    skills: Mapping[str, tuple[Item, ...]]

    @classmethod
    def load(cls, names: Sequence[str], include: Path | None = None) -> TaskSet:
        """Load tasks by name (`task`, `group`, or `task:metric`); `include` is a folder with task YAML files.

        The metric is the first of the task's list unless it is named. Relative `data_files` are found beside the YAML file. Needs the extra
        `eval`. Raises UserError naming the task and its file for everything that is missing or cannot be scored item by item.
        """
        if include is not None and not include.is_dir():
            raise UserError(f"{include}: no such folder; tasks.include names a folder with task YAML files. Correct the path.")
        manager = _manager([name.partition(":")[0] for name in names], include)
        skills: dict[str, tuple[Item, ...]] = {}
        for name in names:
            alias, items = _load_skill(manager, name, include)
            if alias in skills:
                raise UserError(f"tasks: '{name}' has the alias '{alias}', which another task of the list has too. Give each a task_alias of its own.")
            skills[alias] = items
        return cls(skills)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) over skills, ids and keys of all items."""
        content = [[skill, [[item.id, item.key] for item in items]] for skill, items in self.skills.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def contexts(self, skill: str) -> list[str]:
        """What a router reads of every item of one skill."""
        return [item.context for item in self.skills[skill]]


def leak_check(tasks: Mapping[str, TaskSet]) -> None:
    """UserError if two item sets (by name) share a document: what was searched on must not be reported on."""
    where: dict[str, str] = {}
    for split, task_set in tasks.items():
        mine = {item.id: skill for skill, items in task_set.skills.items() for item in items}
        shared = [(item, skill) for item, skill in mine.items() if item in where]
        if shared:
            item, skill = shared[0]
            raise UserError(
                f"tasks: {split} and {where[item]} share {len(shared)} items (one of them is {item} of '{skill}'). "
                "The sets must be disjoint; give other tasks, or remove the items from one of the files."
            )
        where |= dict.fromkeys(mine, split)


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """A task index: of the folder alone where that has every name (milliseconds), else with the harness's own tasks (seconds)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager

            if include is not None:
                own = TaskManager(include_path=str(include.resolve()), include_defaults=False)
                if all(name in own.task_index for name in names):
                    return own
            return TaskManager(include_path=str(include.resolve()) if include is not None else None)
    except ImportError as error:
        raise UserError(f'scoring tasks needs the extra "eval": pip install "modelglue[eval]" ({error}).') from error


def _load_skill(manager: Any, name: str, include: Path | None) -> tuple[str, tuple[Item, ...]]:
    plain, _, metric = name.partition(":")
    entry = manager.task_index.get(plain)
    if entry is None:
        raise UserError(f"task '{plain}': {_why_unknown(plain, include)}{did_you_mean(plain, manager.all_tasks)}")
    place = f" ({entry.yaml_path})" if entry.yaml_path is not None else ""
    try:
        with _quiet(), _beside(entry):
            loaded = manager.load(plain)["tasks"]
            for task in loaded.values():
                task.set_fewshot_seed(_FEWSHOT_SEED)
                task.build_all_requests()
    except UserError:
        raise
    except Exception as error:  # the harness, datasets and the task's own code raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"task '{plain}'{place}: cannot be loaded: {reason}. Is its data there? Paths are taken from the YAML file's folder.") from error
    if not loaded:
        raise UserError(f"task '{plain}'{place}: is a group without tasks. Name a task.")
    items = [item for task in loaded.values() for item in _items(task, metric or None, place)]
    single = next(iter(loaded.values())) if len(loaded) == 1 else None
    alias = (single.config.task_alias if single is not None else None) or plain
    return str(alias), tuple(_with_unique_ids(items))


def _items(task: Any, metric: str | None, place: str) -> Iterator[Item]:
    import lm_eval

    name = task.task_name
    output_type = task.config.output_type
    if output_type not in _OUTPUT_TYPES:
        raise UserError(f"task '{name}'{place}: output_type is {output_type}; allowed are {', '.join(_OUTPUT_TYPES)}.")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task '{name}'{place}: runs generated programs, which is not supported yet. Choose another task.")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task '{name}'{place}: needs images or sound; only text is supported. Choose another task.")
    directions = task.higher_is_better()
    chosen = metric or next(iter(directions))
    if chosen not in directions and metric is not None:
        raise UserError(f"task '{name}'{place}: has no metric '{metric}', but {', '.join(directions)}.{did_you_mean(metric, directions)}")
    if not directions.get(chosen, True):
        raise UserError(f"task '{name}'{place}: lower is better for its metric '{chosen}'. Choose another as TASK:METRIC, larger must be better.")
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    marking = [_VERSION, lm_eval.__version__, output_type, chosen, _plain(task.config.filter_list), _plain(task.config.metric_list)]
    for instances in by_document.values():
        instances.sort(key=lambda instance: instance.idx)
        requests = tuple(_request(instance, f"task '{name}'{place}") for instance in instances)
        document = _plain(instances[0].doc)
        key = _digest([marking, document, [dataclasses.astuple(request) for request in requests]])
        yield Item(_digest([document])[:16], key, requests, task, tuple(instances), chosen)


def _request(instance: Any, where: str) -> Request:
    if instance.request_type == "loglikelihood":
        context, continuation = instance.args[:2]
        return Request((str(context), str(continuation)))
    prompt, settings = instance.args[:2]
    if settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature", 0.0) > 0):
        raise UserError(f"{where}: asks for sampling; candidates are compared on greedy answers. Set do_sample: false in its generation_kwargs.")
    if (instance.repeats or 1) != 1:
        raise UserError(f"{where}: asks for {instance.repeats} repeats; greedy answers are all alike. Set repeats: 1.")
    until = settings.get("until") or []
    limit = next((settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in settings), _MAX_NEW_TOKENS)
    return Request((str(prompt),), Generation(tuple([until] if isinstance(until, str) else until), int(limit)))


def _with_unique_ids(items: Sequence[Item]) -> Iterator[Item]:
    """A document that stands in a set several times is told apart by a number."""
    seen: dict[str, int] = {}
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        yield item if seen[item.id] == 1 else dataclasses.replace(item, id=f"{item.id}-{seen[item.id]}")


def _why_unknown(name: str, include: Path | None) -> str:
    if include is None:
        return "is no task of the harness. Give a folder with your own task files as tasks.include."
    named = sorted(path for path in include.rglob("*.yaml") if name in path.read_text(encoding="utf-8", errors="replace"))
    if named:
        return f"{named[0]} names it, but is no valid task file. Check it with `lm_eval validate --tasks {name} --include_path {include}`."
    return f"no YAML file in {include} defines it, and it is no task of the harness."


@contextlib.contextmanager
def _beside(entry: Any) -> Iterator[None]:
    """Work in the YAML file's folder while data is loaded that is named relative to it."""
    settings = (entry.cfg or {}).get("dataset_kwargs") or {}
    named = settings.get("data_files")
    first = next(iter(_strings(named)), None)
    if entry.yaml_path is None or first is None or Path(first).is_absolute() or Path(first).exists():
        yield
        return
    with contextlib.chdir(Path(entry.yaml_path).parent):
        yield


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _strings(child)
    elif isinstance(value, Sequence):
        for child in value:
            yield from _strings(child)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and datasets draw bars and log; what matters of it comes back as an error."""
    import warnings

    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _plain(value: Any) -> Any:
    """JSON-ready, and the same in every process: functions are named, not addressed."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(child) for child in value]
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
