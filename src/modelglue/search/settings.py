"""What a search is made of, as data: the YAML of `modelglue search` is this, and so is the first table of a search's journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelglue.errors import UserError, did_you_mean
from modelglue.recipe.genome import GenomeDefinition
from modelglue.search.cma import TRIALS, CmaSearch, StagedSearch
from modelglue.search.dataflow import DataFlowSearch, after_parameters
from modelglue.search.decode import Decoder, MergeSpace, NearbySpace
from modelglue.search.evolution import EvolutionSearch
from modelglue.search.fitness import Everything, Fitness, Halving
from modelglue.search.genome_space import GenomeSpace
from modelglue.search.grid import GridSearch
from modelglue.search.heuristics import HeuristicSearch, SimilarityTo
from modelglue.search.item_response import ItemParameters
from modelglue.search.kinship_greedy import KinshipGreedySearch, KinshipOf
from modelglue.search.map import MapSearch
from modelglue.search.merge3 import ItemResponseFitness
from modelglue.search.objective import Objective
from modelglue.search.random_search import RandomSearch
from modelglue.search.recycling import RecyclingSearch
from modelglue.search.searcher import Budget, Outcome, Searcher
from modelglue.search.tpe import TpeSearch


class Group(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SpaceSettings(Group):
    """Which parameters are searched, and how finely; see `MergeSpace`."""

    method: str = "linear"
    granularity: str | Annotated[int, Field(ge=1, strict=True)] = "model"
    filters: tuple[str, ...] = ()
    only_filtered: bool = False
    parameters: dict[str, Any] = {}
    genome: GenomeDefinition | None = None
    """mergekit-evolve's genome, which then says all of this."""


#: options of searchers that are numbers, whoever has them: the least that is allowed
_COUNTS: Mapping[str, int] = {
    "trials": 1, "parameter_trials": 1, "population": 1, "generations": 1, "points": 1, "steps": 1, "repeats": 1, "max_layers": 1, "k": 1,
    "patience": 1, "startup": 0, "verify": 0, "least": 0, "seed": 0,
}  # fmt: skip
_NUMBERS, _FLAGS = ("sigma", "delta", "stop_kinship"), ("explore", "free_zero", "coarse", "allow_negative")
#: what searchers are given by others
_GIVEN = ("start", "kinship", "link", "variation", "recipes", "decoder", "depths", "members", "base", "similarity_to")


class SearcherSettings(BaseModel):
    """The method of search by name, and its options (trials, population, ...)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "cma"

    @model_validator(mode="after")
    def _options_are_of_their_kinds(self) -> SearcherSettings:
        """What else options must be, the searcher that has them says."""
        faults = []
        for name, value in self.options.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name in _COUNTS and value is not None and not (number and isinstance(value, int) and value >= _COUNTS[name]):
                faults.append(f"{name} is {value!r}; allowed is a whole number from {_COUNTS[name]}")
            elif name in _NUMBERS and not number:
                faults.append(f"{name} is {value!r}; allowed is a number")
            elif name in _FLAGS and not isinstance(value, bool):
                faults.append(f"{name} is {value!r}; allowed are true and false")
            elif name in _GIVEN:
                faults.append(f"{name} is no option of a searcher. Leave it out")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ObjectiveSettings(Group):
    """How the scores of several tasks become one."""

    rule: Literal["mean", "weighted", "worst", "chebyshev"] = "mean"
    weights: dict[str, float] = {}
    reference: dict[str, float] = {}


class FitnessSettings(Group):
    """On which items candidates are scored."""

    kind: Literal["racing", "everything", "halving", "item_response"] = "racing"
    chunk: Annotated[int, Field(ge=1)] = 25
    eta: Annotated[int, Field(ge=2)] = 3
    """Of `halving`: one in so many candidates goes on, with so many times the items."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many items of every task."""
    items: Annotated[int, Field(ge=1)] = 50
    """Of `item_response`: items per task that are scored."""
    mode: Literal["mean", "weighted", "pirt", "gpirt", "mpirt", "gmpirt"] | None = None
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    """What seen items count for in gpirt and gmpirt; default 0.5, in gpirt what the errors of the prediction ask for."""
    extract: Literal["random", "anchors"] = "random"
    item_parameters: Annotated[str, Field(min_length=1)] | None = None
    """File with discrimination and difficulty of every item."""
    responses: Annotated[str, Field(min_length=1)] | None = None
    """Store of scores that earlier searches have filled; item parameters are fitted to the models that have all items there."""


