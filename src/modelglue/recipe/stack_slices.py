"""An order of layers as a recipe of slices: what is zero in silent layers, and what stands around the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from modelglue.checkpoint import Checkpoint
from modelglue.errors import CheckpointError
from modelglue.recipe.layers import Tower
from modelglue.recipe.residual import silenced
from modelglue.recipe.schema import FORMAT
from modelglue.recipe.stack_order import Placed, runs

Vocabulary = Literal["first", "union"]


def silencers(
    opened: Mapping[str, Checkpoint], towers: Mapping[str, Tower], references: Sequence[str], order: Sequence[Placed]
) -> list[str]:
    """Parts of names that only output projections have, in the layers that are to be silent."""
    writers: set[str] = set()
    for at, number in sorted({(layer.model, layer.number) for layer in order if layer.silent}):
        name, tower = references[at], towers[references[at]]
        start = f"{tower.stack}.{number}."
        inside = [tensor.removeprefix(start) for tensor in tower.layers[number]]
        writers |= {start + tensor for tensor in silenced(inside, opened[name].config, f"{name}, layer {number}")}
    if not writers:
        return []
    every = {name for tower in towers.values() for name in tower.names}
    general = {towers[references[0]].general(name) for name in writers}
    filters = []
    for word in sorted({_word(name) for name in writers}):
        tries = [text for text in (word, f".{word}", f".{word}.") if _fits(text, every, general, towers[references[0]])]
        if not tries:
            raise CheckpointError(
                f"{references[0]}: '{word}' is a part of other tensors' names, too, so no filter tells output projections apart."
            )
        filters.append(tries[0])
    return filters


def _word(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") else parts[-1].removesuffix("_bias")


def _fits(text: str, every: set[str], writers: set[str], tower: Tower) -> bool:
    """Whether a filter finds output projections alone, and all that are called so."""
    found = {tower.general(name) for name in every if text in name}
    word = text.strip(".")
    return found <= writers and {name for name in writers if _word(name) == word} <= found


def recipe_of(
    references: Sequence[str], towers: Mapping[str, Tower], order: Sequence[Placed], filters: Sequence[str], vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """The stack in our dialect. What stands around the layers comes from all models, or, where some layers are silent, from the first."""
    distinct = list(dict.fromkeys(references))
    value: dict[str, Any] = {"format": FORMAT, "method": "passthrough" if len(distinct) == 1 else "linear"}
    if len(distinct) == 1:
        off: dict[str, Any] = {"scale": [{"filter": text, "value": 0.0} for text in filters]}
        value["slices"] = [
            {"models": [{"model": distinct[0], "layers": _ends(run), **(off if run[0].silent else {})}]} for run in runs(order)
        ]
        return value
    mean = not any(layer.silent for layer in order)
    around = {name: float(references.count(name)) for name in distinct} if mean else {distinct[0]: 1.0}
    inside = f"{towers[distinct[0]].stack}."
    slices = []
    for run, edge in _edges(list(runs(order)), [references[layer.model] for layer in order], set(around)):
        name = references[run[0].model]
        own: Any = 1.0
        if edge or run[0].silent:
            zeros = [{"filter": text, "value": 0.0} for text in filters] if run[0].silent else []
            outside = around.get(name, 0.0)
            own = [*zeros, {"filter": inside, "value": 1.0}, {"value": outside}] if zeros or outside != 1 else 1.0
        entries = [{"model": name, "layers": _ends(run), "weight": own}]
        for other in distinct if edge else ():
            if other != name and other in around:
                at = min(run[0].number, towers[other].count - 1)  # a layer of the same kind; it counts for nothing
                weight = [{"filter": inside, "value": 0.0}, {"value": around[other]}]
                entries.append({"model": other, "layers": [at, at + 1], "weight": weight})
        slices.append({"models": entries})
    value["slices"] = slices
    value["parameters"] = {"normalize": mean}
    if vocabulary is not None:
        value["tokenizer"] = {"source": "union" if vocabulary == "union" else {"model": distinct[0]}}
    return value


def _edges(stretches: Sequence[list[Placed]], names: Sequence[str], around: set[str]) -> list[tuple[list[Placed], bool]]:
    """The stretches; the first and the last layer are cut off where other models have a part in what stands around the layers."""
    found = [(run, False) for run in stretches]
    if {names[0]} != around:
        first = found[0][0]
        found[:1] = [(first[:1], True), *([(first[1:], False)] if first[1:] else [])]
    if {names[-1]} != around:
        last, edge = found[-1]
        found[-1:] = [(last[-1:], True)] if edge or not last[:-1] else [(last[:-1], False), (last[-1:], True)]
    return found


def _ends(run: Sequence[Placed]) -> list[int]:
    return [run[0].number, run[-1].number + 1]
