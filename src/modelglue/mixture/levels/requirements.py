"""Which levels a set of experts allows, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.levels.members import Member

Level = Literal["ffn", "block", "model"]

#: settings that a model reads once for all its layers: which positions attention may see
_MASKS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
#: settings that rotary positions are made of
POSITIONS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "head_dim", "rope_local_base_freq")


def reasons(level: Level, experts: Sequence[Member], shared: Member) -> list[str]:
    """Why these experts cannot be joined at a level with shared parts (every reason); empty if they can. Reads headers and tokenizers.

    `model` means here that embedding and head are shared; complete models behind a router need nothing of each other.
    """
    found: list[str] = []
    for member in (shared, *experts):
        try:
            found += [] if member is shared else list(_against(member, shared, level))
            _ = member.live, member.feed_forward if level == "ffn" else None
        except CheckpointError as error:
            found.append(str(error).rstrip("."))
    return list(dict.fromkeys(found))


def _against(member: Member, shared: Member, level: Level) -> Iterator[str]:
    """What one expert and the shared model do not have in common, and would have to."""
    if member.class_name != shared.class_name:
        yield f"{member.label} is a {member.class_name}, {shared.label} a {shared.class_name}"
        return
    if member.width != shared.width:
        yield f"{member.label} has hidden size {member.width}, {shared.label} {shared.width}"
    if member.roles.count != shared.roles.count:
        yield f"{member.label} has {member.roles.count} layers, {shared.label} {shared.roles.count}"
    if token := _other_token(member, shared):
        yield f"{member.label} and {shared.label} number their tokens differently ({token})"
    changed = member.differences(shared)
    if level != "ffn":
        for key in _MASKS:
            if key in changed:
                yield f"{key} is {changed[key]} in {member.label} and {shared.settings.get(key)} in {shared.label}"
        own = [key for key in POSITIONS if key in changed]
        if own and not _plain_positions(shared):
            yield f"{own[0]} differs between {member.label} and {shared.label}, and {shared.class_name} makes positions for several kinds"


def _plain_positions(member: Member) -> bool:
    """Whether a model makes rotary positions once for all layers, so that an expert can bring its own."""
    beside = member.model.get_submodule(member.roles.layers.rpartition(".")[0])
    return hasattr(beside, "rotary_emb") and len(set(member.settings.get("layer_types") or ())) < 2


def _other_token(member: Member, shared: Member) -> str | None:
    """A token that means another row in one of the two; a model without a tokenizer has nothing to contradict."""
    if member.tokens is None or shared.tokens is None:
        return None
    for token, number in member.tokens.items():
        if (theirs := shared.tokens.get(token)) != number:
            return f"{token!r} is {number} and {'missing' if theirs is None else theirs}"
    return None


def require(level: Level, experts: Sequence[Member], shared: Member) -> None:
    """UserError with every reason why a level is impossible, and the level that would work."""
    if found := reasons(level, experts, shared):
        raise UserError(
            f"these experts cannot be joined at the level {level}: {'; '.join(found)}. "
            f"What works with them is level: {best_level(experts, shared)[0]}."
        )


def best_level(experts: Sequence[Member], shared: Member) -> tuple[Level, list[str]]:
    """What `auto` means, and why no level before it: ffn where experts allow it, else block, else complete models."""
    why: list[str] = []
    inside: tuple[Level, ...] = ("ffn", "block")
    for level in inside:
        found = reasons(level, experts, shared)
        if not found:
            return level, why
        why.append(f"not {level}: {'; '.join(found)}")
    return "model", why
