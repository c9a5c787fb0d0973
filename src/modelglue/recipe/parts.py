"""Sub-models: a part of a model as a model, and a merge put back as a part of one."""

from __future__ import annotations

from collections.abc import Mapping

from modelglue.checkpoint import Checkpoint, JoinedCheckpoint, RenamedCheckpoint
from modelglue.errors import MergeError, did_you_mean
from modelglue.recipe.layers import kind_of, sub_config, sub_config_key

Part = str | Mapping[str, str]
_SHOWN = 5


def part_of(model: Checkpoint, part: Part, label: str) -> Checkpoint:
    """The tensors under the part's prefixes, renamed, with what the config says of the part.

    `part`: a prefix that is taken off, or prefixes and what they become ("" for nothing).
    """
    names = {new: old for old, new in _renamed(model, part, label).items()}
    kind = kind_of(_first_prefix(part))
    return RenamedCheckpoint(model, names, sub_config(model.config, kind))


def put_into(whole: Checkpoint, part: Part, merged: Checkpoint, rest: Checkpoint, label: str) -> Checkpoint:
    """`whole` with the tensors of its part replaced by those of `merged`; `rest` are the others.

    MergeError unless the merge has exactly the tensors of the part.
    """
    renamed = _renamed(whole, part, label)
    missing = sorted(set(renamed.values()) - set(merged.names()))
    extra = sorted(set(merged.names()) - set(renamed.values()))
    if missing or extra:
        said = [f"the merge has no '{name}'" for name in missing[:_SHOWN]] + [f"the part has no '{name}'" for name in extra[:_SHOWN]]
        more = len(missing) + len(extra) - len(said)
        raise MergeError(
            f"into: the merge does not have the tensors of {part!r} in {label}: {'; '.join(said)}{f'; and {more} more' if more else ''}. "
            "Say with a mapping of prefixes how the names correspond."
        )
    parts = [("", RenamedCheckpoint(merged, renamed)), *([("", rest)] if rest.names() else [])]
    config = whole.config
    key = sub_config_key(config, kind_of(_first_prefix(part)))
    inner = dict(merged.config)
    if key is not None:
        known = {name: inner.get(name, value) for name, value in config[key].items() if name not in ("architectures", "model_type")}
        config = {**config, key: {**config[key], **known}}
    return JoinedCheckpoint(parts, config)


def rest_of(whole: Checkpoint, part: Part, label: str) -> Checkpoint:
    """The tensors of a model that are not in its part."""
    inside = _renamed(whole, part, label)
    return RenamedCheckpoint(whole, {name: name for name in whole.names() if name not in inside})


def _first_prefix(part: Part) -> str:
    return part if isinstance(part, str) else next(iter(part))


def _renamed(model: Checkpoint, part: Part, label: str) -> dict[str, str]:
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
            f"{label}: no tensor's name begins with '{unused[0]}.', so there is no such part.{did_you_mean(unused[0], starts)} "
            f"Names begin with {', '.join(starts[:_SHOWN])}{', ...' if len(starts) > _SHOWN else ''}."
        )
    if len(set(found.values())) < len(found):
        raise MergeError(f"{label}: the part {part!r} gives two tensors one name. Map the prefixes to different ones.")
    return found
