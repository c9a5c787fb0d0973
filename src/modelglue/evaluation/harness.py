"""lm-evaluation-harness defines prompts, answers and metrics; here its tasks are found and loaded.

The harness is imported when tasks are loaded, and never runs a model.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modelglue.errors import UserError, did_you_mean
from modelglue.evaluation.definitions import SHIPPED, Definition
from modelglue.evaluation.harness_items import items_of, remember_answers
from modelglue.evaluation.items import Item
from modelglue.evaluation.program_items import sampled

#: the harness's own default
_FEWSHOT_SEED = 1234


def load_skills(names: Sequence[str], include: Path | None) -> Iterator[tuple[str, str, list[Item]]]:
    """(name as given, alias, items) of every task or group of a list."""
    manager = _manager([name.partition(":")[0] for name in names], include)
    for name in names:
        yield name, *_load_skill(manager, name, include)


def load_local(definition: Definition, metric: str | None = None) -> list[Item]:
    """The items of a definition of kind `harness`: settings of the harness under `harness`, documents under `data`.

    `data` names the splits `test` and, for examples, `fewshot`. `by`: the field of a document that says which part of the task it is of;
    the examples of a part are its own, and `description` may name it. `sample`: so many of the items, chosen by their ids.
    """
    definition.only("data", "harness", "by", "sample")
    settings = definition.get("harness", dict)
    documents = definition.documents()
    by = definition.get("by", str, "")
    if wrong := [split for split in documents if split not in ("test", "fewshot")]:
        raise UserError(f"{definition.place}: data names the split '{wrong[0]}'; allowed are test and fewshot.")
    items: list[Item] = []
    for part in dict.fromkeys(_part(definition, document, by) for document in documents.get("test", ())):
        mine = {split: [one for one in rows if _part(definition, one, by) == part] for split, rows in documents.items()}
        config = {
            **settings, "task": definition.name + (f"_{part}" if part else ""), "dataset_path": "json", "test_split": "test",
            "custom_dataset": functools.partial(_datasets, mine),
        }  # fmt: skip
        if "description" in settings:
            config["description"] = str(settings["description"]).replace("{part}", part.replace("_", " "))
        if "fewshot" in mine:
            config["fewshot_split"] = "fewshot"
        items += _load_inline(definition, config, metric)
    return sampled(definition, items)


def _part(definition: Definition, document: Any, by: str) -> str:
    if by and by not in document:
        raise UserError(f"{definition.place}: a document has no field '{by}', by which the task is divided.")
    return str(document[by]) if by else ""


def _datasets(splits: Mapping[str, list[Any]], **_: Any) -> Any:
    import datasets

    return datasets.DatasetDict({split: datasets.Dataset.from_list([dict(row) for row in rows]) for split, rows in splits.items() if rows})


def _load_inline(definition: Definition, config: Mapping[str, Any], metric: str | None) -> list[Item]:
    manager = _manager([], SHIPPED)
    try:
        with _quiet():
            (task,) = manager.load(dict(config))["tasks"].values()
            task.set_fewshot_seed(_FEWSHOT_SEED)
            task.build_all_requests()
            remember_answers(task)
    except Exception as error:  # the harness, and templates that meet documents of another form
        raise UserError(
            f"{definition.place}: cannot be loaded: {_reason(error)}. Are its documents of the form that it expects?"
        ) from error
    return list(items_of(task, metric, f" ({definition.path})"))


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
                remember_answers(task)
    except Exception as error:  # the harness, datasets and the task's own code raise whatever they like
        raise UserError(
            f"task '{plain}'{place}: cannot be loaded: {_reason(error)}. Is its data there? Paths are taken from the YAML file's folder."
        ) from error
    if not loaded:
        raise UserError(f"task '{plain}'{place}: is a group without tasks. Name a task.")
    items = [item for task in loaded.values() for item in items_of(task, metric or None, place)]
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
