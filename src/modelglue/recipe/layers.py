"""Which tensors are the layers of a model, told from their names: no list of architectures.

A stack is a repeated block, `model.layers.0` to `model.layers.31`: the first part of a name that is a number counts it. Most models have
one tower, a stack with what stands before it (embeddings) and after it (final norm, head). Where the config speaks of several (encoder
and decoder, text and vision), the names are divided where their stacks' names part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.errors import did_you_mean

#: keys that give the number of layers, by the kind of tower, the most telling first
COUNT_KEYS: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers", "n_layers", "n_layer"),
}
_ANY_COUNT = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers", "depth",
    "num_blocks",
)  # fmt: skip
#: parts of a config that describe one tower, by kind
_SUB_CONFIGS: Mapping[str, tuple[str, ...]] = {
    "text": ("text_config", "language_config", "llm_config", "text_model_config"),
    "vision": ("vision_config", "visual_config", "vision_model_config"),
    "audio": ("audio_config", "audio_encoder_config", "speech_config"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
_KINDS = (
    ("vision", re.compile(r"vision|visual|image|(?:^|_)vit")),
    ("audio", re.compile(r"audio|speech")),
    ("text", re.compile(r"text|lang|llm")),
    ("projector", re.compile(r"project|connector|merger")),
    ("decoder", re.compile(r"decoder")),
    ("encoder", re.compile(r"encoder")),
)
_BEFORE = re.compile(
    r"embed|^wte$|^wpe$|^shared$|patch|position|rotary|^conv\d?$|^pre_?la?yr?e?norm|^ln_pre$|stem|^project_in$|token|^emb_"
)
_HEAD = re.compile(r"^(?:lm_head|embed_out|output|score|classifier|predictions|qa_outputs|heads?|.*_head)$")
#: stands in the first layer and serves them all
_OF_ALL_LAYERS = "relative_attention_bias"
#: what the tower of a model with one is called
DEFAULT = "default"


@dataclass(frozen=True)
class Tower:
    """One stack of layers (or none) and the tensors around it; `prefix` is what all of its names but a few begin with."""

    name: str
    prefix: str
    stack: str | None
    layers: tuple[tuple[str, ...], ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.before, *(name for layer in self.layers for name in layer), *self.after)

    def renumbered(self, name: str, shift: int) -> str:
        """A name of a layer (one beyond the last counted one included), `shift` layers later; any other name is itself."""
        number = self.number_of(name)
        if number is None or self.stack is None:
            return name
        rest = name[len(self.stack) + 1 + len(str(number)) :]
        return f"{self.stack}.{number + shift}{rest}"

    def number_of(self, name: str) -> int | None:
        if self.stack is None or not name.startswith(f"{self.stack}.") or _OF_ALL_LAYERS in name:
            return None
        part = name[len(self.stack) + 1 :].split(".", 1)[0]
        return int(part) if part.isdecimal() else None

    def general(self, name: str) -> str:
        """A name without the number of its layer; the same for that tensor in every layer."""
        number = self.number_of(name)
        return name if number is None or self.stack is None else f"{self.stack}.*{name[len(self.stack) + 1 + len(str(number)) :]}"

    def position_of(self, name: str) -> float:
        """0 for the first layer, 1 for the last; 0 outside the layers."""
        number = self.number_of(name)
        if number is None or number >= self.count:
            return 0.0
        return position(number, self.count)


def position(number: int, count: int) -> float:
    """Where a layer of `count` stands for a gradient; an only layer stands at the end."""
    return number / (count - 1) if count > 1 else 1.0


def kind_of(name: str) -> str:
    """What a tower is for: vision, audio, text, projector, encoder or decoder; a word that says nothing means text."""
    return _kind_in(name) or "text"


def _kind_in(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def towers_of(names: Iterable[str], config: Mapping[str, Any]) -> tuple[Tower, ...]:
    """The towers of a model. Every name belongs to exactly one."""
    every = sorted(names)
    stacks = _stacks(every)
    if len(stacks) > 1 and _speaks_of_several(config):
        return _several(every, stacks, config)
    return (_tower(DEFAULT, "", every, stacks, config),)


def find_tower(name: str, towers: Sequence[Tower]) -> Tower | None:
    """The tower that a recipe means: by its name, its prefix, or by what it is for."""
    for tower in towers:
        if name in (tower.name, tower.prefix.rstrip(".")):
            return tower
    if name == DEFAULT:
        return towers[0] if len(towers) == 1 else None
    kind = _kind_in(name)
    alike = {kind, "text"} if kind == "decoder" else {kind, "decoder"} if kind == "text" else {kind}
    fitting = [tower for tower in towers if (tower.kind if tower.name != DEFAULT else "text") in alike]
    return fitting[0] if len(fitting) == 1 else None


def unknown_tower(name: str, towers: Sequence[Tower]) -> str:
    known = [tower.name for tower in towers]
    return f"there is no such part of the model.{did_you_mean(name, known)} Its parts: {', '.join(known)}."


def sub_config_key(config: Mapping[str, Any], kind: str) -> str | None:
    """The key of the config that describes towers of this kind, where there is one."""
    keys = _SUB_CONFIGS.get(kind, ())
    return next((key for key in keys if isinstance(config.get(key), Mapping)), None)


def sub_config(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """What the config says of one tower: a part of it, or all of it."""
    key = sub_config_key(config, kind)
    return config[key] if key is not None else config


def count_keys(config: Mapping[str, Any], kind: str) -> list[str]:
    """The keys of a tower's (sub)config that hold its number of layers."""
    return [key for key in COUNT_KEYS.get(kind, _ANY_COUNT) if isinstance(config.get(key), int) and not isinstance(config[key], bool)]


