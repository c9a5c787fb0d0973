"""Data-flow space: the path that a token takes through the layers of several models, as an ordinary checkpoint.

A path is a list of hops: a layer of a model, and a factor for what goes into it (Evolutionary Optimization of Model Merging Recipes,
arXiv 2403.13187). In pre-norm blocks the factors fold into the weights, so no code of its own runs the result.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modelglue.checkpoint import STORE_DTYPES, Checkpoint, JoinedCheckpoint, MergedCheckpoint, RenamedCheckpoint
from modelglue.checkpoint.scaled import ScaledCheckpoint
from modelglue.checkpoint.vocabulary import dressed
from modelglue.errors import CheckpointError, UserError, did_you_mean
from modelglue.methods import get
from modelglue.recipe.candidate import DATA_FLOW
from modelglue.recipe.canonical import canonical
from modelglue.recipe.layer_config import LayerSource, layer_fields
from modelglue.recipe.layers import Tower, towers_of
from modelglue.recipe.residual import fold_factors
from modelglue.recipe.schema import FORMAT, Recipe, Source

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Hop:
    """A layer of a model (by its name among the members); what goes into it is multiplied by `scale` first."""

    model: str
    layer: int
    scale: float = 1.0


@dataclass(frozen=True)
class Folded:
    """A path as a checkpoint, and what its config cannot express."""

    checkpoint: Checkpoint
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FlowSpace:
    """The slots of a search: all layers of all models in order, `repeats` times; a slot is used if its indicator is above 0."""

    depths: Mapping[str, int]
    """Layers of every member, in order."""
    repeats: int = 3

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Every (model, layer) once."""
        return tuple((model, number) for model, depth in self.depths.items() for number in range(depth))

    @property
    def slots(self) -> int:
        return len(self.layers) * self.repeats

    @property
    def most_layers(self) -> int:
        """A cap for what a search may build: one and a half of the deepest member."""
        return int(1.5 * max(self.depths.values()))

    def start(self) -> Floats:
        """[slots]: the first repetition of the first model is on (1), everything else off (-1)."""
        first = next(iter(self.depths.values()))
        return np.where(np.arange(self.slots) < first, 1.0, -1.0)

    def decode(self, indicators: ArrayLike, scales: ArrayLike | None = None) -> tuple[Hop, ...]:
        """The hops of indicators [slots]; none where all slots are off.

        `scales` is one number per slot [slots], or the published matrix [layers, layers]: entry (i, j) scales what goes from layer i to
        layer j (layers counted over all models); the first hop then takes its input as it is.
        """
        I = np.asarray(indicators, dtype=np.float64)  # noqa: E741 - as in the paper
        count = len(self.layers)
        W = np.ones(self.slots) if scales is None else np.asarray(scales, dtype=np.float64)
        if I.shape != (self.slots,) or W.shape not in ((self.slots,), (count, count)):
            raise UserError(
                f"indicators of shape {list(I.shape)} and scales of shape {list(W.shape)}; allowed are [{self.slots}], and [{self.slots}] "
                f"or [{count}, {count}]."
            )
        hops = []
        last: int | None = None
        for slot in np.flatnonzero(I > 0):
            layer = int(slot) % count
            scale = W[slot] if W.ndim == 1 else 1.0 if last is None else W[last, layer]
            hops.append(Hop(*self.layers[layer], float(scale)))
            last = layer
        return tuple(hops)


def depth(checkpoint: Checkpoint) -> int:
    """Layers of a model; CheckpointError for one without a single stack of layers."""
    return _tower(checkpoint, "the model").count


def fold(hops: Sequence[Hop], members: Mapping[str, Checkpoint], donor: str, *, max_layers: int | None = None) -> Folded:
    """The checkpoint of a path: embeddings, final norm, head, config and tokenizer of `donor`, then one layer per hop.

    With c_t = s_1 ... s_t, what writes into the residual stream in hop t is divided by c_t (weights and biases); where c_t is negative,
    the block's norms change their sign, and the final norm where the last c is negative. The same function as the scaled path, up to
    the epsilon of the norms. Reads headers only; layers that are used twice are stored twice.

    UserError for a path that is empty, longer than `max_layers`, or names what is not there, and for a scale that is 0 or not finite;
    CheckpointError for layers that do not fit the donor, and for scales where a block is not known to be pre-norm.
    """
    _check(hops, members, donor, max_layers)
    towers = {name: _tower(model, name) for name, model in members.items()}
    for name in dict.fromkeys(hop.model for hop in hops):
        _fits(members, towers, name, donor)
    home = towers[donor]
    names: dict[str, dict[str, str]] = {name: {} for name in members}
    names[donor] = {name: name for name in home.before} | {home.renumbered(name, len(hops) - home.count): name for name in home.after}
    factors: dict[str, dict[str, float]] = {name: {} for name in members}
    running = 1.0
    for at, hop in enumerate(hops):
        tower = towers[hop.model]
        if hop.layer >= tower.count or hop.layer < 0:
            raise UserError(f"hop {at}: layer {hop.layer} of '{hop.model}'; allowed are 0 to {tower.count - 1}.")
        running *= hop.scale
        rests = {_rest(tower, name, hop.layer): name for name in tower.layers[hop.layer]}
        names[hop.model].update({f"{home.stack}.{at}.{rest}": name for rest, name in rests.items()})
        found = fold_factors(tuple(rests), running, members[hop.model].config, f"{hop.model}, layer {hop.layer}")
        factors[hop.model].update({f"{home.stack}.{at}.{rest}": factor for rest, factor in found.items()})
    if running < 0:
        factors[donor].update(dict.fromkeys(_final_norm(home, donor), -1.0))
    parts = [
        ("", ScaledCheckpoint(RenamedCheckpoint(members[name], names[name]), factors[name]))
        for name in dict.fromkeys([donor, *members])
        if names[name]
    ]
    config = members[donor].config
    sources = [LayerSource(members[hop.model].config, hop.layer) for hop in hops]
    fields, warnings = layer_fields(config, home, "text", sources)
    joined = JoinedCheckpoint(parts, config, _description(hops, members, donor), files=members[donor].files)
    return Folded(dressed(joined, config=fields), tuple(warnings))


