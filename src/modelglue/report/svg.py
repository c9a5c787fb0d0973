"""SVG by hand: elements that escape whatever they are given."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from modelglue.report.text import showable


def tag(name: str, *children: object, **attributes: Any) -> Markup:
    """One element. `_` in attribute names is written `-` (a trailing one is dropped), None leaves the attribute out.

    Attributes and children are escaped unless they are Markup; numbers are rounded to 0.01.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(_plain(child)) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inside)


def picture(width: float, height: float, *children: object, label: str, class_: str = "") -> Markup:
    """A picture of a fixed size."""
    return tag(
        "svg", *children, viewBox=f"0 0 {_plain(float(width))} {_plain(float(height))}",
        width=float(width), height=float(height), role="img", aria_label=label, class_=class_ or None,
    )  # fmt: skip


def fluid(height: float, *children: object, label: str, class_: str) -> Markup:
    """A picture as wide as its table cell; places from left to right are given in percent."""
    return tag("svg", *children, width="100%", height=float(height), role="img", aria_label=label, class_=class_)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