class BudgetSettings(Group):
    """When the search ends; whichever comes first."""

    candidates: Annotated[int, Field(ge=1)] | None = None
    items: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None


#: keys that no search had at first; left at their defaults they change nothing, so older searches go on
_LATER: Mapping[str, tuple[str, ...]] = {"space": ("genome", "only_filtered"), "fitness": ("item_parameters", "responses", "eta")}


class SearchSettings(Group):
    """One search."""

    members: Annotated[tuple[str, ...], Field(min_length=1)]
    base: str | None = None
    searcher: SearcherSettings = SearcherSettings()
    space: SpaceSettings = SpaceSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    fitness: FitnessSettings = FitnessSettings()
    budget: BudgetSettings = BudgetSettings()
    seed: Annotated[int, Field(ge=0)] = 0
    batch: Annotated[int, Field(ge=1)] = 1
    """Candidates that a searcher without generations is asked for at once."""
    max_failures: Annotated[int, Field(ge=1)] = 5
    finalists: Annotated[int, Field(ge=1)] = 5
    start: tuple[dict[str, Any], ...] = ()
    """Parameters that an earlier search found good: where this one starts (warm start)."""

    def content(self) -> dict[str, Any]:
        """All that the search is a function of; a budget only says how far it goes."""
        found = self.model_dump(mode="json", exclude={"budget", "max_failures", "finalists"})
        for group, names in _LATER.items():
            defaults = type(getattr(self, group))()
            for name in names:
                if getattr(getattr(self, group), name) == getattr(defaults, name):
                    del found[group][name]
        return found


@dataclass(frozen=True)
class Facts:
    """What searchers may want to know of the members; whoever opened them can say it."""

    layers: int | None = None
    """Layers of every member, for spaces that differ over them."""
    marker: str = "layers."
    """What the names of tensors in layers contain."""
    depths: Mapping[str, int] = field(default_factory=dict)
    """Layers of each member, for paths through them."""
    similarity_to: SimilarityTo | None = None
    kinship: KinshipOf | None = None
    items: Mapping[str, ItemParameters] = field(default_factory=dict)
    """Task -> item parameters."""
    responses: Mapping[str, Any] = field(default_factory=dict)
    """Task -> answers of many models [models, items]."""


def make_objective(settings: SearchSettings) -> Objective:
    return Objective(settings.objective.rule, settings.objective.weights, settings.objective.reference)


def make_budget(settings: SearchSettings) -> Budget:
    return Budget(**settings.budget.model_dump())


def make_fitness(settings: SearchSettings, facts: Facts) -> Fitness:
    """How candidates are scored."""
    said = settings.fitness
    if said.kind == "item_response":
        return ItemResponseFitness(
            settings.members, size=said.items, mode=said.mode, share=said.share, extract=said.extract, seed=settings.seed,
            parameters=facts.items, responses=facts.responses,
        )  # fmt: skip
    if said.kind == "halving":
        return Halving(True, said.chunk, said.limit, said.eta)
    return Everything(said.kind == "racing", said.chunk, said.limit)


def make_searcher(settings: SearchSettings, facts: Facts) -> Searcher:
    """The searcher of these settings. UserError for an unknown name or option, and for what it needs and does not have."""
    name = settings.searcher.name
    if name not in SEARCHERS:
        raise UserError(f"searcher '{name}'; allowed are {', '.join(SEARCHERS)}.{did_you_mean(name, SEARCHERS)}")
    try:
        return SEARCHERS[name](settings, facts, settings.searcher.options)
    except TypeError as error:  # an option that the searcher does not have
        raise UserError(f"searcher '{name}': {str(error).partition(') ')[2] or error}.") from error


def make_space(settings: SearchSettings, facts: Facts) -> Decoder:
    """The space of recipes that is searched."""
    said = settings.space
    if said.genome is not None:
        if facts.layers is None:
            raise UserError("the number of layers of the models is not known, which a genome needs.")
        return GenomeSpace(said.genome, facts.layers)
    return MergeSpace(
        said.method, settings.members, settings.base, said.granularity, facts.layers, facts.marker, said.filters, said.parameters,
        settings.seed, said.only_filtered,
    )  # fmt: skip


# -- the searchers by name ---------------------------------------------------------------------------------------------------------

_Options = dict[str, Any]