def along_hops(recipe: Recipe, resolve: Callable[[str | Recipe], Checkpoint], store: str | None) -> Folded:
    """The path of a recipe. `store` rounds every tensor to a dtype once more; None (or `donor`): as it is stored where it comes from.

    RecipeError with file and line for hops that are none of their models, or do not fit the base.
    """
    names: dict[str, str] = {}
    members: dict[str, Checkpoint] = {}

    def member(node: str | Recipe) -> str:
        key = node if isinstance(node, str) else json.dumps(canonical(node))
        if key not in names:
            names[key] = node if isinstance(node, str) else f"the {node.method} merge (number {len(names) + 1})"
            members[names[key]] = resolve(node)
        return names[key]

    origin = recipe.base.model if isinstance(recipe.base, Source) else recipe.base
    donor = member(recipe.hops[0].model if origin is None else origin)
    try:
        folded = fold([Hop(member(hop.model), hop.layer, hop.scale) for hop in recipe.hops], members, donor)
    except UserError as error:
        raise type(error)("\n".join(_placed(recipe, line) for line in str(error).split("\n"))) from error
    if store not in STORE_DTYPES:
        return folded
    made = folded.checkpoint
    stored = MergedCheckpoint(get("linear"), [made], None, {"weight": [1.0], "normalize": False}, store=store, description=made.describe())
    key = "torch_dtype" if "torch_dtype" in made.config and "dtype" not in made.config else "dtype"
    return Folded(dressed(stored, config={key: store} if made.config else {}), folded.warnings)


def _placed(recipe: Recipe, fault: str) -> str:
    """A fault of a path that a recipe describes, with file and line of the hop that it is about."""
    found = re.match(r"hop (\d+): ", fault)
    return recipe.origin.fault(("hops", int(found[1])) if found else ("hops",), fault[found.end() :] if found else fault)


def _check(hops: Sequence[Hop], members: Mapping[str, Checkpoint], donor: str, max_layers: int | None) -> None:
    if not hops:
        raise UserError("the path uses no layer; a model needs one at least.")
    if max_layers is not None and len(hops) > max_layers:
        raise UserError(f"the path uses {len(hops)} layers, allowed are {max_layers}.")
    for name in dict.fromkeys([donor, *(hop.model for hop in hops)]):
        if name not in members:
            raise UserError(f"'{name}' is not among the models.{did_you_mean(name, members)} Allowed: {', '.join(members)}.")
    running = 1.0
    for at, hop in enumerate(hops):
        running *= hop.scale
        if running == 0 or not math.isfinite(running):
            raise UserError(f"hop {at}: the scales up to here multiply to {running}; allowed are finite numbers other than 0.")


def _tower(checkpoint: Checkpoint, label: str) -> Tower:
    towers = towers_of(checkpoint.names(), checkpoint.config)
    if len(towers) != 1 or towers[0].stack is None:
        parts = ", ".join(tower.name for tower in towers)
        raise CheckpointError(f"{label}: has no single stack of layers (its parts: {parts}); a path goes through one.")
    return towers[0]


def _rest(tower: Tower, name: str, number: int) -> str:
    """The name inside the layer."""
    return name[len(f"{tower.stack}.{number}.") :]


def _layer_shapes(checkpoint: Checkpoint, tower: Tower, number: int) -> dict[str, tuple[int, ...]]:
    return {_rest(tower, name, number): checkpoint.info(name).shape for name in tower.layers[number]}


def _fits(members: Mapping[str, Checkpoint], towers: Mapping[str, Tower], name: str, donor: str) -> None:
    """Every layer of a member is one that the donor could have."""
    own = [_layer_shapes(members[donor], towers[donor], number) for number in range(towers[donor].count)]
    for number in range(towers[name].count) if name != donor else ():
        shapes = _layer_shapes(members[name], towers[name], number)
        if shapes not in own:
            different = sorted(rest for rest in {*shapes, *own[0]} if shapes.get(rest) != own[0].get(rest))
            said = ", ".join(f"{rest} {_shown(shapes.get(rest))} against {_shown(own[0].get(rest))}" for rest in different[:3])
            raise CheckpointError(f"{name}: layer {number} does not fit into '{donor}': {said}. Use models of the same sizes.")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _final_norm(tower: Tower, donor: str) -> list[str]:
    found = [name for name in tower.after if name.endswith(("norm.weight", "ln_f.weight", "norm_f.weight"))]
    if len(found) != 1:
        raise CheckpointError(f"{donor}: has no single final norm, so a path whose scales multiply to less than 0 cannot be folded.")
    return found


def _description(hops: Sequence[Hop], members: Mapping[str, Checkpoint], donor: str) -> dict[str, Any]:
    """The recipe in our dialect."""
    described = {name: model.describe() for name, model in members.items()}
    named = {name: found["model"] if set(found) == {"model"} else found for name, found in described.items()}
    path = [{"model": named[hop.model], "layer": hop.layer, "scale": hop.scale} for hop in hops]
    return {"format": FORMAT, "method": DATA_FLOW, "base": named[donor], "hops": path}
