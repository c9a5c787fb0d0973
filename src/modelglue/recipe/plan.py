"""What is merged with what: every stretch of a recipe becomes one merge of views, with the values of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint import Checkpoint, ParameterSource, RenamedCheckpoint
from modelglue.methods.registry import Method
from modelglue.recipe.checks import filters_of, place_of, sentence
from modelglue.recipe.document import Place
from modelglue.recipe.inputs import Inputs, Node, label_of_input
from modelglue.recipe.layer_config import LayerSource, layer_fields
from modelglue.recipe.layers import DEFAULT, Tower, find_tower, towers_of, unknown_tower
from modelglue.recipe.schema import Recipe, Source, Stretch
from modelglue.recipe.settings import Levels, Spot, distinct_values, evaluate, read_setting
from modelglue.recipe.slicing import Run, cut

#: why no layers are found
_NO_LAYERS = "no tensors' names are numbered 0, 1, ... without a gap"


@dataclass(frozen=True)
class Piece:
    """What becomes one merge. `whole`: of whole models, so that the output is this merge and no other."""

    stretch: Stretch
    models: Sequence[Checkpoint]
    base: Checkpoint | None
    values: ParameterSource
    whole: bool


@dataclass
class Plan:
    """The merges of a recipe, the parts of the donor that are copied, and updates of its config; and what was found on the way."""

    pieces: list[Piece] = field(default_factory=list)
    copied: list[Checkpoint] = field(default_factory=list)
    fields: list[Mapping[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def plan(recipe: Recipe, inputs: Inputs, method: Method) -> Plan:
    """Decide every merge of a recipe. Time: O(tensors x models), and no tensor is read."""
    planner = _Planner(recipe, inputs, method)
    planner.run()
    return planner.out


class _Planner:
    def __init__(self, recipe: Recipe, inputs: Inputs, method: Method) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._method = method
        self._towers: dict[int, tuple[Tower, ...]] = {}
        self._renumbered: set[str] = set()
        self._shapes: dict[int, dict[str, set[tuple[int, ...]]]] = {}
        self.out = Plan()

    def run(self) -> None:
        recipe = self._recipe
        if recipe.models:
            self._whole(next(recipe.stretches()), None, DEFAULT)
        else:
            towers = self._towers_of(self._inputs.view(self._inputs.donor))
            if recipe.modules:
                self._modules(towers)
            elif len(towers) > 1:
                names = ", ".join(tower.name for tower in towers)
                text = f"the model has several parts with layers of their own ({names}); give slices for each under modules:."
                self._fault(("slices",), text)
            else:
                self._sliced(list(recipe.stretches()), towers[0], DEFAULT)
        self._warn_of_filters()

    def _fault(self, place: Place, text: str) -> None:
        self.out.faults.append(self._recipe.origin.fault(place, text))

    def _warn(self, place: Place, text: str) -> None:
        self.out.warnings.append(self._recipe.origin.fault(place, text))

    def _base(self, stretch: Stretch) -> Node | None:
        """The base of a stretch, if the method computes with one."""
        base = stretch.base if stretch.base is not None else self._recipe.base
        return base if self._method.takes_base else None

    # -- towers ---------------------------------------------------------------------------------------------------------

    def _modules(self, towers: Sequence[Tower]) -> None:
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
                if module.slices:
                    self._sliced(stretches, tower, name)
                else:
                    self._whole(stretches[0], tower, name)
        donor = self._inputs.view(self._inputs.donor)
        for tower in towers:
            if tower.name not in mentioned and tower.names:
                label = label_of_input(self._inputs.donor)
                self._warn(("modules",), f"does not say what becomes of '{tower.name}'; it is copied from {label}.")
                self.out.copied.append(RenamedCheckpoint(donor, {name: name for name in tower.names}))

    def _towers_of(self, model: Checkpoint) -> tuple[Tower, ...]:
        if id(model) not in self._towers:
            self._towers[id(model)] = towers_of(model.names(), model.config)
        return self._towers[id(model)]

    def _tower_in(self, model: Checkpoint, tower: Tower, module: str) -> Tower | None:
        """The tower of another model that corresponds to the donor's."""
        towers = self._towers_of(model)
        found = next((one for one in towers if one.name == tower.name), None) or find_tower(module, towers)
        if found is None:
            self._fault(("modules", module) if module != DEFAULT else ("slices",), unknown_tower(tower.name, towers))
        return found

    # -- whole models ---------------------------------------------------------------------------------------------------

    def _whole(self, stretch: Stretch, tower: Tower | None, module: str) -> None:
        """Whole models, or one tower of each."""
        base = self._base(stretch)
        models = [self._inputs.view(entry) for entry in stretch.models] + ([self._inputs.view(base)] if base is not None else [])
        labels = [*stretch.labels(), *([label_of_input(base)] if base is not None else [])]
        if not self._same_depth(stretch, models, labels, tower, module):
            return
        if tower is not None:
            found = [self._tower_in(model, tower, module) for model in models]
            towers = [one for one in found if one is not None]
            if len(towers) < len(found):
                return
            models = [RenamedCheckpoint(model, {name: name for name in one.names}) for model, one in zip(models, towers, strict=True)]
            self._take_the_place_of(tower, towers[0], models[-1 if base is not None else 0], stretch)
        levels = _levels(stretch)
        one = {name: Spot() for name in models[0].names()[:1]}
        spots = one if levels.constant else self._spots(models, towers[0] if tower is not None else None, stretch.place, levels.graded)
        values = self._evaluated(stretch, levels, spots)
        count = len(stretch.models)
        self.out.pieces.append(Piece(stretch, models[:count], models[count] if base is not None else None, values, tower is None))

    def _take_the_place_of(self, tower: Tower, new: Tower, source: Checkpoint, stretch: Stretch) -> None:
        """A whole tower of other models replaces the donor's: its size is compared, its number of layers counts."""
        self._warn_of_sizes(stretch, source, tower)
        if new.count != tower.count:
            self._configure(tower, [LayerSource(source.config, number) for number in range(new.count)])

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

    def _spots(self, models: Sequence[Checkpoint], tower: Tower | None, place: Place, graded: bool) -> dict[str, Spot]:
        """Where every tensor of whole models stands; a bag of tensors without a config has no layers."""
        names = sorted({name for model in models for name in model.names()})
        if all(_is_single_file(model) for model in models):
            return {name: Spot() for name in names}
        towers = (tower,) if tower is not None else self._towers_of(models[-1])
        if graded and tower is None and not any(one.count for one in towers):
            self._warn(place, f"a gradient runs over the layers, and there are none: {_NO_LAYERS}. Its first number counts everywhere.")
        return {name: Spot(max(one.position_of(name) for one in towers)) for name in names}

    # -- slices ---------------------------------------------------------------------------------------------------------

    def _sliced(self, stretches: Sequence[Stretch], tower: Tower, module: str) -> None:
        found = [self._runs(stretch, tower, module) for stretch in stretches]
        good = [runs for runs in found if runs is not None]
        if len(good) < len(found):
            return
        total = sum(models[0].length for models, _ in good)
        layers: list[LayerSource] = []
        for number, (stretch, (models, base)) in enumerate(zip(stretches, good, strict=True)):
            part = cut(models, base, len(layers), total, first=number == 0, last=number == len(good) - 1)
            values = self._evaluated(stretch, _levels(stretch), part.spots)
            self.out.pieces.append(Piece(stretch, part.models, part.base, values, False))
            self._renumbered.update(part.spots)
            self._warn_of_sizes(stretch, part.base or part.models[0], tower)
            layers += part.layers
        self._configure(tower, layers)

    def _configure(self, tower: Tower, layers: Sequence[LayerSource]) -> None:
        """What the donor's config must say of a tower that now has these layers."""
        config = self._inputs.view(self._inputs.donor).config
        fields, warnings = layer_fields(config, tower, "text" if tower.name == DEFAULT else tower.kind, layers)
        self.out.fields.append(fields)
        for text in warnings:
            self._warn(("slices",) if self._recipe.slices else ("modules",), text)

    def _warn_of_sizes(self, stretch: Stretch, source: Checkpoint, tower: Tower) -> None:
        """Tensors of another size than those of the model whose config the output takes."""
        if id(tower) not in self._shapes:
            donor = self._inputs.view(self._inputs.donor)
            found: dict[str, set[tuple[int, ...]]] = {}
            self._shapes[id(tower)] = found
            for name in tower.names:
                found.setdefault(tower.general(name), set()).add(donor.info(name).shape)
        known = self._shapes[id(tower)]
        odd = [name for name in source.names() if source.info(name).shape not in known.get(tower.general(name), {source.info(name).shape})]
        if odd:
            shape, own = list(source.info(odd[0]).shape), " or ".join(str(list(one)) for one in sorted(known[tower.general(odd[0])]))
            more = f" (and {len(odd) - 1} more tensors differ)" if len(odd) > 1 else ""
            label = label_of_input(self._inputs.donor)
            said = f"tensor '{odd[0]}' has shape {shape}, in {label} it has {own}{more}; "
            self._warn(stretch.place, f"{said}the config of {label}, which the output takes, does not fit.")

    def _runs(self, stretch: Stretch, tower: Tower, module: str) -> tuple[list[Run], Run | None] | None:
        """The layers that every model of a slice gives, and those of the base; None where one cannot."""
        found = [
            self._run(entry, entry.layers, tower, module, (*stretch.place, "models", number, "layers"))
            for number, entry in enumerate(stretch.models)
        ]
        base, last = self._base(stretch), None
        if base is not None:
            layers = base.layers if isinstance(base, Source) and base.layers is not None else stretch.models[0].layers
            last = self._run(base, layers, tower, module, (*stretch.place, "base"))
        runs = [run for run in found if run is not None]
        return None if len(runs) < len(found) or (base is not None and last is None) else (runs, last)

    def _run(self, source: Node, layers: Sequence[int] | None, tower: Tower, module: str, place: Place) -> Run | None:
        model = self._inputs.view(source)
        found = self._tower_in(model, tower, module)
        if found is None or layers is None:
            return None
        if layers[1] > found.count:
            has = f"the layers 0 to {found.count - 1}" if found.count else f"no layers: {_NO_LAYERS}"
            self._fault(place, f"is {list(layers)}, but {label_of_input(source)} has {has}.")
            return None
        return Run(model, found, layers[0], layers[1])

    # -- parameters -----------------------------------------------------------------------------------------------------

    def _evaluated(self, stretch: Stretch, levels: Levels, spots: Mapping[str, Spot]) -> ParameterSource:
        values, faults = evaluate(self._method, levels, stretch.labels(), spots)
        for fault, names in faults.items():
            where = f" (tensor '{names[0]}'{f' and {len(names) - 1} more' if len(names) > 1 else ''})" if not levels.constant else ""
            self._fault(place_of(fault, stretch), sentence(fault).removesuffix(".") + where + ".")
        if not faults:
            for text in dict.fromkeys(text for found in distinct_values(values) for text in self._method.odd(found, stretch.labels())):
                self._warn(stretch.place, f"{self._method.id}: {text}")
        return values

    def _warn_of_filters(self) -> None:
        """Filters that match no tensor of any model, under its own name or the output's."""
        filters = list(filters_of(self._recipe))
        if not filters:
            return
        names = {name for model in self._inputs.every() for name in model.names()}
        everything = "\n".join([*names, *self._renumbered])
        for place, text in filters:
            if text not in everything:
                self._warn(place, f"the filter '{text}' matches no tensor.")


def _levels(stretch: Stretch) -> Levels:
    own = [{name: read_setting(raw)[0] for name, raw in entry.own.items()} for entry in stretch.models]
    return Levels(own, [{name: read_setting(raw)[0] for name, raw in level.items()} for _, level in stretch.shared])


def _is_single_file(model: Checkpoint) -> bool:
    return bool(model.places) and not model.config and all(place.is_file() for place in model.places)
