"""Item sets: what candidates are searched on, re-scored on and reported on.

A *skill* is one entry of a task list: a task, or a group whose tasks' items are taken together. Its name is the task's alias, so the proxy,
confirmation and test tasks of one skill can be told to belong together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modelglue.errors import UserError, did_you_mean
from modelglue.evaluation.definitions import Definition, find_definitions
from modelglue.evaluation.harness import load_skills
from modelglue.evaluation.items import Item
from modelglue.evaluation.program_items import load_programs
from modelglue.evaluation.text_items import load_text

#: punctuation that changes nothing in a sentence; between digits it is part of a number
_SENTENCE = re.compile(r"(?<!\d)[.,;:!?'\"\u2018\u2019\u201c\u201d]+|[.,;:!?'\"\u2018\u2019\u201c\u201d]+(?!\d)")


@dataclass(frozen=True)
class TaskSet:
    """Items by skill, in the order of the task list."""

    skills: Mapping[str, tuple[Item, ...]]

    @classmethod
    def load(cls, names: Sequence[str], include: Path | None = None) -> TaskSet:
        """Load tasks by name (`task`, `group`, or `task:metric`); `include` is a folder with task YAML files.

        Names are looked for among the tasks that are defined here (see `definitions`), then in the harness. The metric is the first of the
        task's list unless it is named. Relative `data_files` are found beside the YAML file. Needs the extra `eval`. Raises UserError
        naming the task and its file for everything that is missing or cannot be scored item by item.
        """
        if include is not None and not include.is_dir():
            raise UserError(f"{include}: no such folder; tasks.include names a folder with task YAML files. Correct the path.")
        skills: dict[str, tuple[Item, ...]] = {}
        for name, alias, items in _load(names, include):
            if alias in skills:
                raise UserError(
                    f"tasks: '{name}' has the alias '{alias}', which another task of the list has too. Give each a task_alias of its own."
                )
            skills[alias] = tuple(_with_unique_ids(items))
        return cls(skills)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) over skills, ids and keys of all items."""
        content = [[skill, [[item.id, item.key] for item in items]] for skill, items in self.skills.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def order(self) -> Mapping[str, tuple[str, ...]]:
        """Skill -> item ids in a shuffled order that is a function of the ids alone: every prefix is a fair sample.

        An item that is added to a set finds its place among the others; their order stays.
        """
        return {
            skill: tuple(sorted((item.id for item in items), key=lambda name: hashlib.sha256(f"order {name}".encode()).digest()))
            for skill, items in self.skills.items()
        }

    @cached_property
    def _by_id(self) -> Mapping[str, Mapping[str, Item]]:
        return {skill: {item.id: item for item in items} for skill, items in self.skills.items()}

    def chosen(self, items: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[Item, ...]]:
        """Items by skill and id, in the order given; everything for None. UserError for a skill or an item that is not there."""
        if items is None:
            return dict(self.skills)
        found: dict[str, tuple[Item, ...]] = {}
        for skill, names in items.items():
            if skill not in self._by_id:
                raise UserError(f"plan: unknown task '{skill}'; the tasks are {', '.join(self.skills)}.{did_you_mean(skill, self.skills)}")
            unknown = [name for name in names if name not in self._by_id[skill]]
            if unknown:
                raise UserError(f"plan: task '{skill}' has no item '{unknown[0]}' ({len(unknown)} of {len(names)} are unknown).")
            found[skill] = tuple(self._by_id[skill][name] for name in dict.fromkeys(names))
        return found

    def apart_from(self, others: Sequence[TaskSet]) -> tuple[TaskSet, dict[str, int]]:
        """The items that none of the other sets has (by what `leak_check` looks at), and how many were left out of each skill.

        For benchmarks whose proxies are test items. UserError if nothing is left of a skill.
        """
        taken = {mark for other in others for items in other.skills.values() for item in items for mark in _marks(item)}
        kept = {skill: tuple(item for item in items if taken.isdisjoint(_marks(item))) for skill, items in self.skills.items()}
        if empty := [skill for skill, items in kept.items() if not items and self.skills[skill]]:
            raise UserError(f"tasks: every item of '{empty[0]}' is in the other item sets as well. Give another task.")
        return TaskSet(kept), {skill: len(self.skills[skill]) - len(items) for skill, items in kept.items()}

    def contexts(self, skill: str) -> list[str]:
        """What a router reads of every item of one skill."""
        return [item.context for item in self.skills[skill]]


def _load(names: Sequence[str], include: Path | None) -> Iterator[tuple[str, str, list[Item]]]:
    """(name as given, alias, items) of every skill of a list. All that is missing of the tasks defined here is reported together."""
    ours = find_definitions([name.partition(":")[0] for name in names], include)
    theirs = [name for name in names if name.partition(":")[0] not in ours]
    faults: list[str] = []
    found: dict[str, list[tuple[str, list[Item]]]] = {}
    for name in dict.fromkeys(names):
        plain, _, metric = name.partition(":")
        for definition in ours.get(plain, ()):
            try:
                found.setdefault(name, []).append((definition.alias, _items_of(definition, metric or None)))
            except UserError as error:
                faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    harness = load_skills(theirs, include) if theirs else iter(())
    for name in names:
        if name in theirs:
            yield next(harness)
        else:
            yield from ((name, alias, items) for alias, items in found[name])


def _items_of(definition: Definition, metric: str | None) -> list[Item]:
    kind = definition.values["kind"]
    if kind == "harness":
        from modelglue.evaluation.harness import load_local

        return load_local(definition, metric)
    if metric is not None:
        raise UserError(f"{definition.place}: is of kind {kind}, which has one metric; leave ':{metric}' out.")
    return load_programs(definition) if kind == "program" else load_text(definition)


def leak_check(tasks: Mapping[str, TaskSet]) -> None:
    """UserError if two item sets (by name) share a document or a question: what was searched on must not be reported on.

    Questions that differ only in case, blanks and the punctuation of sentences are one question; of a prompt with examples, the part after
    the last blank line counts.
    """
    where: dict[object, str] = {}
    for split, task_set in tasks.items():
        mine = [(item, skill) for skill, items in task_set.skills.items() for item in items]
        shared = [(item, skill, mark) for item, skill in mine for mark in _marks(item) if mark in where]
        if shared:
            item, skill, mark = shared[0]
            raise UserError(
                f"tasks: {split} and {where[mark]} share {len({item.key for item, _, _ in shared})} items "
                f"(one of them is {item.id} of '{skill}': {item.context[:60]!r}). "
                "The sets must be disjoint; give other tasks, or remove the items from one of the files."
            )
        where |= {mark: split for item, _ in mine for mark in _marks(item)}


def _marks(item: Item) -> tuple[object, ...]:
    """By what an item is known again: its document, its question, and its question as somebody else might have typed it."""
    last = (request.context.rstrip().rpartition("\n\n")[2] + request.continuation for request in item.requests)
    return item.id, item.question, ("typed", *map(normalised, last))


def normalised(text: str) -> str:
    """The text without what two copies of it may differ in: form of characters, case, blanks, punctuation of sentences."""
    return " ".join(_SENTENCE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())


def _with_unique_ids(items: Sequence[Item]) -> Iterator[Item]:
    """A document that stands in a set several times is told apart by a number."""
    seen: dict[str, int] = {}
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        yield item if seen[item.id] == 1 else dataclasses.replace(item, id=f"{item.id}-{seen[item.id]}")
