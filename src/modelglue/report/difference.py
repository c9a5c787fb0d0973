"""Where two models differ, as a picture: a heat map of layers and roles, as SVG or as a page around it that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from modelglue import __version__
from modelglue.checkpoint import write_bytes_atomic
from modelglue.errors import UserError
from modelglue.report import text
from modelglue.report.svg import tag

if TYPE_CHECKING:
    from modelglue.checkpoint.tensor_names import Layer
    from modelglue.zoo.difference import Difference, Sums

SUFFIXES = (".svg", ".html")
ROLE_NAMES = {
    "embedding": "embedding", "attention": "attention", "feed_forward": "feed-forward", "norm": "norms", "head": "head", "other": "other",
}  # fmt: skip

_TEMPLATES = Path(__file__).parent / "templates"
_LOW, _HIGH = (232, 240, 250), (16, 70, 140)
_INK, _SOFT = "#1b2025", "#59636d"
_DECADES = 4.0
"""The scale ends this far below its top: smaller differences look alike."""
_WIDTH = 86.0
_LEFT, _TOP = 14.0, 74.0
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'
_MOST_CHANGED = 25
"""Tensors in the list of the page."""


def write_difference(found: Difference, path: Path) -> None:
    """Write `path` (.svg or .html), atomically. A function of the difference alone: equal differences give equal bytes."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a picture ends in {' or '.join(SUFFIXES)}. Choose another name.")
    written = f'<?xml version="1.0" encoding="UTF-8"?>\n{picture(found)}\n' if path.suffix == ".svg" else _page(found)
    write_bytes_atomic(path, written.encode())


