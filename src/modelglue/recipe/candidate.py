"""What a search proposes and an evaluator scores; the two meet here and nowhere else.

A search hands an evaluator a `Candidate` (a recipe over aliases) and a `Plan` (which items), and gets `Scores` back, item by item.
Larger is better everywhere: an evaluator that measures a loss returns its negative.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, get_args

from modelglue.errors import UserError

#: weights below this are no weights: 1e-6 is the resolution of a candidate's key
_NO_WEIGHT = 5e-7
_DECIMALS = 6

#: what an evaluator can do:
#: E0 one number per candidate; E1 one per task; E2 one per item, under stable ids; E3 any items that are asked for;
#: E4 a loss besides the score
Level: TypeAlias = Literal["E0", "E1", "E2", "E3", "E4"]
LEVELS: tuple[Level, ...] = get_args(Level)
#: `invalid`: the candidate's answers are no numbers, or it is no model; `failed`: it could not be scored (memory, time, an exception);
#: `pruned`: it was given up on, and the items that it has are a prefix
Status: TypeAlias = Literal["ok", "invalid", "failed", "pruned"]
#: the method of a recipe that is a path through layers: `base` gives what is in no layer, `hops` are {model, layer, scale}
DATA_FLOW = "data_flow"
#: item id of tasks that give one number and have no items
WHOLE = "*"


@dataclass(frozen=True)
class Candidate:
    """A merge of zoo members that has not been built: a recipe in our dialect in which aliases stand for models.

    Two candidates are equal if their recipes are, to the last digit; `key` is what they are remembered by.
    """

    text: str
    """The recipe as JSON with sorted keys and exact numbers."""

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Candidate:
        """Any recipe: method, models (aliases or recipes), base, slices, parameters with gradients and filters. UserError for no JSON.

        Whether the recipe can be obeyed is for the one who builds it to say.
        """
        try:
            return cls(json.dumps(recipe, sort_keys=True, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"a candidate's recipe must be plain data with finite numbers: {error}.") from error

    @classmethod
    def linear(cls, weights: Mapping[str, float]) -> Candidate:
        """The linear merge with these coefficients, normalised, without those that are 0; members keep the mapping's order.

        UserError unless the weights are finite and their sum is not 0.
        """
        total = sum(weights.values())
        if not math.isfinite(total) or abs(total) < _NO_WEIGHT * max(map(abs, weights.values()), default=0.0) or total == 0:
            raise UserError(f"the weights {dict(weights)} cannot be normalised; a candidate needs finite weights that do not sum to 0.")
        kept = {alias: weight for alias, weight in weights.items() if abs(weight / total) >= _NO_WEIGHT}
        total = sum(kept.values())
        return cls.of({"method": "linear", "models": [{"model": alias, "weight": weight / total} for alias, weight in kept.items()]})

    @classmethod
    def single(cls, alias: str) -> Candidate:
        """One member as it is: the same candidate as the linear merge with all weight on it."""
        return cls.linear({alias: 1.0})

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe as data; treat it as read-only."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def method(self) -> str:
        return str(self.recipe["method"])

    @cached_property
    def aliases(self) -> tuple[str, ...]:
        """Every model that the recipe names, each once: models in the recipe's order, then bases and the rest."""
        return tuple(dict.fromkeys([*self.members, *_named(self.recipe)]))

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The models that are merged, each once, in the recipe's order; a base is none."""
        return tuple(dict.fromkeys(_merged(self.recipe)))

    @property
    def weights(self) -> tuple[float, ...]:
        """Coefficient of every member of a plain linear merge. UserError for any other recipe."""
        if not self.is_linear:
            raise UserError(f"a candidate with the method '{self.method}' has no list of coefficients.")
        return tuple(float(entry["weight"]) for entry in self.recipe["models"])

    @property
    def is_linear(self) -> bool:
        """Whether this is a flat linear merge, which its coefficients say all about."""
        recipe = self.recipe
        return (
            self.method == "linear"
            and recipe.keys() == {"method", "models"}
            and all(set(entry) == {"model", "weight"} and isinstance(entry["model"], str) for entry in recipe["models"])
            and all(isinstance(entry["weight"], int | float) for entry in recipe["models"])
            and len(self.members) == len(recipe["models"])
        )

    @property
    def alone(self) -> str | None:
        """The alias, if this is one member as it is."""
        return self.members[0] if self.is_linear and self.weights == (1.0,) else None

    @property
    def key(self) -> str:
        """Canonical JSON: equal recipes, equal keys. Numbers are rounded to 1e-6, so 1 and 1.0 are one number."""
        return self.key_over({})

    def key_over(self, names: Mapping[str, str]) -> str:
        """The key with other names for the models, such as hashes of their contents; aliases that `names` lacks stay."""
        return json.dumps(_rounded(_renamed(self.recipe, names)), sort_keys=True)

    def over(self, names: Mapping[str, Any]) -> Candidate:
        """The same with references, or whole recipes, in place of aliases; those that `names` lacks stay."""
        return Candidate.of(_renamed(self.recipe, names))

    def describe(self) -> str:
        """A few words for people."""
        if self.alone is not None:
            return self.alone
        if self.is_linear:
            return " + ".join(f"{weight:.4g} {alias}" for alias, weight in zip(self.members, self.weights, strict=True))
        return f"{self.method} of {', '.join(self.members)}"


