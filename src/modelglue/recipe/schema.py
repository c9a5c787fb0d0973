"""Our recipe dialect: what may stand in a recipe. What it means together is checked in `checks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from modelglue.recipe.document import Document, Place

Format = Literal["modelglue/1"]
FORMAT: Format = "modelglue/1"
#: what a merge is written in: a dtype, that of the base (or first model), or the one to which the inputs' dtypes promote
StoreDtype = Literal["float32", "float16", "bfloat16", "donor", "widest"]


class Origin:
    """Where a recipe was read, and what was odd about it. Equal to every other, so that recipes compare by what they say."""

    def __init__(
        self, document: Document | None = None, place: Place = (), warnings: Sequence[str] = (), notes: Sequence[str] = ()
    ) -> None:
        self.document = document or Document("<recipe>", None, {})
        self.place = place
        self.warnings = tuple(warnings)
        self.notes = tuple(notes)

    def fault(self, place: Place, what: str) -> str:
        return self.document.fault((*self.place, *place), what)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0


class _Part(BaseModel):
    """Strict and immutable, as everything in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Dtype(_Part):
    """Arithmetic and files."""

    compute: Literal["float32"] = "float32"
    store: StoreDtype | None = None
    """Default: the dtype that every tensor has in the base, or in the first model."""


def _kind_of_input(value: Any) -> str:
    if isinstance(value, Source) or (isinstance(value, dict) and "model" in value):
        return "a source"
    return "a recipe" if isinstance(value, dict | Recipe) else "a reference"


#: a model on disk, or a merge that is an input of another merge; told apart by what it is, so that errors speak of one of them
Input = Annotated[
    Annotated[str, Field(min_length=1), Tag("a reference")] | Annotated["Recipe", Tag("a recipe")],
    Discriminator(lambda value: "a recipe" if isinstance(value, dict | Recipe) else "a reference"),
]
#: the same, or one with what is taken of it
Base = Annotated[
    Annotated[str, Field(min_length=1), Tag("a reference")] | Annotated["Recipe", Tag("a recipe")] | Annotated["Source", Tag("a source")],
    Discriminator(_kind_of_input),
]
#: a part of a model: the prefix of its tensors' names, or prefixes and what they become
PartOf = Annotated[
    Annotated[str, Field(min_length=1), Tag("a prefix")] | Annotated[dict[str, str], Field(min_length=1), Tag("prefixes")],
    Discriminator(lambda value: "prefixes" if isinstance(value, dict) else "a prefix"),
]
#: layers a to b - 1
Layers = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=2, max_length=2)]


class Source(_Part):
    """A model, and what is taken of it."""

    model: Input
    part: PartOf | None = None
    """Sub-model: `language_model` serves `language_model.model.norm.weight` as `model.norm.weight`; a mapping renames prefixes."""
    architecture: Annotated[str, Field(min_length=1)] | None = None
    """Class name that counts instead of the one in the model's config."""
    layers: Layers | None = None
    """In slices: [a, b] takes the layers a to b - 1."""

    @property
    def label(self) -> str:
        return self.model if isinstance(self.model, str) else f"({self.model.method} merge)"


class Entry(Source):
    """One input, and its values of the method's per-model parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def own(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PathLayer(Source):
    """A hop of a path: one layer of a model, and what its input is multiplied by."""

    layer: Annotated[int, Field(ge=0, strict=True)]
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class Slice(_Part):
    """A run of output layers, merged from equally long runs of the models' layers."""

    models: Annotated[list[Entry], Field(min_length=1)]
    base: Base | None = None
    """Instead of the recipe's base."""
    parameters: dict[str, Any] = {}


class Module(_Part):
    """One tower of a model that has several (encoder and decoder, text and vision)."""

    models: Annotated[list[Entry], Field(min_length=1)] = []
    slices: Annotated[list[Slice], Field(min_length=1)] = []
    parameters: dict[str, Any] = {}


class Into(_Part):
    """The model of which the merge becomes a part; the rest of it is kept."""

    model: Input
    part: PartOf


def _model_unless(*words: str) -> BeforeValidator:
    """Any other text is the reference of a model."""
    return BeforeValidator(lambda value: {"model": value} if isinstance(value, str) and value not in words else value)


class TokenSource(_Part):
    """A row of a model's embedding: that of the same token, of another one, or of a number."""

    model: Annotated[str, Field(min_length=1)]
    token: str | None = None
    token_id: Annotated[int, Field(ge=0, strict=True)] | None = None


class VocabularyOf(_Part):
    """The vocabulary of one model."""

    model: Annotated[str, Field(min_length=1)]


def _kind_of_source(value: Any) -> str:
    return "a model" if isinstance(value, dict | TokenSource | VocabularyOf) else "a word"


_Zero = Annotated[Literal["zero"], Tag("a word")]
_Row = Annotated[TokenSource, Tag("a model")]
_Which = Annotated[Literal["union", "base"], Tag("a word")]
_Model = Annotated[VocabularyOf, Tag("a model")]


