"""Small pictures that stand in table cells: an interval on an axis, a whole field of models, the trials of a round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from modelglue.report import text
from modelglue.report.svg import fluid, picture, tag

ROW, DENSE_ROW = 36.0, 27.0
"""Height of a table row: grid lines of neighbouring rows meet."""
_SCALE = 0.05
"""A picture of trials is at least five points high, so that noise does not look like a mountain."""


@dataclass(frozen=True)
class Axis:
    """Scores that share one horizontal axis, so that rows of a table can be compared by eye."""

    low: float
    high: float
    signed: bool
    """Of differences: with signs, and with 0 on it."""
    most: int
    """So many steps at most between ticks, lest their numbers touch."""

    @classmethod
    def around(cls, values: Sequence[float], *, signed: bool = False, most: int = 5) -> Axis:
        """From the smallest to the largest, a little wider; with `signed`, 0 is in it."""
        known = [value for value in values if not math.isnan(value)] + ([0.0] if signed else [])
        low, high = min(known, default=0.0), max(known, default=1.0)
        room = 0.06 * (high - low) or 0.01
        return cls(low - room, high + room, signed, most)

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def at(self, value: float) -> str:
        """Place on the axis, in percent of its width."""
        return f"{100 * self.share(value):.2f}%"

    def ticks(self) -> list[float]:
        """Round scores on the axis."""
        span = 100 * (self.high - self.low)
        step = next(step for step in _round_steps() if span / step <= self.most)
        first, last = math.ceil(100 * self.low / step), math.floor(100 * self.high / step)
        return [number * step / 100 for number in range(first, last + 1)]

    def head(self) -> Markup:
        """The axis for the head of a column: a number at every tick, in points."""
        sign = "+" if self.signed else ""
        labels = [
            tag("text", f"{100 * tick:{sign if tick else ''}g}".replace("-", "−"), x=self.at(tick), y=11, text_anchor="middle")
            for tick in self.ticks()
        ]
        return fluid(16, *labels, label="axis in points", class_="axis")

    def grid(self, height: float) -> list[Markup]:
        """A line at every tick; in differences a stronger one at 0."""
        return [
            tag("line", x1=self.at(tick), x2=self.at(tick), y1=0, y2=height, class_="zero" if self.signed and not tick else "grid")
            for tick in self.ticks()
        ]


def _round_steps() -> Iterator[float]:
    """0.01, 0.02, 0.05, 0.1 and so on."""
    exponent = -2
    while True:
        yield from (digit * 10.0**exponent for digit in (1, 2, 5))
        exponent += 1


def verdict(bounds: Sequence[float]) -> str:
    """Of an interval of a difference: better, worse, or undecided when 0 is inside."""
    low, high = bounds
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def score_plot(value: float, bounds: Sequence[float], axis: Axis, *, final: bool = False, dense: bool = False) -> Markup:
    """A score as a dot with its interval."""
    return _whisker(value, bounds, axis, "final" if final else "plain", text.with_interval(value, bounds), dense)


def gain_plot(found: Sequence[float], axis: Axis, *, dense: bool = False) -> Markup:
    """A difference (value, low, high) as a dot with its interval: hollow when the interval holds 0."""
    value, *bounds = found
    return _whisker(value, bounds, axis, verdict(bounds), f"{text.gain(value)} ({text.interval(bounds)})", dense)


def _whisker(value: float, bounds: Sequence[float], axis: Axis, kind: str, hint: str, dense: bool) -> Markup:
    low, high = bounds
    height = DENSE_ROW if dense else ROW
    return fluid(
        height, tag("title", hint), *axis.grid(height),
        tag("line", x1=axis.at(low), x2=axis.at(high), y1=height / 2, y2=height / 2, class_="span"),
        tag("circle", cx=axis.at(value), cy=height / 2, r=3.8, class_="dot"),
        label=hint, class_=f"whisker {kind}",
    )  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """One model in a field: its shape is its kind."""

    name: str
    kind: str
    value: float
    bounds: Sequence[float]

    @property
    def hint(self) -> str:
        return f"{self.name}: {text.with_interval(self.value, self.bounds)}"


_SHAPES = {
    "single": tag("path", d="M0 -7V7"),
    "base": tag("circle", r=4),
    "average": tag("path", d="M-5 0L0 -5L5 0L0 5Z"),
    "representative": tag("path", d="M-4 -4H4V4H-4Z"),
    "mixture": tag("path", d="M-5 4L0 -5L5 4Z"),
    "final": tag("circle", r=5),
}


def field(marks: Sequence[Mark], final: Mark, axis: Axis, *, label: str) -> Markup:
    """Every model on one axis; the final one with its interval, in front of the others."""
    height = 50.0
    middle = height / 2
    span = tag("line", x1=axis.at(final.bounds[0]), x2=axis.at(final.bounds[1]), y1=middle, y2=middle, class_="span")
    shapes = [tag("svg", shape(mark.kind, mark.hint), x=axis.at(mark.value), y=middle) for mark in marks]
    return fluid(
        height, *axis.grid(height), *shapes, span, tag("svg", shape("final", final.hint), x=axis.at(final.value), y=middle),
        label=label, class_="field",
    )  # fmt: skip


def shape(kind: str, hint: str) -> Markup:
    return tag("g", tag("title", hint), _SHAPES[kind], class_=f"mark {kind}")


def key(kind: str) -> Markup:
    """The shape for a legend."""
    return picture(16, 16, tag("g", tag("g", _SHAPES[kind], class_=f"mark {kind}"), transform="translate(8 8)"), label=kind, class_="key")


def best_trial(scores: Mapping[str, float]) -> tuple[float, float]:
    """(coefficient, score) of the best trial of a round; of equal ones the largest coefficient."""
    return max(((float(c), score) for c, score in scores.items()), key=lambda pair: (pair[1], pair[0]))


def trials(scores: Mapping[str, float], before: float, *, taken: bool) -> Markup:
    """Scores of one round over the coefficient, on a scale of its own; the dashed line is the score to beat, the ring the best trial."""
    width, height, pad = 132.0, 44.0, 6.0
    pairs = sorted((float(coefficient), score) for coefficient, score in scores.items())
    ends = min(before, *scores.values()), max(before, *scores.values())
    middle, span = sum(ends) / 2, max(ends[1] - ends[0], _SCALE)

    def x(coefficient: float) -> float:
        return pad + coefficient * (width - 2 * pad)

    def y(score: float) -> float:
        return height / 2 - (score - middle) / span * (height - 2 * pad)

    best = best_trial(scores)
    hint = f"to beat {text.score(before)}; " + ", ".join(f"{c:g}: {text.score(s)}" for c, s in pairs)
    line = " ".join(f"{x(c):.1f},{y(s):.1f}" for c, s in pairs)
    return picture(
        width, height, tag("title", hint),
        tag("line", x1=pad, x2=width - pad, y1=y(before), y2=y(before), class_="before"),
        tag("polyline", points=line, class_="path"),
        *(tag("circle", cx=x(c), cy=y(s), r=2.2, class_="trial") for c, s in pairs),
        tag("circle", cx=x(best[0]), cy=y(best[1]), r=4.4, class_="ring taken" if taken else "ring"),
        label=hint, class_="trials",
    )  # fmt: skip


def heat(value: float, low: float, high: float) -> str:
    """Place of a value on the colour scale, as the style sheet wants it (see .heat)."""
    return f"--t:{max(0.0, min(1.0, (value - low) / (high - low) if high > low else 0.5)):.3f}"
