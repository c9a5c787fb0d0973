"""SVG by hand: elements that escape whatever they are given."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape


def tag(name: str, *children: object, **attributes: Any) -> Markup:
    """One element. `_` in attribute names is written `-` (a trailing one is dropped), None leaves the attribute out.

    Attributes and children are escaped unless they are Markup; numbers are rounded to 0.01.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(escape(child) for child in children))


def picture(width: float, height: float, *children: object, label: str, class_: str = "") -> Markup:
    """The outer element: drawn at its natural size, smaller where the page is narrow only if the style says so."""
    return tag(
        "svg", *children, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_plain(float(width))} {_plain(float(height))}",
        width=float(width), height=float(height), role="img", aria_label=label, class_=class_ or None,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