def _seeded(settings: SearchSettings, options: _Options) -> _Options:
    return {"seed": settings.seed, **options}


def _cma(settings: SearchSettings, facts: Facts, options: _Options) -> Searcher:
    options = _seeded(settings, options)
    start = options.pop("init", "vanilla")
    if start == "heuristic":
        return _from_heuristic(settings, options)
    if start not in ("vanilla", "random"):
        raise UserError(f"searcher cma: init is '{start}'; allowed are vanilla, random and heuristic.")
    found = make_space(settings, facts)
    first = settings.start[0] if settings.start else None
    if isinstance(found, GenomeSpace) and start == "vanilla" and first is None:
        first = found.start()
    return CmaSearch(found, **{"start": first, **options})


def _from_heuristic(settings: SearchSettings, options: _Options) -> Searcher:
    """Heuristic-Coefficient first, then CMA-ES on small changes to its coefficients (Model-GLUE, arXiv 2410.05357)."""
    width, free_zero, coarse = float(options.pop("delta", 0.1)), bool(options.pop("free_zero", True)), bool(options.pop("coarse", False))
    if settings.space.method != "linear" or settings.space.granularity != "model":
        raise UserError("searcher cma: a heuristic start is for linear merges of whole models. Leave init out, or search those.")
    members = settings.members

    def refined(outcomes: Sequence[Outcome]) -> CmaSearch:
        selection = heuristic.selections()[-1]
        space = NearbySpace(selection.weights, width, free_zero)
        search = CmaSearch(space, **{"start": dict.fromkeys(members, 0.0), "patience": 2, "name": "heuristic", "trials": None, **options})
        return search.lasting(50, 4, TRIALS - len(outcomes))

    heuristic = HeuristicSearch(members, "coefficient", coarse=coarse)
    return StagedSearch(lambda _: heuristic, refined)


def _heuristic(strategy: str) -> Callable[[SearchSettings, Facts, _Options], Searcher]:
    def make(settings: SearchSettings, facts: Facts, options: _Options) -> Searcher:
        return HeuristicSearch(settings.members, strategy, similarity_to=facts.similarity_to, **options)  # type: ignore[arg-type]

    return make


def _dataflow(settings: SearchSettings, facts: Facts, options: _Options) -> Searcher:
    missing = [alias for alias in settings.members if alias not in facts.depths]
    if missing:
        raise UserError(f"searcher dataflow: the number of layers of {', '.join(missing)} is not known.")
    depths = {alias: facts.depths[alias] for alias in settings.members}
    options = _seeded(settings, options)
    said, trials = options.pop("space", "dfs"), options.pop("parameter_trials", TRIALS)
    if said not in ("dfs", "both"):
        raise UserError(f"searcher dataflow: space is '{said}'; allowed are dfs and both (parameters first, then paths; cma alone is ps).")
    if said == "dfs":
        return DataFlowSearch(depths, **options)
    space = make_space(settings, facts)
    return StagedSearch(
        lambda _: CmaSearch(space, seed=settings.seed, trials=trials), lambda outcomes: after_parameters(outcomes, depths, **options)
    )


def _map(settings: SearchSettings, facts: Facts, options: _Options) -> Searcher:
    if settings.base is None:
        raise UserError("searcher map: scales changes from a base, and there is none. Name it.")
    return MapSearch(settings.members, settings.base, **_seeded(settings, options))


SEARCHERS: Mapping[str, Callable[[SearchSettings, Facts, _Options], Searcher]] = {
    **{name: _heuristic(name) for name in ("average", "coefficient", "similarity_highest", "similarity_lowest", "all")},
    "cma": _cma,
    "evolution": lambda s, f, o: EvolutionSearch(make_space(s, f), **_seeded(s, {"start": s.start, **o})),
    "random": lambda s, f, o: RandomSearch(make_space(s, f), **_seeded(s, {"start": s.start, **o})),
    "grid": lambda s, f, o: GridSearch(make_space(s, f), **o),
    "tpe": lambda s, f, o: TpeSearch(make_space(s, f), **_seeded(s, {"start": s.start, **o})),
    "recycling": lambda s, f, o: RecyclingSearch(s.members, **_seeded(s, o)),
    "kinship_greedy": lambda s, f, o: KinshipGreedySearch(s.members, **{"kinship": f.kinship, "base": s.base, **o}),
    "map": _map,
    "dataflow": _dataflow,
}  # fmt: skip
