"""Small pictures that stand in table cells: an interval on an axis, the trials of a round, a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from modelglue.report import text
from modelglue.report.svg import picture, tag


@dataclass(frozen=True)
class Axis:
    """Values that share one horizontal axis, so that rows of a table can be compared by eye."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], *, zero: bool = False) -> Axis:
        """From the smallest to the largest, a little wider; with `zero`, 0 is in it."""
        known = [value for value in values if value == value] + ([0.0] if zero else [])
        low, high = min(known, default=0.0), max(known, default=1.0)
        room = 0.04 * (high - low) or 0.01
        return cls(low - room, high + room)

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def verdict(bounds: Sequence[float]) -> str:
    """Of an interval of a difference: better, worse, or undecided when 0 is inside."""
    low, high = bounds
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def whisker(value: float, bounds: Sequence[float], axis: Axis, *, kind: str, hint: str, zero: bool = False, width: float = 150) -> Markup:
    """A dot with its interval; with `zero`, a line at 0."""
    low, high = bounds
    height, pad = 18.0, 5.0

    def at(number: float) -> float:
        return pad + axis.share(number) * (width - 2 * pad)

    parts: list[object] = [tag("title", hint)]
    if zero:
        parts.append(tag("line", x1=at(0), x2=at(0), y1=0, y2=height, class_="zero"))
    parts += [
        tag("line", x1=at(low), x2=at(high), y1=height / 2, y2=height / 2, class_="span"),
        tag("circle", cx=at(value), cy=height / 2, r=3.6, class_="dot"),
    ]
    return picture(width, height, *parts, label=hint, class_=f"whisker {kind}")


def best_trial(scores: Mapping[str, float]) -> tuple[float, float]:
    """(coefficient, score) of the best trial of a round; of equal ones the largest coefficient."""
    return max(((float(c), score) for c, score in scores.items()), key=lambda pair: (pair[1], pair[0]))


def trials(scores: Mapping[str, float], before: float, axis: Axis, *, taken: bool, width: float = 140) -> Markup:
    """Scores of one round over the coefficient; the dashed line is the score to beat, the ring the best trial."""
    height, pad = 40.0, 6.0
    pairs = sorted((float(coefficient), score) for coefficient, score in scores.items())

    def x(coefficient: float) -> float:
        return pad + coefficient * (width - 2 * pad)

    def y(score: float) -> float:
        return height - pad - axis.share(score) * (height - 2 * pad)

    best = best_trial(scores)
    hint = f"to beat {text.score(before)}; " + ", ".join(f"{c:g}: {text.score(s)}" for c, s in pairs)
    line = " ".join(f"{x(c):.1f},{y(s):.1f}" for c, s in pairs)
    parts: list[object] = [
        tag("title", hint),
        tag("line", x1=pad, x2=width - pad, y1=y(before), y2=y(before), class_="before"),
        tag("polyline", points=line, class_="path"),
        *(tag("circle", cx=x(c), cy=y(s), r=2.2, class_="trial" if (c, s) != best else "trial best") for c, s in pairs),
        tag("circle", cx=x(best[0]), cy=y(best[1]), r=4.4, class_="ring taken" if taken else "ring"),
    ]
    return picture(width, height, *parts, label=hint, class_="trials")


def heat(value: float, low: float, high: float) -> str:
    """Place of a value on the colour scale, as the style sheet wants it (see .heat)."""
    return f"--t:{max(0.0, min(1.0, (value - low) / (high - low) if high > low else 0.5)):.3f}"
