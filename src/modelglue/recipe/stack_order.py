"""Which layers a deeper model has, in order: stacks of models, copies of one, lists of layers, and blocks that begin as the identity."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from modelglue.errors import UserError

_RANGE = re.compile(r"range\(\s*(-?\d+)\s*(?:,\s*(-?\d+)\s*(?:,\s*(-?\d+)\s*)?)?\)")
_LIST = re.compile(r"\[\s*\d+(?:\s*,\s*\d+)*\s*\]")
_COMMA = re.compile(r",(?![^(\[]*[)\]])")
_SLICE = re.compile(r"(\d+):(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class Placed:
    """One layer of the output: layer `number` of the model at position `model`; `silent` ones write nothing into the residual stream."""

    model: int
    number: int
    silent: bool = False


def stacked(depths: Sequence[int], drop: int, *, interleave: bool = False, silent: bool = False) -> list[Placed]:
    """Models on top of each other, the bottom one first. All but the top one lose their last `drop` layers, all but the bottom one their
    first.

    Two copies of one model with L layers are depth up-scaling to 2 (L - drop) layers (SOLAR, arXiv 2312.15166). `interleave` takes
    one layer of each model in turn, and what the longer ones have left at the end. `silent`: the layers of all models but the bottom
    one write nothing. UserError for a model that would give no layer.
    """
    if len(depths) < 2:
        raise UserError("one model is no stack: name two or more, or say how many copies of the one.")
    parts: list[list[Placed]] = []
    for at, depth in enumerate(depths):
        ends = (at > 0) + (at < len(depths) - 1)
        most = (depth - 1) // ends
        if not 0 <= drop <= most:
            both = "at either end" if ends == 2 else "at the top" if at == 0 else "at the bottom"
            raise UserError(f"drop {drop}: model {at + 1} has {depth} layers and loses so many {both}; allowed are 0 to {most}.")
        first, last = (drop if at > 0 else 0), (depth - drop if at < len(depths) - 1 else depth)
        parts.append([Placed(at, number, silent and at > 0) for number in range(first, last)])
    if not interleave:
        return [layer for part in parts for layer in part]
    return [layer for turn in zip_longest(*parts) for layer in turn if layer is not None]


def listed(depth: int, layers: str | Sequence[int | str]) -> list[Placed]:
    """Layers of one model in any order, skipped or repeated: numbers, `a:b` (a to b - 1), `a:b:step`, `range(a, b, step)`, `[a, b]`.

    A text may hold several, with commas between them.
    """
    layers = _COMMA.split(layers) if isinstance(layers, str) else layers
    numbers = [number for one in layers for number in _numbers(one)]
    if not numbers:
        raise UserError("layers: none are named; a model needs one at least.")
    odd = sorted({number for number in numbers if not 0 <= number < depth})
    if odd:
        raise UserError(f"layers: {', '.join(map(str, odd[:5]))}: the model has the layers 0 to {depth - 1}.")
    return [Placed(0, number) for number in numbers]


def expanded(depth: int, *, every: int | None = None, new_layers: int | None = None, spread: bool = False) -> list[Placed]:
    """Block expansion (LLaMA Pro, arXiv 2401.02415): after layer `every` - 1, 2 `every` - 1, ... stands a silent copy of it.

    `new_layers` says how many copies instead, which must divide the number of layers; `spread` lifts that, and puts copy j after
    round((j + 1) depth / new_layers) layers. UserError for what would give no copy, or more copies than layers.
    """
    if (every is None) == (new_layers is None):
        raise UserError("expansion: say either after how many layers a copy follows (every), or how many copies there are (new layers).")
    if every is not None:
        if not 1 <= every <= depth:
            raise UserError(f"every {every}: the model has {depth} layers; allowed are 1 to {depth}.")
        after = set(range(every, depth + 1, every))
    else:
        assert new_layers is not None
        if not 1 <= new_layers <= depth:
            raise UserError(f"{new_layers} new layers: the model has {depth}; allowed are 1 to {depth}.")
        if depth % new_layers and not spread:
            allowed = [number for number in range(1, depth + 1) if depth % number == 0]
            raise UserError(
                f"{new_layers} new layers do not divide the {depth} of the model; allowed are {', '.join(map(str, allowed))}, "
                "and any number up to that where they are spread."
            )
        after = {round((copy + 1) * depth / new_layers) for copy in range(new_layers)}
    found = []
    for number in range(depth):
        found.append(Placed(0, number))
        if number + 1 in after:
            found.append(Placed(0, number, silent=True))
    return found


def runs(order: Sequence[Placed]) -> Iterator[list[Placed]]:
    """The order in as few stretches of consecutive layers of one model, all silent or none, as there are."""
    run: list[Placed] = []
    for layer in order:
        if run and (layer.model, layer.number, layer.silent) != (run[-1].model, run[-1].number + 1, run[-1].silent):
            yield run
            run = []
        run.append(layer)
    if run:
        yield run


def _numbers(layer: int | str) -> Sequence[int]:
    if isinstance(layer, int):
        return [layer]
    text = layer.strip()
    if text.isdecimal():
        return [int(text)]
    if _LIST.fullmatch(text):
        return [int(part) for part in text[1:-1].split(",")]
    found = _SLICE.fullmatch(text) or _RANGE.fullmatch(text)
    if found is None:
        raise UserError(f"layers: '{layer}' is no layer; allowed are numbers, a:b (a to b - 1), a:b:step, range(a, b, step) and [a, b].")
    numbers = [int(part) for part in found.groups() if part is not None]
    if len(numbers) == 3 and numbers[2] == 0:
        raise UserError(f"layers: '{layer}' has a step of 0.")
    return range(*numbers)
