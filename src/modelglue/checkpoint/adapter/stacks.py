"""Low-rank updates of parameters that are no module's weight: which update belongs to which parameter, and which way round."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from modelglue.checkpoint.adapter.changes import Layout
from modelglue.checkpoint.adapter.config import LAYOUT_KEY
from modelglue.checkpoint.adapter.folder import Adapter, Part, Update
from modelglue.checkpoint.protocol import Checkpoint, TensorInfo
from modelglue.errors import CheckpointError

Way = Literal["out_in", "in_out"]
#: what goes into an expert is registered before what comes out, in every model that keeps stacks
_REGISTERED = ("gate_up", "gate", "up", "down")


#: a parameter of live models that holds all experts -> what its rows are called where each expert stands on the disk by itself
_PIECES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_EXPERT = re.compile(r"(?P<module>.+)\.0\.(gate_proj|up_proj|down_proj|w[123])\.weight")


@dataclass(frozen=True)
class Fused:
    """A parameter (experts, out, in) that the base holds in pieces: tensor -> the rows of one expert that it is."""

    info: TensorInfo
    pieces: Mapping[str, Part]


def modules_of_experts(names: Iterable[str]) -> set[str]:
    """The modules whose experts stand on the disk one by one."""
    return {match["module"] for name in names if (match := _EXPERT.fullmatch(name))}


def fused_parameters(base: Checkpoint, names: Set[str], module: str) -> dict[str, Fused]:
    """The parameters of `module` that live models make of the tensors of its experts, by name."""
    found = {}
    for parameter, spellings in _PIECES.items():
        for parts in spellings:
            experts = next(count for count in itertools.count() if f"{module}.{count}.{parts[0]}.weight" not in names)
            tensors = [[f"{module}.{expert}.{part}.weight" for part in parts] for expert in range(experts)]
            if not experts or not all(name in names for row in tensors for name in row):
                continue
            rows = [base.info(name).shape[0] for name in tensors[0]]
            shapes = {base.info(name).shape for row in tensors for name in row}
            if len(shapes) == 1 and len(base.info(tensors[0][0]).shape) == 2:
                info = TensorInfo((experts, sum(rows), base.info(tensors[0][0]).shape[1]), base.info(tensors[0][0]).dtype)
                pieces = {
                    name: Part(expert, experts, rows[0] * position, rows[0] * (position + 1))
                    for expert, row in enumerate(tensors)
                    for position, name in enumerate(row)
                }
                found[f"{module}.{parameter}"] = Fused(info, pieces)
    return found


def lay_on_parameters(
    adapter: Adapter, module: str, updates: Sequence[Update], infos: Mapping[str, TensorInfo], fused: Set[str]
) -> tuple[list[tuple[str, Layout]], str | None]:
    """The parameter and the layout of each update (innermost first), and a warning where the shapes alone did not tell.

    The file does not name the parameters; the one that was registered first is innermost. Experts of one module are all stored the same
    way round, (experts, out, in) or (experts, in, out); it is the first where they are `fused` from tensors of single experts.
    CheckpointError where nothing fits, or too much.
    """
    possible: tuple[Way, ...] = ("out_in",) if fused else ("out_in", "in_out")
    ways = [
        (way, pairs)
        for order in itertools.permutations(infos)
        for way in possible
        if (pairs := _laid(adapter, order, updates, infos, way)) is not None
    ]
    if not ways:
        shapes = ", ".join(f"{list(adapter.info(update.A).shape)} and {list(adapter.info(update.B).shape)}" for update in updates)
        tensors = ", ".join(f"'{name}' of shape {list(info.shape)}" for name, info in infos.items())
        raise CheckpointError(
            f"{adapter.path}: '{module}' has factors of shapes {shapes}, which do not fit {tensors}. "
            "Give the base that the adapter was trained on."
        )
    order = _order(adapter, module, [[name for name, _ in pairs] for _, pairs in ways])
    options = {way: pairs for way, pairs in ways if [name for name, _ in pairs] == order}
    distinct = {tuple(pairs) for pairs in options.values()}
    if len(distinct) == 1:
        return list(distinct.pop()), None
    chosen = adapter.config.expert_layout
    if chosen is None:
        raise CheckpointError(
            f"{adapter.path}: '{order[0]}' is a stack of square matrices, so its shape does not tell whether it is stored (experts, out, "
            f'in) or (experts, in, out). Say which in {adapter.path.name}/adapter_config.json: "{LAYOUT_KEY}": "out_in" or "in_out". '
            "It is out_in for what newer PEFT writes, unless the model flags its experts as transposed."
        )
    warning = f"{adapter.path}: '{order[0]}' is taken as stored {chosen.replace('_', ', ')}, as {LAYOUT_KEY} says."
    return next(pairs for way, pairs in options.items() if way == chosen), warning


def _laid(
    adapter: Adapter, order: Sequence[str], updates: Sequence[Update], infos: Mapping[str, TensorInfo], way: Way
) -> list[tuple[str, Layout]] | None:
    pairs: list[tuple[str, Layout]] = []
    for name, update in zip(order, updates, strict=True):
        layout = _layout(infos[name], adapter.info(update.A), adapter.info(update.B), way)
        if layout is None:
            return None
        pairs.append((name, layout))
    return pairs


def _layout(info: TensorInfo, A: TensorInfo, B: TensorInfo, way: Way) -> Layout | None:
    """How the factors lie on a parameter of this shape, a stack taken this way round; None if they do not fit."""
    if len(A.shape) != 2 or len(B.shape) != 2:
        return None
    out, into = B.shape[0], A.shape[1]
    if len(info.shape) == 2:
        return "plain" if info.shape == (out, into) else None
    if len(info.shape) != 3 or info.shape[0] == 0 or A.shape[0] % info.shape[0]:
        return None
    if way == "out_in":
        return "experts" if info.shape[1:] == (out, into) else None
    return "experts_transposed" if info.shape[1:] == (into, out) else None


def _order(adapter: Adapter, module: str, fitting: Sequence[list[str]]) -> list[str]:
    """The one order that fits, or of several the one in which the parameters are registered."""
    orders = [list(order) for order in dict.fromkeys(map(tuple, fitting))]
    if len(orders) == 1:
        return orders[0]
    places = {name: _registered(name) for name in orders[0]}
    usual = sorted(orders[0], key=lambda name: places[name])
    if usual in orders and len(set(places.values())) == len(places):
        return usual
    raise CheckpointError(
        f"{adapter.path}: the updates of '{module}' fit its parameters {', '.join(sorted(orders[0]))} in more than one order. "
        "Fold the adapter into its base with PEFT and give the result."
    )


def _registered(name: str) -> int:
    last = name.rpartition(".")[2]
    return next((place for place, word in enumerate(_REGISTERED) if last.startswith(word)), len(_REGISTERED))
