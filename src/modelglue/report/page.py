"""The page: one HTML file without network, put together from the run's files.

Names in a run are other people's text: the templates escape everything, the pictures escape everything, and the page's own
policy lets no script run but the one below, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from modelglue import __version__
from modelglue.checkpoint import write_bytes_atomic
from modelglue.report import cost, headline, heatmap, results, router, selection, text
from modelglue.report.read import RunData, read_run

REPORT = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: Path) -> Path:
    """Write report.html in the run folder, as far as the run has come; returns its path.

    Equal JSON files give an equal page, but for the section on time, which shows log.jsonl. Raises UserError for a folder that is
    no run, or where nothing was measured yet.
    """
    path = run / REPORT
    write_bytes_atomic(path, render(read_run(run)).encode())
    return path


def render(data: RunData) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        score=text.score, gain=text.gain, interval=text.interval, similarity=text.similarity, count=text.count,
        parameters=text.parameters, size=text.size, listed=text.listed,
    )  # fmt: skip
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_digest(script)}'"
    return environment.get_template("page.html").render(
        version=__version__, style=Markup(style), script=Markup(script), policy=policy, **_views(data)
    )


def _views(data: RunData) -> dict[str, Any]:
    """What the templates show; None for parts that the run does not have (yet)."""
    decisions, found = data.decisions, data.results
    first = headline.headline(data)
    views: dict[str, Any] = {
        "complete": data.complete,
        "zoo": data.zoo,
        "family_of": data.family_of,
        "headline": first,
        "walk": headline.walk(data),
        "similarity": data.similarity,
        "families": data.families,
        "heatmap": heatmap.heatmap(data.similarity, data.families) if data.similarity is not None else None,
        "ranking": results.ranking(decisions, data.family_of) if decisions else None,
        "decided": [selection.family_view(family) for family in decisions["families"]] if decisions else None,
        "experts": decisions["experts"] if decisions else None,
        "outcome": decisions["outcome"] if decisions else None,
        "router": None,
        "results": None,
        "comparisons": None,
        "split": found["split"] if found else None,
        "cost": cost.counts(found) if found else None,
        "times": cost.times(data.log),
    }
    if decisions and decisions["router"]:
        routing = found["routing"] if found else None
        views["router"] = router.router_view(decisions, routing, views["split"])
    if decisions and found:
        views["results"] = results.table(found, decisions["outcome"])
        views["comparisons"] = results.comparisons(found, decisions["outcome"]["name"])
    return views


def _digest(script: str) -> str:
    """How a content security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
