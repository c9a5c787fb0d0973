"""The search file: a zoo, tasks, what is searched, how, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from modelglue.search.settings import (
    BudgetSettings,
    FitnessSettings,
    Group,
    ObjectiveSettings,
    SearcherSettings,
    SearchSettings,
    SpaceSettings,
)  # fmt: skip
from modelglue.zoo.schema import ZooModel


class Member(Group):
    """A model by reference (`id`, also `base+adapter`), or the merge of a recipe: a file, or the recipe itself."""

    id: Annotated[str, Field(min_length=1)] | None = None
    recipe: Annotated[str, Field(min_length=1)] | dict[str, Any] | None = None
    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    adapter: str | None = None
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short_forms(cls, value: Any) -> Any:
        """`path`, or an entry without an alias."""
        if isinstance(value, str):
            value = {"id": value}
        if isinstance(value, Mapping) and not value.get("alias"):
            named = value.get("id") or value.get("recipe")
            if isinstance(named, str):
                last = named.rstrip("/").rpartition("/")[2].partition("@")[0]
                last = last.removesuffix(".yaml").removesuffix(".yml") if value.get("recipe") else last
                return {**value, "alias": last.replace("+", "_")}
        return value

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Member:
        if (self.id is None) == (self.recipe is None):
            raise ValueError(f"member '{self.alias}': give id (a model) or recipe (a merge), one of the two")
        if self.recipe is not None and (self.adapter or self.revision):
            raise ValueError(f"member '{self.alias}': a recipe has no adapter or revision of its own")
        return self

    @property
    def reference(self) -> str:
        assert self.id is not None
        return ZooModel(id=self.id, alias=self.alias, revision=self.revision, adapter=self.adapter).reference


class Zoo(Group):
    """The models that may be merged; what else zoo files know of a model is not looked at."""

    name: str = "zoo"
    base: str | None = None
    """What task vectors are taken from: a reference, or the alias of a member."""
    models: Annotated[list[Member], Field(min_length=1)]

    @field_validator("models")
    @classmethod
    def _aliases_are_unique(cls, models: list[Member]) -> list[Member]:
        aliases = [model.alias for model in models]
        for alias in aliases:
            if aliases.count(alias) > 1:
                raise ValueError(f"two models have the alias '{alias}'. Give one of them another alias")
        return models


class Tasks(Group):
    """The three disjoint item sets, as names of tasks."""

    include: str | None = None
    """Folder with task YAML files, relative to the search file."""
    proxy: Annotated[list[str], Field(min_length=1)]
    """Searched on."""
    proxy_items: Annotated[int, Field(ge=1, strict=True)] | None = None
    """So many items of every proxy task are searched on; the others confirm, unless there are confirmation tasks."""
    confirmation: tuple[str, ...] = ()
    """The best candidates are scored on these again."""
    test: tuple[str, ...] = ()
    """Scored once, at the end: the best candidate, every member and their average."""


class DtypeOptions(Group):
    """What merges are stored in: candidates are scored with that rounding."""

    store: Literal["float32", "float16", "bfloat16"] | None = None


class SearchFile(Group):
    """One search."""

    format: Literal["modelglue/1"] = "modelglue/1"
    zoo: Annotated[str, Field(min_length=1)] | Zoo
    """A zoo file (or glue file), or the models themselves."""
    members: Annotated[list[str], Field(min_length=1)] | None = None
    """Aliases of the models that are merged; default: all."""
    tasks: Tasks
    searcher: SearcherSettings = SearcherSettings()
    space: SpaceSettings = SpaceSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    fitness: FitnessSettings = FitnessSettings()
    budget: BudgetSettings = BudgetSettings()
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    batch: Annotated[int, Field(ge=1, strict=True)] = 1
    max_failures: Annotated[int, Field(ge=1, strict=True)] = 5
    finalists: Annotated[int, Field(ge=1, strict=True)] = 5
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds that scoring one candidate may take."""
    start: str | None = None
    """Folder of an earlier search whose best candidates this one starts from."""
    dtype: DtypeOptions = DtypeOptions()

    @field_validator("searcher", mode="before")
    @classmethod
    def _searcher_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def settings(self, members: tuple[str, ...], base: str | None, start: tuple[dict[str, Any], ...]) -> SearchSettings:
        """The same as the search itself takes it."""
        return SearchSettings(
            members=members, base=base, searcher=self.searcher, space=self.space, objective=self.objective, fitness=self.fitness,
            budget=self.budget, seed=self.seed, batch=self.batch, max_failures=self.max_failures, finalists=self.finalists, start=start,
        )  # fmt: skip