#: keys of a recipe under which models stand
_OF_MODELS = ("model", "base")


def _named(node: Any) -> Iterator[str]:
    """Every alias below a node of a recipe."""
    if isinstance(node, list):
        for part in node:
            yield from _named(part)
    elif isinstance(node, Mapping):
        for key, part in node.items():
            if key in _OF_MODELS and isinstance(part, str):
                yield part
            elif key != "parameters":
                yield from _named(part)


def _merged(recipe: Mapping[str, Any]) -> Iterator[str]:
    """The aliases that a recipe merges, those of recipes inside it too."""
    modules = recipe.get("modules", {}).values()
    slices = [part for owner in (recipe, *modules) for part in owner.get("slices", [])]
    for owner in (recipe, *modules, *slices):
        for entry in [*owner.get("models", []), *owner.get("hops", [])]:
            if isinstance(entry["model"], str):
                yield entry["model"]
            else:
                yield from _merged(entry["model"])


def _renamed(node: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_renamed(part, names) for part in node]
    if isinstance(node, Mapping):
        return {
            key: names.get(part, part) if key in _OF_MODELS and isinstance(part, str) else _renamed(part, names)
            for key, part in node.items()
        }
    return node


def _rounded(node: Any) -> Any:
    if isinstance(node, list):
        return [_rounded(part) for part in node]
    if isinstance(node, Mapping):
        return {key: _rounded(part) for key, part in node.items()}
    if isinstance(node, float):
        rounded = round(node, _DECIMALS)
        return int(rounded) if rounded.is_integer() else rounded
    return node


# -- what is asked ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which items of which tasks are scored. The plain plan is everything."""

    items: Mapping[str, tuple[str, ...]] | None = None
    """Task -> item ids; None: all items of all tasks. Tasks that are not named are not scored."""
    seed: int = 0
    """For decoding that draws random numbers; with the item's id it decides them."""

    @classmethod
    def prefix(cls, evaluator: Evaluator, counts: Mapping[str, int], *, seed: int = 0) -> Plan:
        """The first so many items of each task, in the evaluator's order."""
        return cls({task: tuple(evaluator.items(task)[:count]) for task, count in counts.items() if count}, seed)


@dataclass(frozen=True)
class Cost:
    """What a score cost. `items` and `tokens` count what was asked for, whoever computed it and when; the rest is this call's alone."""

    items: int = 0
    tokens: int = 0
    computed: int = 0
    """Items that were computed now; the others were remembered."""
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.items + other.items, self.tokens + other.tokens, self.computed + other.computed, self.seconds + other.seconds
        )  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Outcome of one candidate, item by item: task -> item id -> value, usually in [0, 1]; larger is better.

    Tasks without items have the one item `WHOLE`. A result that is `failed` may have no items; `error` says why.
    """

    items: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()
    status: Status = "ok"
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Task -> item id -> loss (smaller is better), from an evaluator of level E4: it tells apart what scores the same."""
    cost: Cost = field(default=Cost(), compare=False)
    error: str = ""

    def tasks(self) -> dict[str, float]:
        """Mean of every task."""
        return {task: math.fsum(values.values()) / len(values) for task, values in self.items.items()}

    @property
    def mean(self) -> float:
        """Unweighted mean over tasks."""
        means = self.tasks()
        return math.fsum(means.values()) / len(means)

    @property
    def loss(self) -> float | None:
        """Unweighted mean over tasks of the mean loss, if there is one."""
        means = [math.fsum(values.values()) / len(values) for values in self.losses.values() if values]
        return math.fsum(means) / len(means) if means else None

    def only(self, tasks: Sequence[str]) -> Scores:
        """The same outcome on some of the tasks."""
        return Scores({task: self.items[task] for task in tasks}, self.warnings)


#: one thing to score
Request: TypeAlias = tuple[Candidate, Plan]


class Evaluator(Protocol):
    """Candidates in, per-item scores out. Asking twice costs nothing the second time."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks, in order."""

    @property
    def levels(self) -> frozenset[Level]:
        """What this evaluator can do. With E3, plans may name any items; without, only the plan of everything is allowed."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of all that scores depend on besides the candidate: contents of models and items, settings, version."""

    def items(self, task: str) -> Sequence[str]:
        """Ids of the task's items in one fixed shuffled order, so that every prefix is a fair sample; (WHOLE,) where there are none."""

    def evaluate(self, candidate: Candidate, plan: Plan = ...) -> Scores:
        """Scores of the items that the plan names.

        NaN or infinite answers: status `invalid`. Out of memory, time-out, an exception of the evaluator: status `failed` and the error in
        words. Only what no candidate could be scored with is raised (ModelGlueError).
        """

    def evaluate_many(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scores]]:
        """(position in `requests`, scores), as they are done, whatever their order: several at once where there are workers."""


class Scorer(Protocol):
    """The least that can judge candidates: everything of one candidate, at once."""

    @property
    def tasks(self) -> Sequence[str]: ...
    def evaluate(self, candidate: Candidate) -> Scores: ...
