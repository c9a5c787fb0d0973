"""What a search works on: open models by alias, the item sets, and one evaluator for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import CheckpointError, UserError, did_you_mean
from modelglue.evaluation import CandidateEvaluator, ResidentModel, ScoreStore, TaskSet, leak_check
from modelglue.evaluation.members import Members
from modelglue.evaluation.places import Place
from modelglue.models import check_fit, load_tokenizer
from modelglue.recipe import build, merge, read_recipe
from modelglue.search import SearchSettings, warm_start
from modelglue.studies.schema import Member, SearchFile, Zoo
from modelglue.zoo import read_zoo

SPLITS = ("proxy", "confirmation", "test")


@dataclass(frozen=True)
class Bench:
    """Open models and tasks of a search."""

    file: SearchFile
    settings: SearchSettings
    checkpoints: Mapping[str, Checkpoint]
    """Members by alias, and the base under its own."""
    tasks: Mapping[str, TaskSet]

    @contextmanager
    def scoring(self, store: Path, place: Place) -> Iterator[dict[str, CandidateEvaluator]]:
        """An evaluator per item set, over one store of scores, and the same live models for all of them."""
        dtype = self.file.dtype.store
        timed = self.file.timeout is not None  # a process that hangs can only be ended by another one
        with ScoreStore(store) as opened, place.crew(Members(self.checkpoints, dtype), apart=timed) as crew:
            resident = ResidentModel(place.device)
            yield {
                split: CandidateEvaluator(
                    self.checkpoints, tasks, opened, store_dtype=dtype, resident=resident, crew=crew, timeout=self.file.timeout
                )
                for split, tasks in self.tasks.items()
            }


def open_bench(file: SearchFile, folder: Path) -> Bench:
    """Open everything that a search file in `folder` names; all that can be refused before scoring is refused here."""
    checkpoints, members, base = open_zoo(file, folder)
    for alias in members:
        check_fit(checkpoints[alias])
        load_tokenizer(checkpoints[alias])
    start = () if file.start is None else warm_start(folder / file.start)
    settings = file.settings(members, base, start)
    return Bench(file, settings, checkpoints, open_tasks(file, folder))


def open_zoo(file: SearchFile, folder: Path) -> tuple[dict[str, Checkpoint], tuple[str, ...], str | None]:
    """(models by alias, aliases of the members, alias of the base)."""
    zoo, home = _zoo(file, folder)
    known = [model.alias for model in zoo.models]
    wanted = known if file.members is None else file.members
    for alias in wanted:
        if alias not in known:
            raise UserError(f"members names '{alias}'; the zoo has {', '.join(known)}.{did_you_mean(alias, known)}")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"members are {', '.join(wanted)}; allowed is each alias once.")
    needed = [model for model in zoo.models if model.alias in wanted or model.alias == zoo.base]
    checkpoints: dict[str, Checkpoint] = {}
    faults = []
    for model in needed:
        try:
            checkpoints[model.alias] = _opened(model, home)
        except UserError as error:
            faults.append(str(error))
    base = zoo.base
    if base is not None and base not in known:
        base = "base" if "base" not in known else "zoo-base"
        try:
            checkpoints[base] = open_checkpoint(str(zoo.base), relative_to=home)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return checkpoints, tuple(wanted), base


def _zoo(file: SearchFile, folder: Path) -> tuple[Zoo, Path]:
    """The zoo and the folder that its references start from."""
    if isinstance(file.zoo, Zoo):
        return file.zoo, folder
    path = folder / file.zoo
    found = read_zoo(path)
    models = [Member(id=model.id, alias=model.alias, adapter=model.adapter, revision=model.revision) for model in found.models]
    return Zoo(name=found.name, base=found.base, models=models), path.parent


def _opened(model: Member, folder: Path) -> Checkpoint:
    if isinstance(model.recipe, str):
        return merge(folder / model.recipe)
    if model.recipe is not None:
        return build(read_recipe(model.recipe), relative_to=folder)
    return open_checkpoint(model.reference, relative_to=folder)


def open_tasks(file: SearchFile, folder: Path) -> dict[str, TaskSet]:
    """Item sets by split. UserError where they share items, or do not cover the same skills."""
    said = file.tasks
    include = None if said.include is None else folder / said.include
    tasks = {split: TaskSet.load(getattr(said, split), include) for split in SPLITS if getattr(said, split)}
    if said.proxy_items is not None:
        tasks["proxy"], rest = _divided(tasks["proxy"], said.proxy_items)
        if rest.skills and "confirmation" not in tasks:
            tasks["confirmation"] = rest
    leak_check(tasks)
    for split, found in tasks.items():
        if sorted(found.skills) != sorted(tasks["proxy"].skills):
            raise UserError(
                f"tasks.{split} covers {', '.join(found.skills)}, tasks.proxy covers {', '.join(tasks['proxy'].skills)}. "
                "Give the same skills in every set (task_alias names a task's skill)."
            )
    order = list(tasks["proxy"].skills)
    return {split: TaskSet({skill: found.skills[skill] for skill in order}) for split, found in tasks.items()}


def _divided(tasks: TaskSet, count: int) -> tuple[TaskSet, TaskSet]:
    """The first so many items of every skill in the fixed shuffled order, and the others; none if a skill has no others."""
    first: dict[str, tuple[object, ...]] = {}
    rest: dict[str, tuple[object, ...]] = {}
    for skill, items in tasks.skills.items():
        chosen = set(tasks.order[skill][:count])
        first[skill] = tuple(item for item in items if item.id in chosen)
        rest[skill] = tuple(item for item in items if item.id not in chosen)
    complete = all(rest.values())
    return TaskSet(first), TaskSet(rest if complete else {})  # type: ignore[arg-type]
