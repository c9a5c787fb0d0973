"""How numbers are written for people: scores times 100, true minus signs, one width per column."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOTHING = "–"


def score(value: float | None) -> str:
    """0.8731 -> 87.3"""
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.1f}".replace("-", "−")


def gain(value: float | None) -> str:
    """A difference of scores, in points: 0.014 -> +1.4"""
    return (
        NOTHING
        if value is None or math.isnan(value)
        else f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")
    )


def interval(bounds: Sequence[float]) -> str:
    """Of a difference."""
    return f"{gain(bounds[0])} to {gain(bounds[1])}"


def similarity(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.4f}".replace("-", "−")


def count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def parameters(value: int) -> str:
    """Numbers of parameters: 6738415616 -> 6.74 B"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def size(value: float) -> str:
    """Bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def clip(text: str, length: int) -> str:
    """Labels in pictures; the whole text stands in the tooltip."""
    return text if len(text) <= length else text[: length - 1] + "…"


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
