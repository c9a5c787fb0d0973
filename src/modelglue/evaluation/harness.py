"""lm-evaluation-harness defines prompts, answers and metrics; here its tasks become items.

This is the only file that knows the harness. It is imported when tasks are loaded, and never runs a model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modelglue.errors import UserError, did_you_mean
from modelglue.evaluation.items import Generation, Item, Request
from modelglue.evaluation.marking import HarnessMarker

#: part of every item's key: raise it when the same replies would be marked otherwise, or requests be answered otherwise
_VERSION = 2
#: the harness's own defaults
_MAX_NEW_TOKENS = 256
_FEWSHOT_SEED = 1234
#: output types that give one value in [0, 1] per item
_OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "generate_until")


def load_skills(names: Sequence[str], include: Path | None) -> Iterator[tuple[str, str, list[Item]]]:
    """(name as given, alias, items) of every task or group of a list."""
    manager = _manager([name.partition(":")[0] for name in names], include)
    for name in names:
        yield name, *_load_skill(manager, name, include)


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """A task index: of the folder alone (milliseconds) unless a name that it lacks may be one of the harness's own tasks (seconds)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager

            if include is None:
                return TaskManager()
            own = TaskManager(include_path=str(include.resolve()), include_defaults=False)
            if not _harness_may_have([name for name in names if name not in own.task_index]):
                return own
            return TaskManager(include_path=str(include.resolve()))
    except ImportError as error:
        raise UserError(f'scoring tasks needs the extra "eval": pip install "modelglue[eval]" ({error}).') from error


def _harness_may_have(names: Sequence[str]) -> bool:
    """Whether any of `names` stands in the text of any task file of the harness: a twentieth of the time of reading them as tasks."""
    import lm_eval

    words = [name.encode() for name in names]
    folder = Path(lm_eval.__file__).parent / "tasks"
    return bool(words) and any(word in path.read_bytes() for path in folder.rglob("*.yaml") for word in words)


def _load_skill(manager: Any, name: str, include: Path | None) -> tuple[str, list[Item]]:
    plain, _, metric = name.partition(":")
    entry = manager.task_index.get(plain)
    if entry is None:
        raise UserError(f"task '{plain}': {_why_unknown(plain, include)}{did_you_mean(plain, manager.all_tasks)}")
    place = f" ({entry.yaml_path})" if entry.yaml_path is not None else ""
    loaded: dict[str, Any] = {}
    try:
        for member in sorted(entry.tags) if entry.kind.name == "TAG" else [plain]:
            with _quiet(), _beside(manager.task_index[member], manager.task_index):
                loaded |= manager.load(member)["tasks"]
        with _quiet():
            for task in loaded.values():
                task.set_fewshot_seed(_FEWSHOT_SEED)
                task.build_all_requests()
                _remember(task)
    except Exception as error:  # the harness, datasets and the task's own code raise whatever they like
        raise UserError(
            f"task '{plain}'{place}: cannot be loaded: {_reason(error)}. Is its data there? Paths are taken from the YAML file's folder."
        ) from error
    if not loaded:
        raise UserError(f"task '{plain}'{place}: is a group without tasks. Name a task.")
    items = [item for task in loaded.values() for item in _items(task, metric or None, place)]
    single = next(iter(loaded.values())) if len(loaded) == 1 else None
    alias = (single.config.task_alias if single is not None else None) or plain
    return str(alias), items


def _reason(error: BaseException) -> str:
    """What an error says, and what it was caused by, in one line."""
    if isinstance(error, StopIteration):
        return "there is not one item"
    text = " ".join(str(error).split()).rstrip(".")
    said = text if " " in text else repr(error)
    return said if error.__cause__ is None else f"{said}: {_reason(error.__cause__)}"


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
    chosen = metric or next(iter(directions), None)
    if chosen is None:
        raise UserError(f"task '{name}'{place}: has no metric. Give it a metric_list.")
    if chosen not in directions:
        raise UserError(f"task '{name}'{place}: has no metric '{chosen}', but {', '.join(directions)}.{did_you_mean(chosen, directions)}")
    if not directions[chosen]:
        raise UserError(
            f"task '{name}'{place}: lower is better for its metric '{chosen}'. Choose another as TASK:METRIC, larger must be better."
        )
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    rules = [task.config.filter_list, task.config.metric_list, task.config.process_results]
    marking = [_VERSION, lm_eval.__version__, output_type, chosen, *map(_plain, rules)]
    for number, instances in enumerate(by_document.values()):
        instances.sort(key=lambda instance: instance.idx)
        requests = tuple(_request(instance, f"task '{name}'{place}") for instance in instances)
        document = _plain(instances[0].doc)
        key = _digest([marking, document, _reference(task, instances[0].doc), [dataclasses.astuple(request) for request in requests]])
        marker = HarnessMarker(task, tuple(instances), chosen, _golds(task, instances[0].doc, len(requests)))
        item = Item(_digest([document])[:16], key, requests, marker)
        if number == 0:  # a metric that cannot be used is found before any model is asked
            item.mark([(0.0, False) if request.generation is None else "" for request in requests])
        yield item


