"""The expression of a recipe: open the models, align their vocabularies, cut them into slices, merge, and join what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint import FLOATING, STORE_DTYPES, Checkpoint, JoinedCheckpoint, MergedCheckpoint, ParameterSource, RenamedCheckpoint
from modelglue.checkpoint.vocabulary import (
    Alignment,
    AlignmentReport,
    FromModel,
    FromToken,
    TokenPolicy,
    VocabularyRequest,
    Zero,
    align,
    chat_template,
    check_vocabularies,
    dressed,
    tied_heads,
    truncate,
)  # fmt: skip
from modelglue.errors import RecipeError
from modelglue.methods import get
from modelglue.recipe.canonical import canonical, written_out
from modelglue.recipe.checks import Checks, filters_of, place_of, sentence
from modelglue.recipe.layer_config import LayerSource, layer_fields
from modelglue.recipe.layers import DEFAULT, Tower, find_tower, towers_of, unknown_tower
from modelglue.recipe.mergeable import check_architectures
from modelglue.recipe.parts import part_of, put_into, rest_of
from modelglue.recipe.schema import Into, Recipe, Source, Stretch, TokenSource
from modelglue.recipe.settings import Levels, Spot, distinct_values, evaluate, read_setting
from modelglue.recipe.slicing import Cut, Run, cut

_LONG = {short: name for name, short in STORE_DTYPES.items()}
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Cost:
    """What one merge of a recipe holds at once: `inputs` chunks, or the whole tensor; and whether it reads them more than once."""

    inputs: int
    whole: bool
    surveyed: bool


@dataclass(frozen=True)
class Built:
    """The expression of a recipe, what was found on the way, and what it costs.

    `costs`: of the recipe and of every recipe in it, by `key_of`.
    """

    checkpoint: Checkpoint
    warnings: tuple[str, ...] = ()
    alignment: AlignmentReport | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)


def key_of(recipe: Recipe) -> str:
    """Equal recipes, equal keys."""
    return json.dumps(canonical(recipe))


@dataclass
class _Context:
    """What nested recipes share: every reference is opened once, every nested recipe that stands there twice is built once."""

    resolve: Callable[[str], Checkpoint]
    opened: dict[str, Checkpoint] = field(default_factory=dict)
    nested: dict[str, Checkpoint] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)

    def open(self, reference: str) -> Checkpoint:
        if reference not in self.opened:
            self.opened[reference] = self.resolve(reference)
        return self.opened[reference]

    def build(self, recipe: Recipe) -> Checkpoint:
        key = key_of(recipe)
        if key not in self.nested:
            self.nested[key] = _Assembly(self, recipe, recipe.dtype.store or "float32").run().checkpoint
        return self.nested[key]


def assemble(recipe: Recipe, resolve: Callable[[str], Checkpoint], *, strict: bool = False) -> Built:
    """Turn a recipe into an expression. RecipeError names every fault that only the models' headers show; `strict`: warnings, too."""
    if not recipe.was_read:
        checks = Checks(recipe.origin.document).run(recipe)
        if checks.faults:
            raise RecipeError("\n".join(checks.faults))
    context = _Context(resolve)
    built = _Assembly(context, recipe, recipe.dtype.store).run()
    warnings = tuple(dict.fromkeys(context.warnings))
    if strict and warnings:
        raise RecipeError("\n".join(warnings))
    return Built(built.checkpoint, warnings, built.alignment, context.costs)


@dataclass(frozen=True)
class _Piece:
    """What becomes one merge."""

    stretch: Stretch
    models: Sequence[Checkpoint]
    base: Checkpoint | None
    donor: Checkpoint | None
    values: ParameterSource


