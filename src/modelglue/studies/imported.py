"""Searches of other tools, read unchanged: mergekit-evolve's plans and mergenetic's configurations, told apart by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelglue.recipe import Document, validate
from modelglue.recipe.evolve import EvolvePlan
from modelglue.search.settings import BudgetSettings, FitnessSettings, ObjectiveSettings, SearcherSettings, SpaceSettings
from modelglue.studies.schema import DtypeOptions, Member, SearchFile, Tasks, Zoo

#: mergekit-evolve's own default of evaluations
_EVALUATIONS = 100
#: where a configuration of mergenetic finds what it knows of items, in its folder
ITEM_PARAMETERS = "item_parameters.json"
_LEAST_POPULATION = 2


@dataclass(frozen=True)
class Imported:
    """A search, and what of the file it came from is not honoured, in words."""

    file: SearchFile
    notes: tuple[str, ...]


def imported(document: Document) -> Imported | None:
    """The search of another tool's file; None for one of ours."""
    keys = set(document.value) if isinstance(document.value, dict) else set()
    if "genome" in keys and "zoo" not in keys:
        return _from_evolve(validate(document, EvolvePlan))
    if {"pop_size", "n_iter"} & keys and "zoo" not in keys:
        return _from_mergenetic(validate(document, Mergenetic), document)
    return None


# -- mergekit-evolve ---------------------------------------------------------------------------------------------------------------


def _from_evolve(plan: EvolvePlan) -> Imported:
    genome = plan.genome
    aliases = _aliases([*genome.models, *([genome.base_model] if genome.base_model else [])])
    models = tuple(aliases[model] for model in genome.models)
    base = None if genome.base_model is None else aliases[genome.base_model]
    notes = []
    if genome.tokenizer_source is not None:
        notes.append("tokenizer_source: candidates are scored with their base's (or first model's) tokenizer.")
    if plan.num_fewshot is not None:
        notes.append("num_fewshot: examples are those of the task's own definition.")
    if plan.apply_chat_template or plan.fewshot_as_multiturn:
        notes.append("apply_chat_template, fewshot_as_multiturn: prompts are those of the task's own definition, without a chat template.")
    if plan.limit is not None and not plan.shuffle:
        notes.append("limit: the items are the first in a fixed shuffled order, not the first of the file; the others confirm the best.")
    for task in plan.tasks:
        if task.metric.partition(",")[2] not in ("", "none"):
            notes.append(f"tasks: {task.name}: the filter of '{task.metric}' is the one that the task itself names for its metric.")
    if not genome.allow_negative_weights:
        notes.append("genes stay between 0 and 1; mergekit-evolve lets them leave these bounds and takes the absolute value.")
    weights = [task.weight for task in plan.tasks]
    if len(set(weights)) > 1:
        notes.append("tasks: the weights divide by their sum, which changes no order of candidates.")
    named = [f"{task.name}:{task.metric.partition(',')[0]}" for task in plan.tasks]
    file = SearchFile(
        zoo=Zoo(name="mergekit-evolve", base=base, models=[Member(id=model, alias=alias) for model, alias in aliases.items()]),
        members=list(models),
        tasks=Tasks(proxy=named, proxy_items=plan.limit),
        searcher=SearcherSettings.model_validate(
            {"name": "cma", "trials": _EVALUATIONS, "init": "random" if plan.random_init else "vanilla"}
        ),
        space=SpaceSettings(
            method=genome.merge_method, genome=genome.model_copy(update={"models": models, "base_model": base, "tokenizer_source": None})
        ),
        objective=_weighted({task.name: task.weight for task in plan.tasks}),
        fitness=FitnessSettings(),
    )
    return Imported(file, tuple(notes))


def _weighted(weights: Mapping[str, float]) -> ObjectiveSettings:
    return ObjectiveSettings(rule="weighted", weights=dict(weights)) if len(set(weights.values())) > 1 else ObjectiveSettings()


# -- mergenetic --------------------------------------------------------------------------------------------------------------------


