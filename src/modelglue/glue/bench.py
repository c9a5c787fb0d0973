"""What every step of the recipe works with: the open models, the item sets, and one evaluator per set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelglue.checkpoint import ENGINE_VERSION, Checkpoint, DiskCheckpoint, open_checkpoint
from modelglue.checkpoint.adapted import AdaptedCheckpoint
from modelglue.errors import UserError
from modelglue.evaluation import CandidateEvaluator, ResidentModel, ScoreStore, TaskSet, leak_check, score_text_model
from modelglue.glue.run_folder import SCORES, RunFolder
from modelglue.glue.schema import GlueFile
from modelglue.mixture import domain_prompts, read_prompts
from modelglue.models import check_fit, load_tokenizer
from modelglue.recipe import Candidate, Recipe, Scores, build, linear_recipe
from modelglue.zoo import ZooModel
from modelglue.zoo.schema import Prompts

#: what the command line shows: event name and its fields
Listener = Callable[[str, dict[str, Any]], None]
SPLITS = ("proxy", "confirmation", "test")


@dataclass
class Bench:
    """Open models by alias, task sets by split, and (while scoring) their evaluators."""

    file: GlueFile
    folder: Path
    checkpoints: Mapping[str, Checkpoint]
    models: Mapping[str, ZooModel]
    base: str | None
    tasks: Mapping[str, TaskSet]
    emit: Listener
    _evaluators: dict[str, CandidateEvaluator] = field(default_factory=dict)
    _store: ScoreStore | None = None
    _run: RunFolder | None = None

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self.tasks]

    @property
    def members(self) -> list[str]:
        """Aliases of the zoo, in its order; the base is no member."""
        return list(self.models)

    def skills(self, split: str) -> list[str]:
        return list(self.tasks[split].skills)

    def task_identity(self, split: str) -> str:
        return self.tasks[split].identity

    @contextmanager
    def scoring(self, run: RunFolder) -> Iterator[None]:
        """Open the run's store of scores, and one evaluator per item set."""
        with ScoreStore(run.path(SCORES)) as store:
            self._store, self._run = store, run
            resident = ResidentModel()
            for split, tasks in self.tasks.items():
                self._evaluators[split] = CandidateEvaluator(
                    self.checkpoints,
                    tasks,
                    store,
                    store_dtype=self.file.dtype.store,
                    resident=resident,
                    on_batch=self._on_batch,
                    strict=True,
                )
            try:
                yield
            finally:
                self._evaluators.clear()
                self._store = self._run = None

    def evaluator(self, split: str) -> CandidateEvaluator:
        return self._evaluators[split]

    def score(self, candidate: Candidate, split: str) -> Scores:
        return self._evaluators[split].evaluate(candidate)

    def score_text_model(self, model: Any, identity: str, split: str) -> Scores:
        assert self._store is not None, "scores are asked for inside `scoring` only"
        return score_text_model(model, identity, self.tasks[split], self._store, on_batch=self._on_batch)

    def scored(self) -> tuple[int, int]:
        """(models and candidates, items) that this run asked for, whichever of its processes scored them."""
        assert self._store is not None, "scores are asked for inside `scoring` only"
        return self._store.asked()

    def recipe_of(self, candidate: Candidate, references: Mapping[str, str] | None = None) -> Recipe:
        """The candidate as a recipe over aliases, or over the references that stand for them."""
        names = [references[alias] if references else alias for alias in candidate.members]
        return linear_recipe(names, candidate.weights, self.file.dtype.store if len(names) > 1 else None)

    def is_written(self, candidate: Candidate) -> bool:
        """Whether the run must write it to have its weights in one folder: a merge, or a model with an adapter."""
        return len(candidate.members) > 1 or self.models[candidate.members[0]].adapter is not None

    def materialise(self, candidate: Candidate, references: Mapping[str, str]) -> Checkpoint:
        """The merge as an expression whose recipe names the models by reference."""
        opened = {references[alias]: renamed(self.checkpoints[alias], references[alias]) for alias in candidate.members}
        return build(self.recipe_of(candidate, references), resolve=opened.__getitem__)

    def _on_batch(self, task: str, items: int) -> None:
        assert self._run is not None
        self._run.log("batch", task=task, items=items)
        self.emit("batch", {"task": task, "items": items})