class TokenRule(_Part):
    """What stands in for a token in the models that lack it; with `force`, in all models."""

    source: Annotated[Annotated[_Zero | _Row, Discriminator(_kind_of_source)] | None, _model_unless("zero")] = None
    force: bool = False


class Tokenizer(_Part):
    """The output's vocabulary, to which all models are aligned."""

    source: Annotated[_Which | _Model, Discriminator(_kind_of_source), _model_unless("union", "base")] = "union"
    tokens: dict[str, TokenRule] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1, strict=True)] | None = None


class Recipe(_Part):
    """One merge. `models` and `base` may be recipes in turn, so a merge of merges is one document.

    Exactly one of `models`, `slices`, `modules` and `hops` is given.
    """

    format: Format = FORMAT
    method: str
    base: Base | None = None
    """What task vectors are taken from; for a method without one, the model whose config, tokenizer and dtypes the output takes."""
    models: Annotated[list[Entry], Field(min_length=1)] = []
    slices: Annotated[list[Slice], Field(min_length=1)] = []
    modules: Annotated[dict[str, Module], Field(min_length=1)] = {}
    hops: Annotated[list[PathLayer], Field(min_length=1)] = []
    """Of the method data_flow: the path of a token through layers. Embeddings, final norm and head are those of the base."""
    into: Into | None = None
    parameters: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    dtype: Dtype = Dtype()
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    vocabulary_mismatch: Literal["error", "truncate"] = "error"
    missing: Literal["error", "present", "drop"] = "error"
    shape_mismatch: Literal["error", "skip"] = "error"
    allow_mixed: bool = False

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where the recipe was read."""
        return self._origin

    @property
    def was_read(self) -> bool:
        """Whether it came from a document, and was checked; what is made in Python is checked when it is built."""
        return self._origin.document.value is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What reading the recipe found odd, here and in nested recipes."""
        return self._origin.warnings

    @property
    def notes(self) -> tuple[str, ...]:
        """What the recipe means and does not say."""
        return self._origin.notes

    def with_origin(self, origin: Origin) -> Recipe:
        """The recipe, and those inside it, remembering where they were read."""
        self._origin = origin
        for place, node in self.nested():
            node.with_origin(Origin(origin.document, (*origin.place, *place)))
        return self

    def stretches(self) -> Iterator[Stretch]:
        """Everything that is merged as one, in order: whole models, slices, and those of modules."""
        if self.models:
            yield Stretch((), self.models, None, ((("parameters",), self.parameters),), None, False)
        for number, part in enumerate(self.slices):
            yield _stretch(("slices", number), part, [(("parameters",), self.parameters)], None)
        for name, module in self.modules.items():
            place: Place = ("modules", name)
            above: list[tuple[Place, Mapping[str, Any]]] = [((*place, "parameters"), module.parameters), (("parameters",), self.parameters)]
            if module.models:
                yield Stretch(place, module.models, None, tuple(above), name, False)
            for number, part in enumerate(module.slices):
                yield _stretch((*place, "slices", number), part, above, name)

    def nested(self) -> Iterator[tuple[Place, Recipe]]:
        """The recipes directly inside this one, by their places."""
        for place, source in self.inputs():
            model = source.model if isinstance(source, Source | Into) else source
            if isinstance(model, Recipe):
                yield ((*place, "model") if isinstance(source, Source | Into) else place), model

    def inputs(self) -> Iterator[tuple[Place, str | Recipe | Source | Into]]:
        """Every input by its place: the base comes before the models, `into` after them."""
        if self.base is not None:
            yield ("base",), self.base
        for stretch in self.stretches():
            if stretch.base is not None:
                yield (*stretch.place, "base"), stretch.base
            for number, entry in enumerate(stretch.models):
                yield (*stretch.place, "models", number), entry
        for number, hop in enumerate(self.hops):
            yield ("hops", number), hop
        if self.into is not None:
            yield ("into",), self.into


@dataclass(frozen=True)
class Stretch:
    """A run of layers (or the whole) with its models and the settings that hold for all of them, by their places, innermost first."""

    place: Place
    models: Sequence[Entry]
    base: str | Recipe | Source | None
    shared: tuple[tuple[Place, Mapping[str, Any]], ...]
    module: str | None
    sliced: bool

    def labels(self) -> list[str]:
        """What messages call the models; one that stands there twice is numbered."""
        labels = [entry.label for entry in self.models]
        return [label if labels.count(label) == 1 else f"{label} (number {n})" for n, label in enumerate(labels, 1)]


def _stretch(place: Place, part: Slice, above: Sequence[tuple[Place, Mapping[str, Any]]], module: str | None) -> Stretch:
    shared = (((*place, "parameters"), part.parameters), *above)
    return Stretch(place, part.models, part.base, shared, module, True)
