"""A mixture's file becomes a folder: one model where the level joins parts of models, a mixture directory for complete models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, DiskCheckpoint, SaveReport, save, yaml_text
from modelglue.checkpoint.output.writer import renamed
from modelglue.checkpoint.reference import reference_from
from modelglue.errors import RecipeError, UserError
from modelglue.mixture.deltas import DeltaStore
from modelglue.mixture.folder import Manifest, write_mixture
from modelglue.mixture.layer_gates import HIGH_CONDITION, conditions
from modelglue.mixture.levels.assemble import LevelSpec, deciding_layers, join
from modelglue.mixture.levels.learning import Learning, Scorer
from modelglue.mixture.levels.members import Member, members
from modelglue.mixture.levels.recipe import MixRecipe, MixRouter, read_mix
from modelglue.mixture.levels.requirements import Level, best_level, require
from modelglue.mixture.levels.standard import in_standard_class
from modelglue.mixture.router import WITHOUT_PROMPTS
from modelglue.mixture.spec import ExpertSpec, RouterSpec
from modelglue.mixture.trained import TrainedRouter
from modelglue.recipe import Document, Recipe, build
from modelglue.recipe.build import open_reference


@dataclass(frozen=True)
class Complete:
    """What a mixture directory of complete models is made of."""

    experts: tuple[ExpertSpec, ...]
    router: RouterSpec
    encoder: Path | None
    pack: bool
    store: DeltaStore | None
    trained: TrainedRouter | None
    """A router that was learned; then prompts are not read."""
    recipe: MixRecipe
    """What was decided."""
    places: Mapping[str, Sequence[Path]]
    """Reference -> where its model lies."""

    def recipe_text(self, directory: Path) -> str:
        """The recipe as it stands in `directory`, whose references are seen from there."""
        return yaml_text(renamed(self.recipe.described(), {name: reference_from(name, at, directory) for name, at in self.places.items()}))


@dataclass(frozen=True)
class Prepared:
    """A mixture that is decided and not written yet: an expression where experts are parts of one model, else complete models."""

    level: Level
    why: tuple[str, ...]
    """The levels that `auto` passed by, and why no class of transformers holds the mixture."""
    made: Checkpoint | Complete
    warnings: tuple[str, ...] = ()
    learned: Mapping[str, Any] | None = None
    """What came of learning the router from scores (`used`, `message`, `training`), where the file asks for it."""

    @property
    def model_class(self) -> str | None:
        """None for complete models."""
        return None if isinstance(self.made, Complete) else str(self.made.config["architectures"][0])

    def write(self, directory: str | Path, *, overwrite: bool = False, **options: Any) -> Mixed:
        """Write it. `options` go to `save` (workers, memory, shard_bytes, progress), where one model is written."""
        if isinstance(self.made, Checkpoint):
            return Mixed(self, save(self.made, directory, overwrite=overwrite, **options), None)
        made = self.made
        manifest = write_mixture(
            directory,
            made.experts,
            made.router,
            encoder=made.encoder,
            trained=made.trained,
            pack=made.pack,
            store=made.store,
            recipe=made.recipe_text(Path(directory)),
            overwrite=overwrite,
        )
        return Mixed(self, None, manifest)


@dataclass(frozen=True)
class Mixed:
    """What was written: a model, or the manifest of a mixture directory."""

    prepared: Prepared
    saved: SaveReport | None
    manifest: Manifest | None


def mix(
    source: str | Path | Mapping[str, Any] | Document, directory: str | Path, *, folder: Path | None = None, scorer: Scorer | None = None,
    overwrite: bool = False, **options: Any,
) -> Mixed:  # fmt: skip
    """Join experts by a file (`MixRecipe`, or a zoo) into `directory`; what `prepare` and `Prepared.write` do, in one call.

    Killed at any moment, it continues when called again; equal files and inputs give equal bytes.
    """
    return prepare(source, folder, scorer).write(directory, overwrite=overwrite, **options)


def prepare(source: str | Path | Mapping[str, Any] | Document, folder: Path | None = None, scorer: Scorer | None = None) -> Prepared:
    """Read the file, open the experts, choose the level, make the gates. References are taken from `folder` (default: that of the file),
    then from the working folder. `scorer` scores the experts where the router is learned from `router.tasks` (`glue.router_scores`).

    Everything is checked from headers before a model is loaded. Memory: that of the encoder in float32 while gates are made from
    prompts, nothing of the experts. Raises RecipeError for the file, CheckpointError for a model, UserError for a level that the experts
    do not allow.
    """
    if folder is None and isinstance(source, str | Path):
        folder = Path(source).parent
    document, recipe = read_mix(source, folder)
    opened = _open(document, recipe, folder)
    level, why, shared, merged = _level(document, recipe, opened, folder)
    learning = Learning(document, recipe, opened, folder, scorer)
    if level == "model" and not recipe.share_io:
        made, said = _complete(learning, level)
        return Prepared(level, why, made, learned=said)
    if recipe.store is not None:
        what = f"is for complete models, but the experts are joined at the level {level} (level: auto). Say level: model, or leave it out."
        raise RecipeError(document.fault(("store",), what))
    checkpoint, own, warnings, said = _inside(learning, level, shared, merged)
    return Prepared(level, (*why, *own), checkpoint, warnings, said)


def _open(document: Document, recipe: MixRecipe, folder: Path | None) -> dict[str, Checkpoint]:
    """The experts by name; one RecipeError names all that cannot be opened."""
    found, faults = {}, []
    for number, expert in enumerate(recipe.experts):
        try:
            found[expert.name] = _opened(expert.model, folder)
        except UserError as error:
            faults.append(document.fault(("experts", number, "model"), str(error)))
    if faults:
        raise RecipeError("\n".join(faults))
    return found


def _opened(model: str | Recipe, folder: Path | None) -> Checkpoint:
    return open_reference(model, folder) if isinstance(model, str) else build(model, relative_to=folder)


def _level(
    document: Document, recipe: MixRecipe, opened: Mapping[str, Checkpoint], folder: Path | None
) -> tuple[Level, tuple[str, ...], Checkpoint, Checkpoint | None]:
    """(the level, why none before it, the shared model, the merged one where there is one)."""
    own = members(opened)
    if recipe.level == "model" and not recipe.share_io:
        return "model", (), own[0].checkpoint, None
    level, why = (recipe.level, []) if recipe.level != "auto" else best_level(own, own[0])
    try:
        if level != "model" or recipe.share_io:
            require(level, own, own[0])
    except UserError as error:
        raise RecipeError(document.fault(("level",), str(error))) from error
    if level == "model" and not recipe.share_io:
        return level, tuple(why), own[0].checkpoint, None
    merged = _merged(document, recipe, folder) if recipe.merged_layers or recipe.shared == "merged" else None
    if recipe.shared == "merged":
        assert merged is not None
        return level, tuple(why), merged, merged
    if isinstance(recipe.shared, str) and recipe.shared in opened:
        return level, tuple(why), opened[recipe.shared], merged
    try:
        return level, tuple(why), _opened(recipe.shared, folder), merged
    except UserError as error:
        what = f"is no expert ({', '.join(opened)}), and no model: {error}"
        raise RecipeError(document.fault(("shared",), what)) from error


def _merged(document: Document, recipe: MixRecipe, folder: Path | None) -> Checkpoint:
    """The merge that `merged` says, or the uniform average."""
    average: dict[str, Any] = {"method": "linear", "models": [{"model": expert.model, "weight": 1.0} for expert in recipe.experts]}
    try:
        return _opened(Recipe.model_validate(average) if recipe.merged is None else recipe.merged, folder)
    except UserError as error:
        if recipe.merged is not None:
            raise RecipeError(document.fault(("merged",), str(error))) from error
        what = f"the experts cannot be averaged. Say `shared: NAME` with an expert's name, and merged_layers: 0.\n{error}"
        raise RecipeError(document.fault(("shared",), what)) from error


def _inside(
    learning: Learning, level: Level, shared: Checkpoint, merged: Checkpoint | None
) -> tuple[Checkpoint, tuple[str, ...], tuple[str, ...], Mapping[str, Any] | None]:
    """(the mixture as an expression, why it needs code of its own, what is to be said about it, what came of learning its gates)."""
    document, recipe, opened = learning.document, learning.recipe, learning.opened
    base = Member("shared", shared)
    router, routing = recipe.router, recipe.routing or ("token" if level == "ffn" else "sample")
    if recipe.merged_layers >= base.roles.count:
        what = f"is {recipe.merged_layers}; allowed is 0 to {base.roles.count - 1}. With all layers merged there is no mixture: merge."
        raise RecipeError(document.fault(("merged_layers",), what))
    spec = LevelSpec(
        level, routing, top_k=recipe.top_k, merged_layers=recipe.merged_layers, temperature=router.temperature,
        route_span=router.route_span, compat=recipe.compat,
    )  # fmt: skip
    layers = deciding_layers(spec, base.roles.count)
    require(level, members(opened), base)
    encoder = shared
    if router.encoder is not None:
        encoder = opened[router.encoder] if router.encoder in opened else open_reference(router.encoder, learning.folder)
    experts = [
        ExpertSpec(one.name, Path(one.name), tuple(one.prompts.positive), tuple(one.prompts.negative), tuple(one.domain))
        for one in recipe.experts
    ]
    gates, router, said = learning.inside(level, encoder, experts, layers, width=base.width)
    description = recipe.model_copy(update={"level": level, "routing": routing, "router": router}).described()
    warnings = tuple(_warnings(gates, router, len(layers)))
    why: tuple[str, ...] = ()
    if recipe.export != "own":
        try:
            made = in_standard_class(opened, shared, gates, spec, merged=merged, description=description)
            return made, (), warnings, said
        except UserError as error:
            if recipe.export == "standard":
                raise RecipeError(document.fault(("export",), f"no class of transformers holds this mixture: {error}")) from error
            why = (f"with modelling code of its own: {error}",)
    return join(opened, shared, gates, spec, merged=merged, description=description, donors=[encoder]), why, warnings, said


def _warnings(gates: Mapping[int, Any], router: MixRouter, layers: int) -> list[str]:
    import torch

    if router.layer_gates is not None or router.gate_mode in WITHOUT_PROMPTS:
        return []
    numbers = conditions(torch.stack([gate.weight for gate in gates.values()]))
    high = [number for number in numbers if number > HIGH_CONDITION]
    if not high:
        return []
    return [f"the condition number of the gates is above {HIGH_CONDITION:g} in {len(high)} of {layers} layers: the prompts are too alike."]


def _complete(learning: Learning, level: Level) -> tuple[Complete, Mapping[str, Any] | None]:
    """(complete models and their router, what came of learning it)."""
    recipe, router = learning.recipe, learning.router
    experts, places = [], {}
    for one in recipe.experts:
        checkpoint = learning.opened[one.name]
        if not isinstance(checkpoint, DiskCheckpoint):
            raise UserError(f"expert '{one.name}': at the level model an expert is a folder. Merge it first, and give that folder.")
        prompts = one.prompts
        experts.append(ExpertSpec(one.name, checkpoint.path, tuple(prompts.positive), tuple(prompts.negative), tuple(one.domain)))
        places[str(one.model)] = checkpoint.places
    spec = RouterSpec(
        gate_mode=router.gate_mode, router_layer="auto" if router.router_layer is None else router.router_layer,
        temperature=router.temperature, route_span=router.route_span, seed=router.seed, top_k=recipe.top_k, combine=recipe.combine,
    )  # fmt: skip
    encoder = None
    if router.encoder is not None:
        encoder = next((expert.path for expert in experts if expert.name == router.encoder), None) or learning.path(router.encoder)
        places.setdefault(router.encoder, (encoder,))
    found = learning.complete(experts, spec, encoder)
    decided = recipe.model_copy(update={"level": level, "router": found.decided})
    return Complete(tuple(experts), spec, encoder, recipe.pack, recipe.store, found.trained, decided, places), found.said
