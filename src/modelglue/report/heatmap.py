"""The similarity matrix as a picture: models ordered by family, families outlined, what cannot be compared hatched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from modelglue.report import text
from modelglue.report.svg import picture, tag

if TYPE_CHECKING:
    from modelglue.zoo import Similarity

_LONGEST = 24
"""Columns of a label; the whole name stands in the tooltip."""
_LETTER = 0.56
"""Width of a column, in font sizes."""
_SLANT = math.sqrt(0.5)
_FAMILY = 78.0
"""Room for "family 12" on the right."""
_NUMBERS = 30.0
"""Cells of at least this size hold their number."""


_WEIGHTS = {"all": "attention and feed-forward", "attn": "attention", "mlp": "feed-forward"}
_MEASURE = {"column": "Mean cosine of columns", "tensor": "Mean cosine of tensors", "global": "One cosine over everything"}


def view(found: Similarity, families: Mapping[str, Any] | None) -> dict[str, Any]:
    """The picture, and what is measured."""
    return {
        "heatmap": heatmap(found, families),
        "lowest": lowest(found),
        "weights": _WEIGHTS.get(found.scope, found.scope),
        "measure": _MEASURE.get(found.mode, found.mode),
    }


def heatmap(found: Similarity, families: Mapping[str, Any] | None) -> Markup:
    """Two scales meet at the threshold: greys below it, the accent colour above, so that families are seen at a glance."""
    layout = _Layout([family["members"] for family in families["families"]] if families else [list(found.labels)], bool(families))
    row_of = {label: row for row, label in enumerate(found.labels)}
    colours = _Colours(families["threshold"] if families else None, lowest(found))
    named = _named_pairs(families)
    parts = [_hatch(), *layout.labels()]
    for a, y in layout.places:
        for b, x in layout.places:
            value = float(found.matrix[row_of[a], row_of[b]])
            parts.append(_cell(layout, x, y, value, (a, b), colours, frozenset((a, b)) in named))
    if families:
        parts += layout.boxes([family["id"] for family in families["families"]])
    return picture(layout.width, layout.height, *parts, label="Similarity of every pair of models", class_="heatmap")


def lowest(found: Similarity) -> float:
    """Lower end of the colour scale: 0, or the smallest similarity if that is negative."""
    return min(0.0, min((float(value) for value in found.matrix.ravel() if not math.isnan(value)), default=0.0))


@dataclass(frozen=True)
class _Layout:
    """Where everything stands: a square of cells, family after family, with the names on the left and (slanted) above."""

    groups: Sequence[Sequence[str]]
    named: bool
    """Whether the groups are families, with room for their names."""

    @cached_property
    def side(self) -> float:
        return min(46.0, max(13.0, 640 / sum(map(len, self.groups))))

    @cached_property
    def font(self) -> float:
        return min(12.5, max(9.0, self.side * 0.72))

    @cached_property
    def order(self) -> list[tuple[str, int]]:
        """(model, number of its group)"""
        return [(label, number) for number, members in enumerate(self.groups) for label in members]

    @cached_property
    def offsets(self) -> list[float]:
        """From the corner of the square; a little room between groups."""
        gap = 7.0 if self.side > 20 else 4.0
        return [self.side * position + gap * number for position, (_, number) in enumerate(self.order)]

    @property
    def places(self) -> Iterator[tuple[str, float]]:
        return zip((label for label, _ in self.order), self.offsets, strict=True)

    @cached_property
    def lengths(self) -> list[float]:
        return [_LETTER * self.font * text.width(text.clip(label, _LONGEST)) for label, _ in self.order]

    @property
    def extent(self) -> float:
        return self.offsets[-1] + self.side

    @property
    def left(self) -> float:
        return 14 + max(self.lengths)

    @property
    def top(self) -> float:
        return 16 + _SLANT * max(self.lengths)

    @property
    def width(self) -> float:
        beyond = max(at + self.side / 2 + _SLANT * length - self.extent for at, length in zip(self.offsets, self.lengths, strict=True))
        return self.left + self.extent + max(beyond + 8, _FAMILY if self.named else 8.0)

    @property
    def height(self) -> float:
        return self.top + self.extent + 4

    def labels(self) -> Iterator[Markup]:
        for label, at in self.places:
            short, middle, font = text.clip(label, _LONGEST), at + self.side / 2, self.font
            y = self.top + middle + font * 0.34
            yield tag("text", tag("title", label), short, x=self.left - 9, y=y, text_anchor="end", font_size=font)
            x, y = self.left + middle + font * 0.25, self.top - 8
            yield tag("text", tag("title", label), short, x=x, y=y, transform=f"rotate(-45 {x:.2f} {y:.2f})", font_size=font)

    def boxes(self, ids: Sequence[int]) -> Iterator[Markup]:
        """A frame around every family, and its name beside it where there is room for a line of text."""
        for number, family in enumerate(ids):
            inside = [at for at, (_, own) in zip(self.offsets, self.order, strict=True) if own == number]
            first, side = inside[0], inside[-1] + self.side - inside[0]
            x, y = self.left + first - 2, self.top + first - 2
            yield tag("rect", x=x, y=y, width=side + 4, height=side + 4, rx=4, class_="family-box")
            if side >= 14:
                x, y = self.left + self.extent + 12, self.top + first + side / 2 + 4
                yield tag("text", f"family {family}", x=x, y=y, class_="soft", font_size=12)


@dataclass(frozen=True)
class _Colours:
    threshold: float | None
    lowest: float

    def of(self, value: float) -> tuple[str, float]:
        """(scale, place on it)"""
        above = self.threshold is None or value > self.threshold
        if above:
            low, high = self.lowest if self.threshold is None else self.threshold, 1.0
        else:
            low, high = self.lowest, self.threshold or 0.0
        return "above" if above else "below", (value - low) / (high - low) if high > low else 1.0


def _cell(layout: _Layout, x: float, y: float, value: float, pair: tuple[str, str], colours: _Colours, named: bool) -> Markup:
    side, x, y = layout.side, layout.left + x, layout.top + y
    a, b = pair
    shown, style = "", None
    if math.isnan(value):
        kind, hint = "none", f"{a} – {b}: not comparable"
    elif a == b:
        kind, hint = "same", a
    else:
        kind, share = colours.of(value)
        shown, style, hint = text.short_similarity(value), f"--t:{share:.3f}", f"{a} – {b}: {text.similarity(value)}"
    inner = [tag("rect", x=x + 0.5, y=y + 0.5, width=side - 1, height=side - 1, rx=2.5 if side > 20 else 1.5, style=style)]
    if named:
        inset = 3.0 if side > 20 else 1.5
        inner.append(tag("rect", x=x + inset, y=y + inset, width=side - 2 * inset, height=side - 2 * inset, rx=1.5, class_="named"))
    if side >= _NUMBERS and shown:
        inner.append(tag("text", shown, x=x + side / 2, y=y + side / 2 + side * 0.085, text_anchor="middle", font_size=side * 0.255))
    return tag("g", tag("title", hint), *inner, class_=f"cell {kind}")


def _named_pairs(families: Mapping[str, Any] | None) -> set[frozenset[str]]:
    """The weakest pair of every family and the strongest pair across: what the threshold hangs on."""
    if not families:
        return set()
    pairs = [*(family["weakest_pair"] for family in families["families"]), families["strongest_across"]]
    return {frozenset(pair["models"]) for pair in pairs if pair}


def _hatch() -> Markup:
    line = tag("line", x1=0, y1=0, x2=0, y2=6, class_="hatch")
    return tag("defs", tag("pattern", line, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse", patternTransform="rotate(45)"))
