"""Sub-models: a part of a model as a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.checkpoint import Checkpoint, RenamedCheckpoint
from modelglue.errors import MergeError, did_you_mean
from modelglue.recipe.layers import kind_of, sub_config_key

Part = str | Mapping[str, str]
_SHOWN = 5
#: what the config of a model with several towers may say at its top for its language model
_ABOVE = ("tie_word_embeddings", "dtype", "torch_dtype")


def part_of(model: Checkpoint, part: Part, label: str) -> Checkpoint:
    """The tensors under the part's prefixes, renamed, with what the config says of the part.

    `part`: a prefix that is taken off, or prefixes and what they become ("" for nothing).
    """
    names = {new: old for old, new in names_in_part(model, part, label).items()}
    return RenamedCheckpoint(model, names, _config_of(model.config, part, whole=len(names) == len(model.names())))


def config_key(config: Mapping[str, Any], part: Part) -> str | None:
    """The key under which the config of a model describes its part; None where it does not set it apart."""
    return sub_config_key(config, kind_of(part if isinstance(part, str) else next(iter(part))))


def _config_of(config: Mapping[str, Any], part: Part, *, whole: bool) -> Mapping[str, Any]:
    """What a config says of a part: its own section, and of the rest what holds for the language model as well."""
    key = config_key(config, part)
    if key is None:  # a part of a model is no model of its class
        return config if whole else {name: value for name, value in config.items() if name != "architectures"}
    above = {name: config[name] for name in _ABOVE if name in config and kind_of(key) == "text"}
    return {**above, **config[key]}


def rest_of(whole: Checkpoint, part: Part, label: str) -> Checkpoint:
    """The tensors of a model that are not in its part."""
    inside = names_in_part(whole, part, label)
    return RenamedCheckpoint(whole, {name: name for name in whole.names() if name not in inside})


def names_in_part(model: Checkpoint, part: Part, label: str) -> dict[str, str]:
    """Name in the model -> name in the part, for the tensors of the part."""
    prefixes = {part: ""} if isinstance(part, str) else dict(part)
    order = sorted(prefixes, key=len, reverse=True)
    found: dict[str, str] = {}
    used = set()
    for name in model.names():
        for prefix in order:
            inside = prefix.rstrip(".")
            if name == inside or name.startswith(f"{inside}."):
                new = f"{prefixes[prefix].rstrip('.')}.{name[len(inside) + 1 :]}".strip(".")
                found[name] = new
                used.add(prefix)
                break
    if unused := [prefix for prefix in order if prefix not in used]:
        starts = sorted({".".join(name.split(".")[: depth + 1]) for name in model.names() for depth in range(min(2, name.count(".")))})
        raise MergeError(
            f"{label}: no tensor's name begins with '{unused[0].rstrip('.')}.', so there is no such part.{did_you_mean(unused[0], starts)} "
            f"Names begin with {', '.join(starts[:_SHOWN])}{', ...' if len(starts) > _SHOWN else ''}."
        )
    if len(set(found.values())) < len(found):
        raise MergeError(f"{label}: the part {part!r} gives two tensors one name. Map the prefixes to different ones.")
    return found