def picture(found: Difference) -> Markup:
    """Rows are layers (and, at the end, what stands in no layer), columns are roles, the colour is |b - a| / |a| on a logarithmic scale."""
    layout = _Layout(found)
    parts = [
        tag("rect", width=layout.width, height=layout.height, fill="#ffffff"),
        _text(layout.title, x=_LEFT, y=26.0, font_size=15, font_weight=600),
        _text("relative difference |b - a| / |a|", x=_LEFT, y=45.0, font_size=11.5, ink=_SOFT),
        *layout.headings(),
        *layout.rows(),
        *layout.legend(),
    ]  # fmt: skip
    return tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {layout.width:.0f} {layout.height:.0f}", width=layout.width,
        height=layout.height, role="img", aria_label="Relative difference by layer and role", font_family=_FONT, fill=_INK,
    )  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    found: Difference

    @cached_property
    def layers(self) -> dict[Layer | None, dict[str, Sums]]:
        return self.found.layers

    @cached_property
    def title(self) -> str:
        return f"Where {text.clip(self.found.labels[1], 40)} differs from {text.clip(self.found.labels[0], 40)}"

    @cached_property
    def roles(self) -> list[str]:
        return list(self.found.roles)

    @cached_property
    def names(self) -> list[str]:
        """Of the rows: the stack is named only where there are several."""
        stacks = {layer.stack for layer in self.layers if layer is not None}
        several = len(stacks) > 1
        return [
            "outside" if layer is None else f"{layer.stack}.{layer.number}" if several else f"layer {layer.number}" for layer in self.layers
        ]

    @cached_property
    def side(self) -> float:
        """Height of a row."""
        return min(24.0, max(9.0, 1400 / max(len(self.layers), 1)))

    @cached_property
    def margin(self) -> float:
        return _LEFT + 12 + 6.6 * max(text.width(text.clip(name, 36)) for name in self.names)

    @property
    def width(self) -> float:
        return max(self.margin + _WIDTH * len(self.roles) + 16, 2 * _LEFT + 9.0 * text.width(self.title), 580.0)

    @property
    def bottom(self) -> float:
        return _TOP + self.side * len(self.layers)

    @property
    def height(self) -> float:
        return self.bottom + 58

    @cached_property
    def scale(self) -> tuple[float, float]:
        """log10 of the lowest and the highest relative difference that the colours tell apart."""
        values = [sums.relative for roles in self.layers.values() for sums in roles.values()]
        logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
        return (max(min(logs), max(logs) - _DECADES), max(logs)) if logs else (0.0, 0.0)

    def colour(self, relative: float) -> tuple[str, str]:
        """(of the cell, of the number in it)"""
        low, high = self.scale
        share = 1.0 if high <= low else min(1.0, max(0.0, (math.log10(relative) - low) / (high - low)))
        return _mixed(share), "#ffffff" if share > 0.55 else _INK

    def headings(self) -> Iterator[Markup]:
        for number, role in enumerate(self.roles):
            x = self.margin + _WIDTH * (number + 0.5)
            yield _text(ROLE_NAMES[role], x=x, y=_TOP - 8, text_anchor="middle", font_size=12, font_weight=600)

    def rows(self) -> Iterator[Markup]:
        for number, (name, roles) in enumerate(zip(self.names, self.layers.values(), strict=True)):
            y = _TOP + self.side * number
            size, baseline = min(12.0, self.side * 0.78), y + self.side / 2 + min(12.0, self.side * 0.78) * 0.35
            yield _text(tag("title", name), text.clip(name, 36), x=self.margin - 10, y=baseline, text_anchor="end", font_size=size)
            for column, role in enumerate(self.roles):
                if role in roles:
                    yield self._cell(self.margin + _WIDTH * column, y, f"{name}, {ROLE_NAMES[role]}", roles[role])

    def _cell(self, x: float, y: float, name: str, sums: Sums) -> Markup:
        place: dict[str, Any] = {"x": x + 1, "y": y + 1, "width": _WIDTH - 2, "height": self.side - 2, "rx": 2}
        if not sums.changed:
            box, shown, ink = tag("rect", **place, fill="#ffffff", stroke="#c8ced4"), "=", _SOFT
        elif math.isfinite(sums.relative) and sums.relative > 0:
            fill, ink = self.colour(sums.relative)
            box, shown = tag("rect", **place, fill=fill), text.plain(sums.relative)
        else:  # a was zero, or only what no norm counts has changed
            box, shown, ink = tag("rect", **place, fill="#fcebe0", stroke="#b0440c"), "!", "#b0440c"
        parts = [tag("title", f"{name}: {in_words(sums)}"), box]
        if self.side >= 14:
            x, y = x + _WIDTH / 2, y + self.side / 2 + 4
            parts.append(_text(shown, x=x, y=y, text_anchor="middle", font_size=11, ink=ink))
        return tag("g", *parts)

    def legend(self) -> Iterator[Markup]:
        low, high = self.scale
        y, steps, width = self.bottom + 18, 40, 240.0
        if high > low:
            for step in range(steps):
                x = _LEFT + width * step / steps
                yield tag("rect", x=x, y=y, width=width / steps + 0.5, height=10.0, fill=_mixed(step / (steps - 1)))
            yield _text(text.plain(10**low), x=_LEFT, y=y + 24, font_size=11, ink=_SOFT)
            yield _text(text.plain(10**high), x=_LEFT + width, y=y + 24, text_anchor="end", font_size=11, ink=_SOFT)
        yield _text("=  not one bit changed     !  from zero, or no number", x=_LEFT + width + 18, y=y + 9, font_size=11, ink=_SOFT)


def _text(*children: object, ink: str = _INK, **attributes: Any) -> Markup:
    """As a style, because the page around the picture has colours of its own for text, and dark ones for dark screens."""
    return tag("text", *children, style=f"fill:{ink}", **attributes)


def _mixed(share: float) -> str:
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in zip(_LOW, _HIGH, strict=True))


def in_words(sums: Sums) -> str:
    """For a tooltip."""
    return (
        f"relative {text.plain(sums.relative)}, norm {text.plain(sums.norm)}, cosine {text.similarity(sums.cosine)}, "
        f"changed {text.percent(sums.changed, sums.numel)} of {text.count(sums.numel)}"
    )


def _page(found: Difference) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: text.showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )  # fmt: skip
    environment.filters.update(plain=text.plain, similarity=text.similarity, count=text.count)
    most = sorted((one for one in found.tensors if one.sums.changed), key=lambda one: -(one.sums.relative if one.sums.a else math.inf))
    return environment.get_template("difference.html").render(
        version=__version__, style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")), found=found, picture=picture(found),
        names=ROLE_NAMES, most=most[:_MOST_CHANGED], percent=lambda sums: text.percent(sums.changed, sums.numel),
    )  # fmt: skip