def _remember(task: Any) -> None:
    """Right answers and choices of a document are rendered once; the harness compiles their templates anew for every mark."""
    for name in ("doc_to_target", "doc_to_choice"):
        setattr(task, name, _remembering(getattr(task, name)))


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(function)
    def remembered(document: Any, *arguments: Any, **options: Any) -> Any:
        if arguments or options:
            return function(document, *arguments, **options)
        if id(document) not in known:
            known[id(document)] = document, function(document)  # with the document, so that its id is nobody else's
        return copy.copy(known[id(document)][1])

    return remembered


def _golds(task: Any, document: Any, requests: int) -> tuple[int, ...]:
    """Positions of the requests that ask for a right answer: what the loss is taken of. None where text is generated."""
    if task.config.output_type != "multiple_choice":
        return (0,) if task.config.output_type == "loglikelihood" else ()
    gold = task.doc_to_text(document) if getattr(task, "multiple_input", 0) else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    chosen = [
        choices.index(one) if isinstance(one, str) and one in choices else one for one in (gold if isinstance(gold, list) else [gold])
    ]
    return tuple(one for one in chosen if isinstance(one, int) and 0 <= one < min(requests, len(choices)))


def _reference(task: Any, document: Any) -> Any:
    """What answers to one document are held against: the task file says where in the document it stands."""
    choices = task.doc_to_choice(document) if getattr(task.config, "doc_to_choice", None) is not None else None
    gold = task.doc_to_text(document) if getattr(task, "multiple_input", 0) else task.doc_to_target(document)
    return _plain([gold, choices])


def _request(instance: Any, where: str) -> Request:
    if instance.request_type == "loglikelihood":
        context, continuation = instance.args[:2]
        return Request(str(context), str(continuation))
    prompt, settings = instance.args[:2]
    if settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature", 0.0) > 0):
        raise UserError(
            f"{where}: asks for sampling; candidates are compared on greedy answers. Set do_sample: false in its generation_kwargs."
        )
    if (instance.repeats or 1) != 1:
        raise UserError(f"{where}: asks for {instance.repeats} repeats; greedy answers are all alike. Set repeats: 1.")
    until = settings.get("until") or []
    limit = next((settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in settings), _MAX_NEW_TOKENS)
    return Request(str(prompt), generation=Generation(tuple([until] if isinstance(until, str) else until), int(limit)))


def _why_unknown(name: str, include: Path | None) -> str:
    if include is None:
        return "is no task of the harness. Give a folder with your own task files as tasks.include."
    line = re.compile(rf"""^\s*(task|group):\s*["']?{re.escape(name)}["']?\s*(#.*)?$""", re.MULTILINE)
    for path in sorted(include.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if line.search(text):
            return f"{path}{_fault_of(text)}. Check it with `lm_eval validate --tasks {name} --include_path {include}`."
    return f"no YAML file in {include} defines it, and it is no task of the harness."


def _fault_of(text: str) -> str:
    """What is wrong with a task file that the harness skips."""
    try:
        yaml.compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return f"{f':{mark.line + 1}' if mark else ''}: is not valid YAML: {getattr(error, 'problem', None) or error}"
    return ": names it, but is no valid task file (a missing include, or a function that is not there?)"


@contextlib.contextmanager
def _beside(entry: Any, index: Mapping[str, Any]) -> Iterator[None]:
    """Work in the task file's folder while data is loaded that is named relative to it; for a group, in its tasks' folder.

    What is not there is looked for in the working folder, as the harness does.
    """
    for task in _leaves(entry, index):
        named = ((task.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
        first = next(_strings(named), None)
        if first is None or task.yaml_path is None or Path(first).is_absolute():
            continue
        folder = Path(task.yaml_path).parent
        if (folder / first).exists() or not Path(first).exists():
            with contextlib.chdir(folder):
                yield
            return
    yield


def _leaves(entry: Any, index: Mapping[str, Any]) -> Iterator[Any]:
    """The tasks of a group or tag, or the task itself."""
    members = (entry.cfg or {}).get("task")
    if entry.kind.name not in ("GROUP", "TAG") or not (members or entry.tags):
        yield entry
        return
    for member in members if isinstance(members, list) else sorted(entry.tags):
        name = str(member.get("task", member.get("group")) if isinstance(member, dict) else member)
        if index.get(name, entry) is not entry:
            yield from _leaves(index[name], index)


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
    """JSON-ready, and the same in every process: functions stand for their name and the text of their file."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(child) for child in value]
    if not callable(value):
        return type(value).__qualname__
    try:
        text = Path(inspect.getfile(inspect.unwrap(value))).read_bytes()
    except (TypeError, OSError):  # built in
        text = b""
    return [getattr(value, "__qualname__", type(value).__qualname__), hashlib.sha256(text).hexdigest()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