class Mergenetic(BaseModel):
    """A configuration of mergenetic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pop_size: Annotated[int, Field(ge=1, strict=True)]
    n_iter: Annotated[int, Field(ge=1, strict=True)]
    models: Annotated[dict[str, str], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    tasks: Any = None
    base_model: str | None = None
    metric: str | None = None
    n_samples: Annotated[int, Field(ge=1, strict=True)] = 20
    seed: Annotated[int, Field(ge=0, strict=True)] = 420
    dtype: Literal["float32", "float16", "bfloat16"] | None = "bfloat16"
    additional_templates_folder: str | None = None
    mode: Literal["mean", "random", "weighted", "mpirt", "gmpirt"] = "gmpirt"
    run_id: str | None = None
    bench: str | None = None
    task_type: str | None = None
    langs: list[str] = []
    datasets: Any = None
    device: str | None = None
    force_evaluation: bool = False
    eval_batch_size: int | None = None
    load_in_4bit: bool = False
    eager_mode: bool = False
    path_to_store_config: str | None = None
    path_to_store_merged_model: str | None = None


def _from_mergenetic(plan: Mergenetic, document: Document) -> Imported:
    from modelglue.errors import RecipeError

    search, test = _tasks(plan.tasks)
    if not search:
        raise RecipeError(
            document.fault(("tasks",) if "tasks" in document.value else (), "names no task to search on, and tables of questions "
                           "(`datasets`) are not read. Name lm-evaluation-harness tasks in tasks.search.")
        )  # fmt: skip
    models = list(plan.models.values()) if isinstance(plan.models, dict) else list(plan.models)
    merged = [model for model in dict.fromkeys(models) if model != plan.base_model]
    aliases = _aliases([*([plan.base_model] if plan.base_model else []), *merged])
    base = None if plan.base_model is None else aliases[plan.base_model]
    notes = ["the method is not in the file but in mergenetic's script: "]
    if base is not None and len(merged) == 1 and isinstance(plan.models, dict):
        members = [base, aliases[merged[0]]]
        space = SpaceSettings(method="slerp", granularity="gradient:5", filters=("self_attn", "mlp"), only_filtered=True)
        notes[0] += (
            "a model and its base are merged by slerp, with five points over the layers each for attention and feed-forward, and one "
        )
        notes[0] += "number for the rest."
        base = None
    elif base is not None:
        members = [aliases[model] for model in merged]
        space = SpaceSettings(method="dare_ties")
        notes[0] += "several models (or a list of models) and a base are merged by dare_ties, with a weight and a density each."
    else:
        members = [aliases[model] for model in merged]
        space = SpaceSettings(method="linear")
        notes[0] += "models without a base are merged linearly."
    fitness, count = _mergenetic_fitness(plan, document, notes)
    if plan.pop_size < _LEAST_POPULATION:
        notes.append(f"pop_size {plan.pop_size}: is {_LEAST_POPULATION} here, since children have two parents.")
    if test and set(test) == set(search):
        notes.append("tasks.test: names the searched tasks again; the items that are not searched on confirm the best candidates.")
        test = []
    for key, said in (
        ("device", plan.device), ("load_in_4bit", plan.load_in_4bit), ("eval_batch_size", plan.eval_batch_size),
        ("datasets", plan.datasets), ("eager_mode", plan.eager_mode), ("force_evaluation", plan.force_evaluation),
    ):  # fmt: skip
        if said:
            notes.append(f"{key}: is not used; candidates are merged in memory and scored there.")
    if any(key in document.value for key in ("path_to_store_config", "path_to_store_merged_model")):
        notes.append("path_to_store_config, path_to_store_merged_model: everything stands in the folder of the search.")
    several = len(search) > 1
    with_metric = [f"{task}:{plan.metric}" if plan.metric else task for task in search]
    file = SearchFile(
        zoo=Zoo(name=plan.run_id or "mergenetic", base=base, models=[Member(id=model, alias=alias) for model, alias in aliases.items()]),
        members=members,
        tasks=Tasks(
            include=plan.additional_templates_folder, proxy=with_metric, proxy_items=count,
            test=tuple(f"{task}:{plan.metric}" if plan.metric else task for task in test),
        ),
        searcher=SearcherSettings.model_validate(
            {
                "name": "evolution", "population": max(_LEAST_POPULATION, plan.pop_size), "generations": plan.n_iter,
                "objectives": "all" if several else "one",
            }
        ),
        space=space,
        fitness=fitness,
        budget=BudgetSettings(),
        seed=plan.seed,
        dtype=DtypeOptions(store=plan.dtype),
    )  # fmt: skip
    return Imported(file, tuple(notes))


def _mergenetic_fitness(plan: Mergenetic, document: Document, notes: list[str]) -> tuple[FitnessSettings, int | None]:
    """(how candidates are scored, items of every task that are searched on; None: all, of which candidates see `n_samples`)."""
    if isinstance(plan.models, list) or plan.mode in ("mean", "random", "weighted"):  # a list of models has no mode there
        return FitnessSettings(kind="everything"), plan.n_samples  # its weights are equal, so weighted is the mean
    if (Path(document.source).parent / ITEM_PARAMETERS).is_file():
        mode: Literal["mpirt", "gmpirt"] = "mpirt" if plan.mode == "mpirt" else "gmpirt"
        return FitnessSettings(kind="item_response", items=plan.n_samples, mode=mode, item_parameters=ITEM_PARAMETERS), None
    bench = f" of {plan.bench}" if plan.bench else ""
    notes.append(
        f"mode {plan.mode}: needs the parameters of the items{bench}, which the file does not have; scores are means of the searched "
        f"items. Put them beside the file as {ITEM_PARAMETERS} to have the estimate."
    )
    return FitnessSettings(kind="everything"), plan.n_samples


def _tasks(said: Any) -> tuple[list[str], list[str]]:
    """(searched, tested): a list, or {search: {language: task}, test: ...}; the entry `base` is for scoring the base alone."""
    if isinstance(said, list):
        return _once(said), []
    if not isinstance(said, Mapping):
        return [], []
    found = []
    for split in ("search", "test"):
        part = said.get(split) or {}
        values = [task for name, task in part.items() if name != "base"] if isinstance(part, Mapping) else list(part)
        found.append(_once(values))
    return found[0], found[1]


def _once(names: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(name) for name in names))


def _aliases(references: Iterable[str]) -> dict[str, str]:
    """A short unique name for every reference."""
    found: dict[str, str] = {}
    for reference in dict.fromkeys(references):
        last = reference.rstrip("/").rpartition("/")[2].partition("@")[0]
        short = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in last).lstrip(".-") or "model"
        name, number = short, 2
        while name in found.values():
            name, number = f"{short}-{number}", number + 1
        found[reference] = name
    return found