def open_bench(file: GlueFile, folder: Path, emit: Listener) -> Bench:
    """Open every model and task; all that can be refused before scoring is refused here."""
    checkpoints: dict[str, Checkpoint] = {}
    for model in file.zoo.models:
        if model.dtype is not None:
            raise UserError(f"zoo model '{model.alias}': dtype is not supported yet. Convert the model first.")
        checkpoints[model.alias] = open_checkpoint(model.reference, relative_to=folder)
    base = None
    if file.zoo.base is not None:
        base = "base"
        while base in checkpoints:
            base = f"zoo-{base}"
        checkpoints[base] = open_checkpoint(file.zoo.base, relative_to=folder)
    for checkpoint in checkpoints.values():
        check_fit(checkpoint)
        load_tokenizer(checkpoint)
    include = folder / file.tasks.include if file.tasks.include is not None else None
    tasks = {split: TaskSet.load(getattr(file.tasks, split), include) for split in SPLITS if getattr(file.tasks, split)}
    leak_check(tasks)
    for split, found in tasks.items():
        if sorted(found.skills) != sorted(tasks["proxy"].skills):
            raise UserError(
                f"tasks.{split} covers {', '.join(found.skills)}, tasks.proxy covers {', '.join(tasks['proxy'].skills)}. "
                "Give the same skills in every set (task_alias names a task's skill)."
            )
    models = {model.alias: _with_prompts(model, folder) for model in file.zoo.models}
    return Bench(file, folder, checkpoints, models, base, tasks, emit)


def renamed(checkpoint: Checkpoint, reference: str) -> Checkpoint:
    """The same model on disk under another name, which recipes and cards made from it then give."""
    assert isinstance(checkpoint, DiskCheckpoint | AdaptedCheckpoint), "a zoo is made of models on disk, with their adapters"
    return checkpoint.called(reference)


def run_key(bench: Bench) -> str:
    """SHA-256 over settings, contents of the models and contents of the tasks: what a run is a function of."""
    content = {
        "engine": ENGINE_VERSION,
        "file": bench.file.model_dump(mode="json"),
        "models": {alias: checkpoint.identity for alias, checkpoint in bench.checkpoints.items()},
        "tasks": {split: bench.task_identity(split) for split in bench.splits},
    }
    if read := {alias: model.prompts.positive for alias, model in bench.models.items() if model.prompts_from and model.prompts}:
        content["prompts"] = read
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_prompts(model: ZooModel, folder: Path) -> ZooModel:
    """The model with the prompts of its file among its own."""
    if model.prompts_from is None:
        return model
    own = model.prompts or Prompts()
    read = read_prompts(folder / model.prompts_from)
    return model.model_copy(update={"prompts": Prompts(positive=[*own.positive, *read], negative=own.negative)})


def prompts_of(bench: Bench, members: Sequence[str], won: Sequence[str]) -> dict[str, list[str]]:
    """Router prompts of one expert: those of its members, else the default words of their domains, else items of the tasks it won.

    None at all is possible: what learns from scores needs none.
    """
    positive: list[str] = []
    negative: list[str] = []
    for alias in members:
        model = bench.models[alias]
        positive += model.prompts.positive if model.prompts else []
        negative += model.prompts.negative if model.prompts else []
    if not positive:
        for alias in members:
            found = domain_prompts(bench.models[alias].domain)
            positive += found["positive"]
            negative += found["negative"]
    if not positive:
        positive = [text for skill in won for text in bench.tasks["proxy"].contexts(skill)[:16]]
    return {"positive": list(dict.fromkeys(positive)), "negative": list(dict.fromkeys(negative))}


def without_prompts(members: Sequence[str]) -> UserError:
    """An expert for which no router can be made from prompts."""
    return UserError(f"expert of {', '.join(members)}: no router prompts. Give the models prompts: {{positive: [...]}} or a domain: tag.")
