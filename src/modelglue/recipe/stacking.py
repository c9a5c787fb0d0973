"""Deeper models of whole layers: stacks of several models, depth up-scaling and block expansion of one, as ordinary recipes of slices.

Model-GLUE (arXiv 2410.05357) stacks models, SOLAR (arXiv 2312.15166) copies of one, LLaMA Pro (arXiv 2401.02415) inserts copies whose
output projections are zero. All of them are slices: of passthrough where all layers are one model's, of linear where the tensors around
the layers are the mean of several models'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint import Checkpoint, write_bytes_atomic
from modelglue.checkpoint.vocabulary import check_vocabularies
from modelglue.errors import CheckpointError, MergeError, UserError
from modelglue.recipe.build import build_with_warnings, open_reference
from modelglue.recipe.layer_config import LayerSource, layer_fields
from modelglue.recipe.layers import Tower, towers_of
from modelglue.recipe.mergeable import check_architectures, different_functions
from modelglue.recipe.read import read_recipe
from modelglue.recipe.schema import Recipe
from modelglue.recipe.stack_order import Placed, expanded, listed, stacked
from modelglue.recipe.stack_slices import Vocabulary, recipe_of, silencers

#: beside a stack: the tensors that belong to new layers
TRAINABLE_FILE = "trainable_tensors.json"


@dataclass(frozen=True)
class Stack:
    """A deeper model: its recipe, the expression that the recipe means, and what there is to know about it."""

    recipe: Recipe
    checkpoint: Checkpoint
    depth: int
    new_layers: tuple[int, ...]
    """The layers that begin as the identity."""
    new_tensors: tuple[str, ...]
    """Their tensors: those to train first. Empty where there are none."""
    warnings: tuple[str, ...]


def stack(
    models: Sequence[str],
    *,
    drop: int = 0,
    copies: int | None = None,
    interleave: bool = False,
    identity_start: bool = False,
    layers: str | Sequence[int | str] = (),
    every: int | None = None,
    new_layers: int | None = None,
    spread: bool = False,
    vocabulary: Vocabulary | None = None,
    allow_pattern_break: bool = False,
    resolve: Callable[[str], Checkpoint] | None = None,
) -> Stack:
    """A deeper (or shallower) model from the layers of one or more models of one architecture and size.

    Several models, or `copies` of one, are stacked: all but the top one lose their last `drop` layers, all but the bottom one their
    first; `interleave` takes one layer of each in turn. Embedding, final norm and head are the mean of the models'. With `identity_start`
    the layers of all but the bottom model write nothing at first, and what stands around the layers is the bottom model's, so that the
    stack computes what the bottom model without its dropped layers computes.

    One model may instead give `layers` in any order (numbers, `a:b`, `a:b:step`), or be expanded by copies that write nothing, one after
    each `every` layers or `new_layers` in all (`spread` where they do not divide its depth). Models that number tokens differently need
    a `vocabulary`: that of the first, or the union.

    Config and tokenizer are the first model's, with everything that is said per layer moved along; a rule by layer number that the new
    order breaks is refused, unless `allow_pattern_break`. Reads headers, configs and tokenizers only; layers that stand there twice
    are stored twice. `resolve` opens references (a search or a test has its models open).

    Raises UserError for numbers that do not fit the models, CheckpointError for a model whose layers or output projections are not known,
    MergeError for models of different architectures, sizes or vocabularies.
    """
    one_model = bool(layers) or every is not None or new_layers is not None
    _check_combination(
        models, copies, one_model, [bool(layers), every is not None, new_layers is not None], drop, interleave, identity_start
    )
    if spread and new_layers is None:
        raise UserError("spread is for a number of new layers (new_layers).")
    references = list(models) * (copies or 1)
    opened = {name: (resolve or (lambda reference: open_reference(reference, None)))(name) for name in dict.fromkeys(references)}
    towers = _towers(opened)
    depths = [towers[name].count for name in references]
    if layers:
        order = listed(depths[0], layers)
    elif one_model:
        order = expanded(depths[0], every=every, new_layers=new_layers, spread=spread)
    else:
        order = stacked(depths, drop, interleave=interleave, silent=identity_start)
    _check_models(opened, towers, vocabulary)
    _check_rules(opened, towers, references, order, allow_pattern_break)
    recipe = read_recipe(recipe_of(references, towers, order, silencers(opened, towers, references, order), vocabulary))
    built = build_with_warnings(recipe, opened.__getitem__)
    silent = [at for at, layer in enumerate(order) if layer.silent]
    starts = tuple(f"{towers[references[0]].stack}.{at}." for at in silent)
    new = tuple(name for name in built.checkpoint.names() if name.startswith(starts)) if starts else ()
    functions = different_functions(list(opened.values()), list(opened))
    warnings = tuple(dict.fromkeys([*recipe.warnings, *built.warnings, *functions]))
    return Stack(recipe, built.checkpoint, len(order), tuple(silent), new, warnings)


def write_trainable(made: Stack, folder: Path) -> None:
    """Name the tensors of the new layers beside a written stack, in TRAINABLE_FILE; nothing where no layer begins as the identity."""
    if made.new_tensors:
        text = json.dumps({"tensors": list(made.new_tensors)}, indent=1) + "\n"
        write_bytes_atomic(folder / TRAINABLE_FILE, text.encode())


def _check_combination(
    models: Sequence[str],
    copies: int | None,
    one_model: bool,
    ways: Sequence[bool],
    drop: int,
    interleave: bool,
    identity_start: bool,
) -> None:
    faults = []
    if not models:
        faults.append("no model is named; a stack needs one at least.")
    if copies is not None and copies < 2:
        faults.append(f"copies {copies}: allowed are 2 and more.")
    if sum(ways) > 1:
        faults.append(
            "a list of layers, copies after every so many layers, and a number of new layers exclude each other. Say one of them."
        )
    if one_model and (len(models) > 1 or copies is not None):
        faults.append("layers and new layers are those of one model. Name one, without copies.")
    if one_model and (drop or interleave or identity_start):
        faults.append("drop, interleave and identity start are for stacks of several models, or of copies.")
    if len(models) > 1 and copies is not None:
        faults.append("copies are of one model. Name one, or the models in the order in which they are stacked.")
    if len(models) == 1 and not one_model and copies is None:
        faults.append("one model is no stack. Name a second one, or say copies, layers, every or new layers.")
    if faults:
        raise UserError("\n".join(faults))


def _towers(opened: Mapping[str, Checkpoint]) -> dict[str, Tower]:
    """The one stack of layers of every model; CheckpointError names all that have none, or several."""
    found, faults = {}, []
    for name, model in opened.items():
        towers = towers_of(model.names(), model.config)
        if len(towers) > 1:
            faults.append(
                f"{name}: has several parts with layers of their own ({', '.join(one.name for one in towers)}). Write a recipe of slices."
            )
        elif not towers[0].count:
            faults.append(f"{name}: has no layers: no tensors' names are numbered 0, 1, ... without a gap.")
        else:
            found[name] = towers[0]
    if faults:
        raise CheckpointError("\n".join(faults))
    return found


def _check_models(opened: Mapping[str, Checkpoint], towers: Mapping[str, Tower], vocabulary: Vocabulary | None) -> None:
    """MergeError unless layers of all models fit into the first one."""
    first, *others = opened
    check_architectures(list(opened.values()))
    known = _shapes(opened[first], towers[first])
    faults = []
    for name in others:
        if towers[name].stack != towers[first].stack:
            faults.append(f"{name}: calls its layers {towers[name].stack}, {first} calls them {towers[first].stack}.")
            continue
        theirs = _shapes(opened[name], towers[name])
        odd = [key for key in sorted({*known, *theirs}) if not theirs.get(key, set()) <= known.get(key, set())]
        if odd:
            said = f"'{odd[0]}' has {_shown(theirs[odd[0]])}, in {first} {_shown(known.get(odd[0], set()))}"
            more = f" (and {len(odd) - 1} more tensors differ)" if len(odd) > 1 else ""
            faults.append(f"{name}: its layers do not fit those of {first}: {said}{more}. Stack models of one size.")
    if faults:
        raise MergeError("\n".join(faults))
    if vocabulary is None:
        try:
            check_vocabularies(list(opened.values()), None, list(opened))
        except MergeError as error:
            raise MergeError(f"{error} A stack takes `vocabulary` for that: first or union.") from error


def _shapes(model: Checkpoint, tower: Tower) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for layer in tower.layers:
        for name in layer:
            found.setdefault(tower.general(name), set()).add(model.info(name).shape)
    return found


def _shown(shapes: set[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in sorted(shapes)) or "nothing"


def _check_rules(
    opened: Mapping[str, Checkpoint], towers: Mapping[str, Tower], references: Sequence[str], order: Sequence[Placed], allowed: bool
) -> None:
    """UserError for rules by layer number that the new order breaks; the recipe warns of them, too."""
    first = references[0]
    sources = [LayerSource(opened[references[layer.model]].config, layer.number) for layer in order]
    _, odd = layer_fields(opened[first].config, towers[first], "text", sources)
    if odd and not allowed:
        raise UserError("\n".join(f"{first}: {text}" for text in odd) + "\nChoose layers that keep the rule, or allow a broken pattern.")