def _stacks(names: Sequence[str]) -> dict[str, dict[int, list[str]]]:
    """Stack -> layer -> names, for the blocks that are numbered 0, 1, ... without a gap."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts[:-1]):
            if at and part.isdecimal():
                found.setdefault(".".join(parts[:at]), {}).setdefault(int(part), []).append(name)
                break
    return {stack: layers for stack, layers in found.items() if sorted(layers) == list(range(len(layers)))}


def _speaks_of_several(config: Mapping[str, Any]) -> bool:
    if config.get("is_encoder_decoder"):
        return True
    described = [key for keys in _SUB_CONFIGS.values() for key in keys if isinstance(config.get(key), Mapping)]
    return bool(described)


def _several(names: Sequence[str], stacks: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tower, ...]:
    paths = [stack.split(".") for stack in stacks]
    depth = next(at for at in range(min(map(len, paths)) + 1) if len({tuple(path[: at + 1]) for path in paths}) > 1)
    start = ".".join(paths[0][:depth]) + "." if depth else ""
    children = list(dict.fromkeys(path[depth] for path in paths if len(path) > depth))
    main = next((child for child in children if kind_of(child) in ("text", "decoder")), children[0])
    first = "encoder" if "encoder" in children else main
    groups: dict[str, list[str]] = {child: [] for child in children}
    for name in names:
        inside = name.removeprefix(start) if name.startswith(start) else None
        part = inside.split(".", 1)[0] if inside is not None and "." in inside else ""
        owners = name.split(".")[:-1] or [name]
        if part in groups:
            groups[part].append(name)
        elif any(_HEAD.search(owner) for owner in owners) or not part:
            groups[main].append(name)
        elif _BEFORE.search(owners[-1]):
            groups[first].append(name)
        elif depth and not name.startswith(start):
            groups[main].append(name)
        else:
            groups.setdefault(part, []).append(name)
    return tuple(_tower(child, f"{start}{child}.", members, stacks, config) for child, members in groups.items())


def _tower(
    name: str, prefix: str, names: Sequence[str], stacks: Mapping[str, Mapping[int, Sequence[str]]], config: Mapping[str, Any]
) -> Tower:
    kind = "text" if name == DEFAULT else kind_of(name)
    own = sub_config(config, kind)
    counts = [own[key] for key in count_keys(own, kind)]
    inside = {stack: layers for stack, layers in stacks.items() if stack.startswith(prefix)}
    stack = max(inside, key=lambda one: (len(inside[one]) in counts, sum(map(len, inside[one].values()))), default=None)
    layers: list[list[str]] = []
    if stack is not None:
        count = len(inside[stack])
        smaller = [number for number in counts[:1] if 0 < number < count]  # layers beyond serve something else (next tokens)
        for number in range(smaller[0] if smaller else count):
            layers.append([one for one in inside[stack][number] if _OF_ALL_LAYERS not in one])
    counted = {one for layer in layers for one in layer}
    around = [one for one in names if one not in counted]
    before = tuple(one for one in around if _stands_before(one))
    after = tuple(one for one in around if not _stands_before(one))
    return Tower(name, prefix, stack, tuple(tuple(layer) for layer in layers), before, after)


def _stands_before(name: str) -> bool:
    """Whether a tensor outside the layers comes before them."""
    parts = name.split(".")
    owners = parts[:-1] or parts
    if _OF_ALL_LAYERS in name:
        return True
    if any(_HEAD.search(owner) for owner in owners):
        return False
    return any(_BEFORE.search(part) for part in owners) or bool(_BEFORE.search(parts[-1]) and parts[-1] not in ("weight", "bias"))
