"""The similarity matrix as a picture: models ordered by family, families outlined, what cannot be compared hatched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from modelglue.report import text
from modelglue.report.svg import picture, tag

if TYPE_CHECKING:
    from modelglue.zoo import Similarity

_LONGEST = 24
_LETTER = 6.7
_SLANT = math.sqrt(0.5)


def heatmap(found: Similarity, families: Mapping[str, Any] | None) -> Markup:
    """Two scales meet at the threshold: greys below it, the accent colour above, so that families are seen at a glance."""
    groups = [family["members"] for family in families["families"]] if families else [list(found.labels)]
    threshold = families["threshold"] if families else None
    row_of = {label: row for row, label in enumerate(found.labels)}
    order = [(label, number) for number, members in enumerate(groups) for label in members]
    side = min(46.0, max(13.0, 640 / len(order)))
    gap = 7.0 if side > 20 else 4.0
    left = 16 + _LETTER * max(len(text.clip(label, _LONGEST)) for label, _ in order)
    place = [side * position + gap * number for position, (_, number) in enumerate(order)]
    extent = place[-1] + side
    label_size = min(12.5, max(9.0, side * 0.8))
    lengths = [_SLANT * _LETTER * label_size / 12.5 * len(text.clip(label, _LONGEST)) for label, _ in order]
    top = 14 + max(lengths)
    right = max(max(at + side / 2 + length - extent for at, length in zip(place, lengths, strict=True)), 78.0 if families else 8.0)
    lowest = min(0.0, float(min((v for v in found.matrix.ravel() if not math.isnan(v)), default=0.0)))
    named = _named_pairs(families)

    parts = [_hatch()]
    for (label, _), at in zip(order, place, strict=True):
        short, middle = text.clip(label, _LONGEST), at + side / 2
        parts.append(
            tag("text", tag("title", label), short, x=left - 9, y=top + middle + label_size * 0.34, text_anchor="end", font_size=label_size)
        )
        x, y = left + middle + label_size * 0.25, top - 8
        parts.append(tag("text", tag("title", label), short, x=x, y=y, transform=f"rotate(-45 {x:.2f} {y:.2f})", font_size=label_size))
    for (a, _), y in zip(order, place, strict=True):
        for (b, _), x in zip(order, place, strict=True):
            value = float(found.matrix[row_of[a], row_of[b]])
            parts.append(_cell(left + x, top + y, side, value, a, b, threshold, lowest, frozenset((a, b)) in named))
    if families:
        for number, members in enumerate(groups):
            inside = [at for at, (_, own) in zip(place, order, strict=True) if own == number]
            first, width = inside[0], inside[-1] + side - inside[0]
            parts.append(tag("rect", x=left + first - 2, y=top + first - 2, width=width + 4, height=width + 4, rx=4, class_="family-box"))
            if side > 16 or len(members) > 1:
                name = f"family {families['families'][number]['id']}"
                parts.append(tag("text", name, x=left + extent + 12, y=top + first + width / 2 + 4, class_="soft", font_size=12))
    return picture(left + extent + right, top + extent + 4, *parts, label="Similarity of every pair of models", class_="heatmap")


def _cell(x: float, y: float, side: float, value: float, a: str, b: str, threshold: float | None, lowest: float, named: bool) -> Markup:
    if math.isnan(value):
        shown, style, kind = "", None, "cell none"
        hint = f"{a} – {b}: not comparable"
    else:
        shown = f"{value:.3f}".replace("0.", ".", 1).replace("-", "−") if a != b else ""
        hint = f"{a} – {b}: {text.similarity(value)}"
        above = threshold is None or value > threshold
        low, high = (lowest if threshold is None else threshold, 1.0) if above else (lowest, threshold)
        assert high is not None
        share = (value - low) / (high - low) if high > low else 1.0
        kind = f"cell {'same' if a == b else 'above' if above else 'below'}"
        style = f"--t:{share:.3f}"
    inner = [tag("rect", x=x + 0.5, y=y + 0.5, width=side - 1, height=side - 1, rx=2.5 if side > 20 else 1.5, style=style)]
    if named and side > 20:
        inner.append(tag("rect", x=x + 3, y=y + 3, width=side - 6, height=side - 6, rx=1.5, class_="named"))
    if side >= 30 and shown:
        inner.append(tag("text", shown, x=x + side / 2, y=y + side / 2 + side * 0.085, text_anchor="middle", font_size=side * 0.255))
    return tag("g", tag("title", hint), *inner, class_=kind)


def _named_pairs(families: Mapping[str, Any] | None) -> set[frozenset[str]]:
    """The weakest pair of every family and the strongest pair across: what the threshold hangs on."""
    if not families:
        return set()
    pairs = [*(family["weakest_pair"] for family in families["families"]), families["strongest_across"]]
    return {frozenset(pair["models"]) for pair in pairs if pair}


def _hatch() -> Markup:
    line = tag("line", x1=0, y1=0, x2=0, y2=6, class_="hatch")
    return tag("defs", tag("pattern", line, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse", patternTransform="rotate(45)"))