class _Assembly:
    """One recipe; the recipes inside it are assembled by their own."""

    def __init__(self, context: _Context, recipe: Recipe, store: str | None) -> None:
        self._context = context
        self._recipe = recipe
        self._store = None if store == "donor" else store
        self._method = get(recipe.method)
        self._faults: list[str] = []
        self._views: dict[str, Checkpoint] = {}
        self._towers: dict[int, tuple[Tower, ...]] = {}
        self._fields: dict[str, Any] = {}
        self._renumbered: set[str] = set()

    def run(self) -> Built:
        self._open()
        alignment = self._align()
        pieces, copied = self._plan()
        self._warn_of_filters()
        if self._faults:
            raise RecipeError("\n".join(dict.fromkeys(self._faults)))
        self._context.costs[key_of(self._recipe)] = self._cost(pieces)
        merged = self._dress(self._join(pieces, copied), alignment)
        if self._recipe.chat_template is not None:
            made = chat_template(self._models(), merged, self._recipe.chat_template)
            self._context.warnings += made.warnings
            merged = dressed(merged, files=made.files)
        return Built(self._put_into(merged), (), alignment.report)

    def _fault(self, place: tuple[str | int, ...], text: str) -> None:
        self._faults.append(self._recipe.origin.fault(place, text))

    def _warn(self, place: tuple[str | int, ...], text: str) -> None:
        self._context.warnings.append(self._recipe.origin.fault(place, text))

    # -- models ---------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        for _, source in self._recipe.inputs():
            if not isinstance(source, Into) and _key(source) not in self._views:
                self._views[_key(source)] = self._opened(source)

    def _opened(self, source: str | Recipe | Source) -> Checkpoint:
        node = source.model if isinstance(source, Source) else source
        model = self._context.open(node) if isinstance(node, str) else self._context.build(node)
        if isinstance(source, Source) and source.part is not None:
            model = part_of(model, source.part, source.label)
        if isinstance(source, Source) and source.architecture is not None:
            names = {name: name for name in model.names()}
            model = RenamedCheckpoint(model, names, {**model.config, "architectures": [source.architecture]})
        return model

    def _view(self, source: str | Recipe | Source) -> Checkpoint:
        return self._views[_key(source)]

    def _model_keys(self) -> list[str]:
        """Every distinct model, in the order of the recipe; the base only where it is one of them."""
        found = [_key(source) for place, source in self._recipe.inputs() if place != ("base",) and not isinstance(source, Into)]
        return list(dict.fromkeys(found))

    def _models(self) -> list[Checkpoint]:
        return [self._views[key] for key in self._model_keys()]

    def _donor(self) -> str | Recipe | Source:
        """The input whose config and tokenizer the output takes: the base, else the first model."""
        return self._recipe.base if self._recipe.base is not None else next(self._recipe.stretches()).models[0]

    def _root(self, source: str | Recipe | Source) -> Checkpoint | None:
        """The model on disk behind a nested donor; None where there is nothing nested."""
        node = source.model if isinstance(source, Source) else source
        if isinstance(node, str):
            return None
        inner = node.base if node.base is not None else next(node.stretches()).models[0]
        return self._root(inner) or self._opened(inner)

    # -- vocabularies ---------------------------------------------------------------------------------------------------

    def _align(self) -> Alignment:
        """Models agree on what the rows of their embeddings mean, or say so; heads that are tied in some models are untied."""
        recipe = self._recipe
        keys, base_key = self._model_keys(), _key(recipe.base) if recipe.base is not None else None
        models, base = [self._views[key] for key in keys], self._views[base_key] if base_key is not None else None
        everything = [*models, *([base] if base is not None else [])]
        for group in [[one] for one in everything] if recipe.allow_mixed else [everything]:
            check_architectures(group)
        labels = [_label(key) for key in [*keys, *([base_key] if base_key is not None else [])]]
        if recipe.tokenizer is not None:
            named = self._store in STORE_DTYPES  # averaged rows are then rounded once, when they are stored
            found = align(models, base, self._request(keys, base_key), labels, widen=named)
        elif recipe.vocabulary_mismatch == "truncate":
            found = truncate(models, base, labels)
        else:
            check_vocabularies(models, base, labels)
            found = Alignment(tuple(models), base)
        self._context.warnings += found.warnings
        heads = tied_heads(found.models, found.base)
        self._views.update(zip(keys, heads.models, strict=True))
        if base_key is not None and heads.base is not None and base_key not in keys:
            self._views[base_key] = heads.base
        self._fields = _merged_fields(found.config, heads.config)
        return found

    def _request(self, keys: Sequence[str], base_key: str | None) -> VocabularyRequest:
        """The tokenizer section, its models by position."""
        section = self._recipe.tokenizer
        assert section is not None
        names: dict[str, int] = {}
        for _, source in self._recipe.inputs():
            node = source.model if isinstance(source, Source) else source
            if isinstance(node, str):
                key = _key(source)  # type: ignore[arg-type]
                names.setdefault(node, keys.index(key) if key in keys else len(keys))

        def row(source: str | TokenSource | None) -> FromModel | FromToken | Zero | None:
            if source is None or isinstance(source, str):
                return None if source is None else Zero()
            if source.token is None and source.token_id is None:
                return FromModel(names[source.model])
            return FromToken(names[source.model], token=source.token, token_id=source.token_id)

        return VocabularyRequest(
            section.source if isinstance(section.source, str) else names[section.source.model],
            {token: TokenPolicy(row(rule.source), rule.force) for token, rule in section.tokens.items()},
            section.pad_to_multiple_of,
        )

    # -- what is merged with what ---------------------------------------------------------------------------------------

    def _plan(self) -> tuple[list[_Piece], list[Checkpoint]]:
        """The merges, and the parts of the donor that are taken as they are."""
        recipe = self._recipe
        if recipe.models:
            return self._whole(next(recipe.stretches()), None, DEFAULT), []
        towers = self._towers_of(self._view(self._donor()))
        if recipe.slices:
            if len(towers) > 1:
                names = ", ".join(tower.name for tower in towers)
                self._fault(
                    ("slices",), f"the model has several parts with layers of their own ({names}); give slices for each under modules:."
                )
                return [], []
            return self._sliced(list(recipe.stretches()), towers[0], DEFAULT), []
        return self._modules(towers)

    def _modules(self, towers: Sequence[Tower]) -> tuple[list[_Piece], list[Checkpoint]]:
        pieces: list[_Piece] = []
        mentioned: dict[str, str] = {}
        for name, module in self._recipe.modules.items():
            tower = find_tower(name, towers)
            if tower is None:
                self._fault(("modules", name), unknown_tower(name, towers))
            elif tower.name in mentioned:
                self._fault(("modules", name), f"is the same part of the model as '{mentioned[tower.name]}': {tower.name}.")
            else:
                mentioned[tower.name] = name
                stretches = [stretch for stretch in self._recipe.stretches() if stretch.module == name]
                pieces += self._sliced(stretches, tower, name) if module.slices else self._whole(stretches[0], tower, name)
        donor = self._view(self._donor())
        copied = [tower for tower in towers if tower.name not in mentioned]
        for tower in copied:
            self._warn(("modules",), f"does not say what becomes of '{tower.name}'; it is copied from {_label(_key(self._donor()))}.")
        return pieces, [RenamedCheckpoint(donor, {name: name for name in tower.names}) for tower in copied if tower.names]

    def _towers_of(self, model: Checkpoint) -> tuple[Tower, ...]:
        if id(model) not in self._towers:
            self._towers[id(model)] = towers_of(model.names(), model.config)
        return self._towers[id(model)]

    def _base(self, stretch: Stretch) -> str | Recipe | Source | None:
        """The base of a stretch, if the method computes with one."""
        base = stretch.base if stretch.base is not None else self._recipe.base
        return base if self._method.takes_base else None

    def _whole(self, stretch: Stretch, tower: Tower | None, module: str) -> list[_Piece]:
        """Whole models, or one tower of each."""
        base = self._base(stretch)
        inputs = [self._view(entry) for entry in stretch.models] + ([self._view(base)] if base is not None else [])
        labels = [*stretch.labels(), *([_label(_key(base))] if base is not None else [])]
        if not self._same_depth(stretch, inputs, labels, tower, module):
            return []
        if tower is not None:
            found = [self._tower_in(model, tower, module) for model in inputs]
            views: list[Checkpoint] = [
                RenamedCheckpoint(model, {name: name for name in one.names})
                for model, one in zip(inputs, found, strict=True)
                if one is not None
            ]
        else:
            views = inputs
        levels = self._levels(stretch)
        spots = {name: Spot() for name in views[0].names()[:1]} if levels.constant else self._spots(views, tower)
        values = self._evaluated(stretch, levels, spots)
        count = len(stretch.models)
        donor = self._donor_of_dtypes() if tower is None else None
        return [_Piece(stretch, views[:count], views[count] if base is not None else None, donor, values)]

    def _donor_of_dtypes(self) -> Checkpoint:
        """Whose dtypes the output has: the donor's; those of the model on disk behind it, where it is a merge in float32."""
        donor = self._view(self._donor())
        root = self._root(self._donor())
        if root is None:
            return donor
        if set(root.names()) == set(donor.names()) and all(root.info(name).shape == donor.info(name).shape for name in root.names()):
            config = {key: value for key, value in donor.config.items() if root.config.get(key) != value and key not in _DTYPE_KEYS}
            return dressed(root, config=config, files=_replacing(root, donor))
        kinds = {root.info(name).dtype for name in root.names()} & FLOATING
        if self._store is None and len(kinds) == 1:
            self._store = _LONG[kinds.pop()]
        return donor

    def _same_depth(self, stretch: Stretch, models: Sequence[Checkpoint], labels: Sequence[str], tower: Tower | None, module: str) -> bool:
        """Whether all models have as many layers; looked at where their tensors differ."""
        first = set(models[0].names())
        if all(set(model.names()) == first for model in models[1:]):
            return True
        counts = []
        for model in models:
            found = self._tower_in(model, tower, module) if tower is not None else max(self._towers_of(model), key=lambda one: one.count)
            if found is None:
                return False
            counts.append(found.count)
        if len(set(counts)) == 1:
            return True
        said = ", ".join(f"{label} has {count}" for label, count in zip(labels, counts, strict=True))
        self._fault((*stretch.place, "models"), f"the models have different numbers of layers: {said}. Say under slices: which to merge.")
        return False

    def _tower_in(self, model: Checkpoint, tower: Tower, module: str) -> Tower | None:
        """The tower of another model that corresponds to the donor's."""
        towers = self._towers_of(model)
        found = next((one for one in towers if one.name == tower.name), None) or find_tower(module, towers)
        if found is None:
            self._fault(("modules", module) if module != DEFAULT else ("slices",), unknown_tower(tower.name, towers))
        return found

    def _spots(self, views: Sequence[Checkpoint], tower: Tower | None) -> dict[str, Spot]:
        """Where every tensor of whole models stands; a bag of tensors without a config has no layers."""
        names = sorted({name for view in views for name in view.names()})
        if all(_is_single_file(view) for view in views):
            return {name: Spot() for name in names}
        towers = (tower,) if tower is not None else self._towers_of(views[-1])
        return {name: Spot(max(one.position_of(name) for one in towers)) for name in names}

    def _sliced(self, stretches: Sequence[Stretch], tower: Tower, module: str) -> list[_Piece]:
        runs = [self._runs(stretch, tower, module) for stretch in stretches]
        if any(found is None for found in runs):
            return []
        good = [found for found in runs if found is not None]
        total = sum(models[0].stop - models[0].start for models, _ in good)
        pieces: list[_Piece] = []
        layers: list[LayerSource] = []
        at = 0
        for number, (stretch, (models, base)) in enumerate(zip(stretches, good, strict=True)):
            part: Cut = cut(models, base, at, total, first=number == 0, last=number == len(good) - 1)
            values = self._evaluated(stretch, self._levels(stretch), part.spots)
            pieces.append(_Piece(stretch, part.models, part.base, None, values))
            self._renumbered.update(part.spots)
            layers += part.layers
            at += models[0].stop - models[0].start
        self._count(tower, layers)
        return pieces

    def _count(self, tower: Tower, layers: Sequence[LayerSource]) -> None:
        """The number of layers, and what else the config says of each, for a tower with these layers."""
        config = self._view(self._donor()).config
        fields, warnings = layer_fields(config, tower, "text" if tower.name == DEFAULT else tower.kind, layers)
        self._fields = _merged_fields(self._fields, fields)
        for text in warnings:
            self._warn(("slices",) if self._recipe.slices else ("modules",), text)

    def _runs(self, stretch: Stretch, tower: Tower, module: str) -> tuple[list[Run], Run | None] | None:
        found = []
        for number, entry in enumerate(stretch.models):
            place = (*stretch.place, "models", number, "layers")
            found.append(self._run(entry, entry.layers, tower, module, place))
        base = self._base(stretch)
        if base is None:
            return None if None in found else ([run for run in found if run is not None], None)
        layers = base.layers if isinstance(base, Source) and base.layers is not None else stretch.models[0].layers
        last = self._run(base, layers, tower, module, (*stretch.place, "base"))
        return None if None in found or last is None else ([run for run in found if run is not None], last)

    def _run(
        self, source: str | Recipe | Source, layers: Sequence[int] | None, tower: Tower, module: str, place: tuple[str | int, ...]
    ) -> Run | None:
        model = self._view(source)
        found = self._tower_in(model, tower, module)
        if found is None or layers is None:
            return None
        if layers[1] > found.count:
            self._fault(place, f"is {list(layers)}, but {_label(_key(source))} has the layers 0 to {found.count - 1}.")
            return None
        return Run(model, found, layers[0], layers[1])

    # -- parameters -----------------------------------------------------------------------------------------------------

    def _levels(self, stretch: Stretch) -> Levels:
        own = [{name: read_setting(raw)[0] for name, raw in entry.own.items()} for entry in stretch.models]
        return Levels(own, [{name: read_setting(raw)[0] for name, raw in level.items()} for _, level in stretch.shared])

    def _evaluated(self, stretch: Stretch, levels: Levels, spots: Mapping[str, Spot]) -> ParameterSource:
        values, faults = evaluate(self._method, levels, stretch.labels(), spots)
        for fault, names in faults.items():
            where = f" (tensor '{names[0]}'{f' and {len(names) - 1} more' if len(names) > 1 else ''})" if not levels.constant else ""
            self._fault(place_of(fault, stretch), sentence(fault).removesuffix(".") + where + ".")
        return values

    def _warn_of_filters(self) -> None:
        """Filters that match no tensor of any model, under its own name or the output's."""
        filters = list(filters_of(self._recipe))
        if not filters:
            return
        names = {name for view in self._views.values() for name in view.names()}
        everything = "\n".join([*names, *self._renumbered])
        for place, text in filters:
            if text not in everything:
                self._warn(place, f"the filter '{text}' matches no tensor.")

    # -- the output -----------------------------------------------------------------------------------------------------

    def _join(self, pieces: Sequence[_Piece], copied: Sequence[Checkpoint]) -> Checkpoint:
        description = written_out(self._recipe)
        alone = len(pieces) == 1 and not copied and pieces[0].donor is not None
        merged = [self._merged(piece, description if alone else None) for piece in pieces]
        for one in merged:
            self._context.warnings += one.warnings
        if alone:
            return merged[0]
        donor = self._view(self._donor())
        parts = [("", one) for one in [*merged, *map(self._stored, copied)]]
        joined = JoinedCheckpoint(parts, donor.config, description)
        dtype = {"torch_dtype" if "torch_dtype" in donor.config and "dtype" not in donor.config else "dtype": self._store}
        return dressed(joined, config=dtype if self._store in STORE_DTYPES and donor.config else None, files=_replacing(joined, donor))

    def _merged(self, piece: _Piece, description: Mapping[str, Any] | None) -> MergedCheckpoint:
        recipe = self._recipe
        return MergedCheckpoint(
            self._method,
            piece.models,
            piece.base,
            piece.values,
            labels=piece.stretch.labels(),
            store=self._store,
            seed=recipe.seed,
            donor=piece.donor,
            least=self._method.min_models,
            missing=recipe.missing,
            shape_mismatch=recipe.shape_mismatch,
            description=description,
        )

    def _cost(self, pieces: Sequence[_Piece]) -> Cost:
        values = [found for piece in pieces for found in distinct_values(piece.values)]
        return Cost(
            max((len(piece.models) + (piece.base is not None) for piece in pieces), default=1),
            any(self._method.unit(found) == "matrix" for found in values),
            any(self._method.rounds(found) for found in values),
        )

    def _stored(self, model: Checkpoint) -> Checkpoint:
        """What is copied, in the dtype of the output."""
        if self._store not in STORE_DTYPES:
            return model
        return MergedCheckpoint(get("linear"), [model], None, {"weight": [1.0], "normalize": False}, store=self._store)

    def _dress(self, merged: Checkpoint, alignment: Alignment) -> Checkpoint:
        return dressed(merged, config=self._fields, files=alignment.files)

    def _put_into(self, merged: Checkpoint) -> Checkpoint:
        into = self._recipe.into
        if into is None:
            return merged
        whole = self._context.open(into.model) if isinstance(into.model, str) else self._context.build(into.model)
        label = into.model if isinstance(into.model, str) else f"the {into.model.method} merge"
        rest = self._stored(rest_of(whole, into.part, label))
        found = put_into(whole, into.part, merged, rest, label)
        return JoinedCheckpoint([("", found)], found.config, written_out(self._recipe), files=whole.files)


def _key(source: str | Recipe | Source) -> str:
    """What tells inputs apart: the reference (or the nested recipe), and what is taken of it."""
    if not isinstance(source, Source):
        source = Source(model=source)
    node = source.model if isinstance(source.model, str) else canonical(source.model)
    return json.dumps([node, source.part, source.architecture])


def _label(key: str) -> str:
    node, part, _ = json.loads(key)
    name = node if isinstance(node, str) else f"({node['method']} merge)"
    return name if part is None else f"{name} ({part if isinstance(part, str) else ', '.join(part)})"


def _is_single_file(model: Checkpoint) -> bool:
    return bool(model.places) and not model.config and all(place.is_file() for place in model.places)


def _replacing(old: Checkpoint, new: Checkpoint) -> dict[str, Any]:
    """Side files that turn those of `old` into those of `new`."""
    if old.files == new.files:
        return {}
    return {**{name: None for name in old.files if name not in new.files}, **new.files}


def _merged_fields(*updates: Mapping[str, Any]) -> dict[str, Any]:
    """Updates of a config one after the other, objects field by field."""
    found: dict[str, Any] = {}
    for update in updates:
        for key, value in update.items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = _merged_fields(found[key], value) if both else value
    return found
