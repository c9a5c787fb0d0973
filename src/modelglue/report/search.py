"""The page of a search: its course, its best candidates, what confirmed them, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from modelglue import __version__
from modelglue.checkpoint import write_bytes_atomic
from modelglue.recipe import Scores, interval
from modelglue.report import text
from modelglue.report.svg import picture, tag
from modelglue.search import SearchReport, recorded
from modelglue.studies import read_result

PAGE = "search.html"
_TEMPLATES = Path(__file__).parent / "templates"
_LEADERS = 10
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900.0, 280.0, 52.0, 30.0


def write_search_report(folder: str | Path) -> Path:
    """Write search.html in the folder of a search, as far as it has come; returns its path. Opens no model. UserError without a search."""
    path = Path(folder) / PAGE
    write_bytes_atomic(path, render_search(recorded(folder), read_result(folder), Path(folder).resolve().name).encode())
    return path


def render_search(found: SearchReport, result: dict[str, Any] | None, name: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: text.showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )  # fmt: skip
    environment.filters.update(score=text.score, gain=text.gain, interval=text.interval, count=text.count)
    rows = found.history()
    return environment.get_template("search.html").render(
        version=__version__, style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")), name=name, found=found,
        curve=course(rows) if any(row["best"] is not None for row in rows) else None, leaders=_leaders(found),
        tasks=list(next((outcome.tasks for outcome in found.leaders(1)), {})), test=(result or {}).get("test"),
        duration=text.duration(found.spent["seconds"]),
    )  # fmt: skip


def _leaders(found: SearchReport) -> list[dict[str, Any]]:
    rows = []
    for outcome in found.leaders(_LEADERS):
        candidate = outcome.proposal.candidate
        assert candidate is not None
        rows.append(
            {
                "id": outcome.id, "best": found.best is not None and outcome.id == found.best.id, "words": candidate.describe(),
                "recipe": json.dumps(candidate.recipe, indent=1), "value": outcome.value, "interval": _bounds(outcome.scores),
                "tasks": outcome.tasks, "confirmed": _confirmed(found.confirmed.get(outcome.id)),
            }
        )  # fmt: skip
    return rows


def _confirmed(scores: Scores | None) -> dict[str, Any] | None:
    return None if scores is None or scores.status != "ok" else {"score": scores.mean, "interval": _bounds(scores)}


def _bounds(scores: Scores) -> tuple[float, float] | None:
    return interval(scores) if scores.items else None


def course(rows: Sequence[dict[str, Any]]) -> Markup:
    """Every candidate's value and the best so far over the items that were scored."""
    values = [row["value"] for row in rows if row["value"] is not None]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.01
    low, high, most = low - room, high + room, max(row["items"] for row in rows) or 1

    def x(items: float) -> float:
        return float(_LEFT + (_WIDTH - _LEFT - 12) * items / most)

    def y(value: float) -> float:
        return float(10 + (_HEIGHT - _BOTTOM - 10) * (high - value) / (high - low))

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - 12, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", text.score(value), x=_LEFT - 8, y=y(value) + 4, text_anchor="end", class_="soft", font_size=12))
    parts += [
        tag("circle", tag("title", f"candidate {row['id']}: {text.score(row['value'])}"), cx=x(row["items"]), cy=y(row["value"]), r=2.6,
            class_="dot", style=f"fill:var(--{'accent' if row['status'] == 'ok' else 'strong'})")
        for row in rows if row["value"] is not None
    ]  # fmt: skip
    steps: list[str] = []
    for row in rows:
        if row["best"] is not None:
            if steps:
                steps.append(f"{x(row['items']):.1f},{steps[-1].partition(',')[2]}")
            steps.append(f"{x(row['items']):.1f},{y(row['best']):.1f}")
    parts.append(tag("polyline", points=" ".join(steps), style="fill:none;stroke:var(--good);stroke-width:2"))
    parts.append(tag("text", "0", x=_LEFT, y=_HEIGHT - 8, class_="soft", font_size=12))
    parts.append(tag("text", f"{text.count(most)} items", x=_WIDTH - 12, y=_HEIGHT - 8, text_anchor="end", class_="soft", font_size=12))
    return picture(_WIDTH, _HEIGHT, *parts, label="score in % over items", class_="course")
