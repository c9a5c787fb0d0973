"""The page: one HTML file without network, put together from the run's files.

Names in a run are other people's text: the templates escape everything, the pictures escape everything, and the page's own
policy lets no script run but the one below, and nothing be loaded.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from modelglue import __version__
from modelglue.checkpoint import write_bytes_atomic
from modelglue.report import charts, cost, findings, headline, heatmap, progress, results, selection, text
from modelglue.report import router as routing
from modelglue.report.read import RunData, read_run

REPORT = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: Path) -> Path:
    """Write report.html in the run folder, as far as the run has come; returns its path.

    Equal JSON files give an equal page, but for what log.jsonl says: the times, and how far an unfinished run is. Raises UserError for a
    folder that is no run, where nothing was measured yet, or with a broken file.
    """
    path = run / REPORT
    write_bytes_atomic(path, render(read_run(run)).encode())
    return path


def render(data: RunData) -> str:
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_digest(script)}'"
    return _template().render(version=__version__, style=Markup(style), script=Markup(script), policy=policy, **_views(data))


@functools.cache
def _template() -> jinja2.Template:
    """The page's template, compiled once per process."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_showable,
    )  # fmt: skip
    environment.filters.update(
        score=text.score, gain=text.gain, interval=text.interval, similarity=text.similarity, count=text.count,
        parameters=text.parameters, size=text.size, listed=text.listed, number_of=text.number_of,
    )  # fmt: skip
    return environment.get_template("page.html")


def _views(data: RunData) -> dict[str, Any]:
    """What the templates show; None for parts that the run does not have (yet)."""
    return {
        "zoo": data.zoo,
        "progress": None if data.complete else progress.steps(data),
        "headline": headline.headline(data),
        "walk": headline.walk(data),
        "results": _results(data),
        "families": _families(data),
        **_decisions(data),
        "cost": cost.counts(data.results) if data.results else None,
        "times": (times := cost.times(data.log)),
        "time_finding": findings.cost(times) if times else None,
        "shape_key": charts.key,
    }


def _results(data: RunData) -> dict[str, Any] | None:
    if data.decisions is None or data.results is None:
        return None
    found, outcome = data.results, data.decisions["outcome"]
    return {
        "finding": findings.results(found, outcome),
        "split": found["split"],
        "final": outcome["name"],
        "kinds": results.KINDS,
        "by_skill": results.by_skill(found, outcome),
        "scores": results.scores(found, outcome),
        "against": results.against(found, outcome),
        "merges": results.merges(found),
    }


def _families(data: RunData) -> dict[str, Any] | None:
    if data.similarity is None and data.families is None:
        return None
    return {
        "finding": findings.families(data.families) if data.families else None,
        "found": data.families,
        "similarity": data.similarity,
        **(heatmap.view(data.similarity, data.families) if data.similarity is not None else {"heatmap": None}),
    }


def _decisions(data: RunData) -> dict[str, Any]:
    decisions = data.decisions
    if decisions is None:
        return dict.fromkeys(("ranking", "merging", "experts", "router"))
    found = data.results
    router = None
    if decisions["router"]:
        router = routing.router_view(decisions, found["routing"] if found else None, found["split"] if found else None)
        router["finding"] = findings.router(router)
    return {
        "ranking": {**results.ranking(decisions, data.family_of), "finding": findings.ranking(decisions)},
        "merging": {**selection.families_view(decisions["families"]), "finding": findings.merging(decisions)},
        "experts": {**routing.experts_view(decisions), "finding": findings.experts(decisions)},
        "router": router,
    }


def _showable(value: Any) -> Any:
    """Applied to all that the templates print, before it is escaped."""
    return text.showable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(script: str) -> str:
    """How a content security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
