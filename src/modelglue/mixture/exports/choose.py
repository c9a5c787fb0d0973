"""Which standard class a mixture is written in."""

from __future__ import annotations

from modelglue.errors import MergeError, UserError, did_you_mean
from modelglue.mixture.exports.dense import OTHERWISE
from modelglue.mixture.exports.ernie4_5_moe import Ernie
from modelglue.mixture.exports.export import Export
from modelglue.mixture.exports.flex_olmo import FlexOlmo
from modelglue.mixture.exports.granite_moe_shared import GraniteMoeShared
from modelglue.mixture.exports.mixtral import Mixtral
from modelglue.mixture.exports.parts import Parts
from modelglue.mixture.exports.qwen2_moe import Qwen2Moe
from modelglue.mixture.exports.qwen3_moe import Qwen3Moe

#: in the order in which they are tried
EXPORTS: tuple[Export, ...] = (Mixtral(), Qwen2Moe(), Qwen3Moe(), FlexOlmo(), Ernie(), GraniteMoeShared())


def choose(parts: Parts, wanted: Export | None = None) -> Export:
    """The first class that holds these parts, or the one that is wanted; MergeError says what each of them lacks."""
    candidates = EXPORTS if wanted is None else (wanted,)
    reasons = {export.name: export.refusals(parts) for export in candidates}
    fitting = [export for export in candidates if not reasons[export.name]]
    if fitting:
        return fitting[0]
    others = [export.name for export in EXPORTS if wanted is not None and not export.refusals(parts)]
    listed = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
    way_out = f"{' and '.join(others)} would do" if others else OTHERWISE
    raise MergeError(f"{parts.shared.label}: no standard class that is allowed here holds this mixture; {way_out}.\n{listed}")


def named(word: str) -> Export:
    """The export that a file means by a word: a class, or one of its short names. UserError for what is none."""
    plain = word.strip().lower()
    for export in EXPORTS:
        if plain in (export.name.lower(), export.model_type, *export.words):
            return export
    known = [word for export in EXPORTS for word in (export.words[0], export.name)]
    raise UserError(f"is {word!r}; allowed are {', '.join(known)}.{did_you_mean(word, known)}")
