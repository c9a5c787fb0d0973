"""A merge put back as a part of a larger model: its tensors take the place of the part's, and the model says what follows from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.checkpoint import Checkpoint, JoinedCheckpoint, RenamedCheckpoint
from modelglue.checkpoint.vocabulary import check_vocabularies, dressed, tables_of, transplant
from modelglue.errors import MergeError
from modelglue.recipe.mergeable import different_functions
from modelglue.recipe.parts import Part, config_key, names_in_part, part_of

#: faults that one message shows
_SHOWN = 5


def put_into(
    whole: Checkpoint, part: Part, merged: Checkpoint, rest: Checkpoint, label: str, *, aligned: bool, layers: Mapping[str, Any]
) -> tuple[Checkpoint, tuple[str, ...]]:
    """`whole` with the tensors of its part replaced by those of `merged`, and what was odd; `rest` are its other tensors.

    Config and side files stay those of `whole`, but for what the merge has changed: `layers`, the fields that follow from new layers,
    and the vocabulary, if the recipe has `aligned` it. MergeError unless the merge has exactly the tensors of the part, in its shapes
    (tables of tokens may have other rows), and unless both number their tokens alike where nothing was aligned.
    """
    before = part_of(whole, part, label)
    _check_tensors(before, merged, part, label)
    if not aligned:
        check_vocabularies([before, merged], None, [f"{label} (into)", "the merge"])
    moved = transplant(whole, before, merged)
    renamed = RenamedCheckpoint(merged, names_in_part(whole, part, label))
    parts = [("", renamed), *([("", rest)] if rest.names() else [])]
    key = config_key(whole.config, part)
    put = dressed(JoinedCheckpoint(parts, whole.config, files=whole.files), config={key: layers} if key is not None and layers else layers)
    odd = different_functions([before, merged], [f"{label} (into)", "the merge"])
    return dressed(put, config=moved.config, files=moved.files), (*moved.warnings, *odd)


def _check_tensors(before: Checkpoint, merged: Checkpoint, part: Part, label: str) -> None:
    ours, theirs = set(before.names()), set(merged.names())
    lacking, extra = sorted(ours - theirs), sorted(theirs - ours)
    said = [f"the merge has no '{name}'" for name in lacking[:_SHOWN]] + [f"the part has no '{name}'" for name in extra[:_SHOWN]]
    faults = len(lacking) + len(extra)
    remedy = "Say with a mapping of prefixes how the names correspond."
    if not said:
        tables = {*tables_of(before).names, *tables_of(merged).names}
        for name in sorted(ours):
            old, new = (list(model.info(name).shape) for model in (before, merged))
            if (old[1:] != new[1:]) if name in tables else (old != new):
                said.append(f"'{name}' is {new} in the merge and {old} in the part")
        remedy = "Put the merge into a model of its size."
        faults, said = len(said), said[:_SHOWN]
    if said:
        more = f"; and {faults - len(said)} more" if faults > len(said) else ""
        raise MergeError(f"into: the merge does not have the tensors of {part!r} in {label}: {'; '.join(said)}{more}. {remedy}")
