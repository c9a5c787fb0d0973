"""How numbers are written for people: scores times 100, true minus signs, one width per column."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

NOTHING = "–"
#: control characters but tab and line feed, marks of writing direction, halves of surrogate pairs, code points that are no characters
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def score(value: float | None) -> str:
    """0.8731 -> 87.3"""
    return NOTHING if value is None or math.isnan(value) else _minus(f"{100 * value:.1f}")


def gain(value: float | None) -> str:
    """A difference of scores, in points: 0.014 -> +1.4"""
    if value is None or math.isnan(value):
        return NOTHING
    written = f"{100 * value:+.1f}"
    return "0.0" if float(written) == 0 else _minus(written)


def interval(bounds: Sequence[float]) -> str:
    """Of a difference."""
    return f"{gain(bounds[0])} to {gain(bounds[1])}"


def with_interval(value: float, bounds: Sequence[float]) -> str:
    """A score with its interval."""
    return f"{score(value)} ({score(bounds[0])} to {score(bounds[1])})"


def similarity(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else _minus(f"{value:.4f}")


def short_similarity(value: float) -> str:
    """For a cell of the heat map: 0.9312 -> .931"""
    return _minus(f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.2f}")


def plain(value: float) -> str:
    """Any other number, with three digits."""
    return _minus(f"{value:.3g}")


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


def count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def parameters(value: int) -> str:
    """Numbers of parameters, with three digits: 6738415616 -> 6.74 B"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return str(value)


def size(value: float) -> str:
    """Bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def duration(seconds: float) -> str:
    """Tenths of a second below a minute; never "60.0 s"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def showable(text: str) -> str:
    """Without characters that a page cannot hold, or that would turn the words after them around."""
    return _UNSHOWABLE.sub("\ufffd", text)


def clip(text: str, length: int) -> str:
    """Labels in pictures; the whole text stands in the tooltip."""
    return text if len(text) <= length else text[: length - 1] + "…"


def width(text: str) -> int:
    """Columns that the text takes: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def number_of(count: int, one: str, many: str) -> str:
    """1 family, 3 families"""
    return f"{count} {one if count == 1 else many}"


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _minus(text: str) -> str:
    return text.replace("-", "−")
