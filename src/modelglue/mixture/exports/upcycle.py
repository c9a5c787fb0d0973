"""Dense models become one sparse model, as mergekit-moe makes it: the base's attention, everybody's feed-forward networks, gates from
prompts; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint import STORE_DTYPES, Checkpoint, RenamedCheckpoint
from modelglue.checkpoint.vocabulary import all_tokens
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.exports.choose import choose
from modelglue.mixture.exports.dense import Dense, dense
from modelglue.mixture.exports.finished import FinishedCheckpoint
from modelglue.mixture.exports.parts import Gates, Parts, check, warnings
from modelglue.mixture.exports.recipe import MoeExpert, MoeRecipe, read_moe_recipe, wanted_export
from modelglue.mixture.exports.streamed import embedding_reader, streamed_reader
from modelglue.mixture.layer_gates import HIGH_CONDITION, conditions, layer_gates, random_gates
from modelglue.mixture.router import WITHOUT_PROMPTS
from modelglue.mixture.spec import ExpertSpec
from modelglue.models import has_tokenizer
from modelglue.recipe import Document


@dataclass(frozen=True)
class Upcycled:
    """The sparse model as an expression, and what is to be said about it."""

    checkpoint: Checkpoint
    export: str
    """The class."""
    warnings: tuple[str, ...]
    conditions: tuple[float, ...]
    """Condition number of every layer's gate."""


def upcycle(source: str | Path | Mapping[str, object] | Document, folder: Path | None = None) -> Upcycled:
    """The sparse model of a mergekit-moe file. References are taken from `folder` (default: that of the file), then the working folder.

    Everything is checked from headers before the base is loaded. Time: one pass of the prompts through the base (none for random
    gates). Memory: one layer of the base in float32 while the gates are made; nothing of the experts.
    Raises RecipeError for the file, CheckpointError for a model, MergeError where they do not fit each other or any export.
    """
    recipe, odd = read_moe_recipe(source)
    if folder is None and isinstance(source, str | Path):
        folder = Path(source).parent
    opened = _open(recipe, folder)
    parts = _parts(recipe, opened)
    check(parts)
    export = choose(parts, wanted_export(recipe))
    gates = _gates(recipe, opened[recipe.base_model], parts)
    numbers = conditions(gates.routed) if len(parts.experts) > 1 else []
    high = [layer for layer, number in zip(parts.sparse_layers, numbers, strict=False) if number > HIGH_CONDITION]
    said = [*odd, *warnings(parts, _unknown_tokens(recipe, opened, parts))]
    if high and recipe.gate_mode not in WITHOUT_PROMPTS:
        said.append(f"the condition number of the gates is above {HIGH_CONDITION:g} in {len(high)} of {parts.shared.layers} layers: "
                    "the prompts are too alike.")  # fmt: skip
    return Upcycled(export.build(parts, gates, recipe.described()), export.name, tuple(said), tuple(numbers))


def _open(recipe: MoeRecipe, folder: Path | None) -> dict[str, Checkpoint]:
    from modelglue.recipe.build import open_reference

    found, faults = {}, []
    for reference in recipe.references:
        try:
            found[reference] = open_reference(reference, folder)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return found


def _parts(recipe: MoeRecipe, opened: Mapping[str, Checkpoint]) -> Parts:
    """All models as dense ones, with what is wrong with any of them in one message."""
    read: dict[str, Dense] = {}
    faults = []
    for reference in recipe.references:
        try:
            read[reference] = dense(opened[reference], reference)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    shared = read[recipe.base_model]
    dtype = STORE_DTYPES[recipe.dtype] if recipe.dtype else shared.checkpoint.info("model.embed_tokens.weight").dtype
    experts = [_finished(read[one.source_model], one, dtype, recipe.seed, number) for number, one in enumerate(recipe.entries)]
    always = experts[len(recipe.experts)] if recipe.shared_experts else None
    return Parts(
        shared, tuple(experts[: len(recipe.experts)]), recipe.experts_per_token, dtype, always,
        gated=always is not None and bool(recipe.shared_experts and recipe.shared_experts[0].positive_prompts),
        gate_dtype=STORE_DTYPES[recipe.weights_dtype],
    )  # fmt: skip


def _finished(model: Dense, entry: MoeExpert, dtype: str, seed: int, stream: int) -> Dense:
    """Its feed-forward networks alone, with noise, scale and dtype."""
    names = model.ffn_names()
    scale = 1.0 if entry.residual_scale is None else entry.residual_scale
    return model.over(
        FinishedCheckpoint(
            RenamedCheckpoint(model.checkpoint, {name: name for name in names}), dtype=dtype, noise=entry.noise_scale or 0.0, seed=seed,
            stream=stream, factors={model.ffn(layer, "down"): scale for layer in range(model.layers)},
        )
    )  # fmt: skip


def _gates(recipe: MoeRecipe, base: Checkpoint, parts: Parts) -> Gates:
    layers = list(parts.sparse_layers)
    specs = [
        ExpertSpec(f"expert{number}", Path(one.source_model), one.positive_prompts or (), one.negative_prompts or ())
        for number, one in enumerate(recipe.entries)
    ]
    specs = specs if parts.gated else specs[: len(recipe.experts)]
    if recipe.gate_mode in WITHOUT_PROMPTS:
        rows = random_gates([spec.name for spec in specs], parts.shared.width, recipe.gate_mode, layers, seed=recipe.seed)
    else:
        if not has_tokenizer(base):
            raise CheckpointError(f"{recipe.base_model}: has no tokenizer, so no gate can be made from prompts. Use gate_mode random.")
        reader = embedding_reader(base) if recipe.gate_mode == "cheap_embed" else streamed_reader(base)
        rows = layer_gates(reader, specs, recipe.gate_mode.removesuffix("_last"), layers)
    rows = rows * recipe.gate_scale
    routed = rows[:, : len(recipe.experts)].contiguous()
    return Gates(routed, rows[:, len(recipe.experts)].contiguous() if parts.gated else None)


def _unknown_tokens(recipe: MoeRecipe, opened: Mapping[str, Checkpoint], parts: Parts) -> Sequence[tuple[Dense, frozenset[str]]]:
    """Tokens of experts that the base, whose tokenizer the mixture has, does not know."""
    known = all_tokens(opened[recipe.base_model])
    found = []
    for model in (*parts.experts, *([parts.always] if parts.always else [])):
        tokens = all_tokens(opened[model.label])
        if known is not None and tokens is not None:
            found.append((model, frozenset(tokens[0]) - frozenset(known[0])))
    return found
