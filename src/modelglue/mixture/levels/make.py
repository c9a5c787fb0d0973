"""A mixture's file becomes a folder: one model where the level joins parts of models, a mixture directory for complete models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, DiskCheckpoint, SaveReport, save
from modelglue.errors import RecipeError, UserError
from modelglue.mixture.deltas import DeltaStore
from modelglue.mixture.folder import Manifest, write_mixture
from modelglue.mixture.layer_gates import HIGH_CONDITION, conditions
from modelglue.mixture.levels.assemble import LevelSpec, deciding_layers, join
from modelglue.mixture.levels.gates import gates_for
from modelglue.mixture.levels.members import Member, members
from modelglue.mixture.levels.recipe import MixRecipe, read_mix
from modelglue.mixture.levels.requirements import Level, best_level, require
from modelglue.mixture.levels.standard import in_standard_class
from modelglue.mixture.router import WITHOUT_PROMPTS
from modelglue.mixture.spec import ExpertSpec, RouterSpec
from modelglue.recipe import Document, Recipe, build
from modelglue.recipe.build import open_reference


@dataclass(frozen=True)
class Complete:
    """What a mixture directory of complete models is made of."""

    experts: tuple[ExpertSpec, ...]
    router: RouterSpec
    encoder: Path | None
    pack: bool
    store: DeltaStore | None = None


@dataclass(frozen=True)
class Prepared:
    """A mixture that is decided and not written yet: an expression where experts are parts of one model, else complete models."""

    level: Level
    why: tuple[str, ...]
    """The levels that `auto` passed by, and why no class of transformers holds the mixture."""
    made: Checkpoint | Complete
    warnings: tuple[str, ...] = ()

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
            directory, made.experts, made.router, encoder=made.encoder, pack=made.pack, store=made.store, overwrite=overwrite
        )
        return Mixed(self, None, manifest)


@dataclass(frozen=True)
class Mixed:
    """What was written: a model, or the manifest of a mixture directory."""

    prepared: Prepared
    saved: SaveReport | None
    manifest: Manifest | None


def mix(
    source: str | Path | Mapping[str, Any] | Document, directory: str | Path, *, folder: Path | None = None, overwrite: bool = False,
    **options: Any,
) -> Mixed:  # fmt: skip
    """Join experts by a file (`MixRecipe`, or a zoo) into `directory`; what `prepare` and `Prepared.write` do, in one call.

    Killed at any moment, it continues when called again; equal files and inputs give equal bytes.
    """
    return prepare(source, folder).write(directory, overwrite=overwrite, **options)


def prepare(source: str | Path | Mapping[str, Any] | Document, folder: Path | None = None) -> Prepared:
    """Read the file, open the experts, choose the level, make the gates. References are taken from `folder` (default: that of the file),
    then from the working folder.

    Everything is checked from headers before a model is loaded. Memory: that of the encoder in float32 while gates are made from
    prompts, nothing of the experts. Raises RecipeError for the file, CheckpointError for a model, UserError for a level that the experts
    do not allow.
    """
    if folder is None and isinstance(source, str | Path):
        folder = Path(source).parent
    document, recipe = read_mix(source, folder)
    opened = _open(document, recipe, folder)
    level, why, shared, merged = _level(document, recipe, opened, folder)
    if level == "model" and not recipe.share_io:
        return Prepared(level, why, _complete(recipe, opened))
    if recipe.store is not None:
        what = f"is for complete models, but the experts are joined at the level {level} (level: auto). Say level: model, or leave it out."
        raise RecipeError(document.fault(("store",), what))
    checkpoint, own, warnings = _inside(document, recipe, level, opened, shared, merged, folder)
    return Prepared(level, (*why, *own), checkpoint, warnings)


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
    document: Document, recipe: MixRecipe, level: Level, opened: Mapping[str, Checkpoint], shared: Checkpoint, merged: Checkpoint | None,
    folder: Path | None,
) -> tuple[Checkpoint, tuple[str, ...], tuple[str, ...]]:  # fmt: skip
    """(the mixture as an expression, why it needs code of its own, what is to be said about it)."""
    base = Member("shared", shared)
    router, routing = recipe.router, recipe.routing or ("token" if level == "ffn" else "sample")
    if recipe.merged_layers >= base.roles.count:
        what = f"is {recipe.merged_layers}; allowed is 0 to {base.roles.count - 1}. With all layers merged there is no mixture: merge."
        raise RecipeError(document.fault(("merged_layers",), what))
    spec = LevelSpec(
        level, routing, top_k=recipe.top_k, merged_layers=recipe.merged_layers, temperature=router.temperature,
        route_span=router.route_span, compat=recipe.compat,
    )  # fmt: skip
    layers = list(deciding_layers(spec, base.roles.count))
    require(level, members(opened), base)
    encoder = shared
    if router.encoder is not None:
        encoder = opened[router.encoder] if router.encoder in opened else open_reference(router.encoder, folder)
    experts = [
        ExpertSpec(one.name, Path(one.name), tuple(one.prompts.positive), tuple(one.prompts.negative), tuple(one.domain))
        for one in recipe.experts
    ]
    gates, mode = gates_for(encoder, experts, router.gate_mode, layers, width=base.width, seed=router.seed)
    decided = recipe.model_copy(update={"level": level, "routing": routing, "router": router.model_copy(update={"gate_mode": mode})})
    description, warnings = decided.described(), tuple(_warnings(gates, mode, len(layers)))
    why: tuple[str, ...] = ()
    if recipe.export != "own":
        try:
            made = in_standard_class(opened, shared, gates, spec, merged=merged, description=description)
            return made, (), warnings
        except UserError as error:
            if recipe.export == "standard":
                raise RecipeError(document.fault(("export",), f"no class of transformers holds this mixture: {error}")) from error
            why = (f"with modelling code of its own: {error}",)
    return join(opened, shared, gates, spec, merged=merged, description=description, donors=[encoder]), why, warnings


def _warnings(gates: Mapping[int, Any], mode: str, layers: int) -> list[str]:
    import torch

    numbers = conditions(torch.stack([gate.weight for gate in gates.values()]))
    high = [number for number in numbers if number > HIGH_CONDITION]
    if not high or mode in WITHOUT_PROMPTS:
        return []
    return [f"the condition number of the gates is above {HIGH_CONDITION:g} in {len(high)} of {layers} layers: the prompts are too alike."]


def _complete(recipe: MixRecipe, opened: Mapping[str, Checkpoint]) -> Complete:
    experts = []
    for one in recipe.experts:
        checkpoint = opened[one.name]
        if not isinstance(checkpoint, DiskCheckpoint):
            raise UserError(f"expert '{one.name}': at the level model an expert is a folder. Merge it first, and give that folder.")
        prompts = one.prompts
        experts.append(ExpertSpec(one.name, checkpoint.path, tuple(prompts.positive), tuple(prompts.negative), tuple(one.domain)))
    router = recipe.router
    spec = RouterSpec(
        gate_mode=router.gate_mode, router_layer="auto" if router.router_layer is None else router.router_layer,
        temperature=router.temperature, route_span=router.route_span, seed=router.seed, top_k=recipe.top_k, combine=recipe.combine,
    )  # fmt: skip
    encoder = None
    if router.encoder is not None:
        encoder = next((expert.path for expert in experts if expert.name == router.encoder), Path(router.encoder))
    return Complete(tuple(experts), spec, encoder, recipe.pack, recipe.store)
