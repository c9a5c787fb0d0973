"""Other people's text stays text, nothing is loaded from anywhere, and equal runs give equal bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.report import write_report
from modelglue.report.page import render
from modelglue.report.read import RunData, read_run
from modelglue.report.text import showable
from tests.report.conftest import HOSTILE, HOSTILE_SKILLS, KINDS, Runs
from tests.report.fake_run import write_fake_run
from tests.report.tree import Node, parse

ALL = [*KINDS, "hostile"]
TAGS = """
    html head meta title style body header main section footer nav h1 h2 h3 h4 p div span b i a code ul ol li dl dt dd details summary
    table thead tbody tfoot tr th td svg g defs pattern line rect circle path polyline text script
"""
ATTRIBUTES = """
    aria-label charset class content cx cy d data-axis data-value fill font-size height href http-equiv id lang name open points r role rx
    patterntransform patternunits scope style text-anchor title transform viewbox width x x1 x2 y y1 y2
"""


def skeleton(page: Node) -> list[Any]:
    """Everything but the words and the numbers."""
    return [(node.tag, sorted(node.attributes), node.attributes.get("class"), node.attributes.get("id")) for node in page.walk()]


@pytest.mark.parametrize("kind", ALL)
def test_every_page_is_well_formed(runs: Runs, kind: str) -> None:
    page = runs.page(kind)
    assert page.tag == "html"
    assert [node.tag for node in page.nodes] == ["head", "body"]
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    anchors = {node.attributes["href"] for node in page.all("a")}
    assert anchors <= {f"#{name}" for name in ids}
    assert {"#zoo", "#results", "#families", "#ranking", "#merging", "#experts", "#cost"} == anchors
    for table in page.all("table"):
        widths = {len(row.nodes) for row in table.all("tr")}
        assert len(widths) == 1, f"rows of {widths} cells"


@pytest.mark.parametrize("kind", ALL)
def test_a_page_consists_of_known_elements_and_attributes(runs: Runs, kind: str) -> None:
    tags, attributes = set(TAGS.split()), set(ATTRIBUTES.split())
    for node in runs.page(kind).walk():
        assert node.tag in tags
        assert set(node.attributes) <= attributes, (node.tag, node.attributes)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_loaded_from_anywhere(runs: Runs, kind: str) -> None:
    text, page = runs.text(kind), runs.page(kind)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text.replace(HOSTILE_SKILLS[4].replace("'", "&#39;"), ""))
    assert set(re.findall(r"url\(([^)]*)\)", page.one("style").raw)) == {"#hatch"}
    assert page.by_id("hatch").tag == "pattern"
    assert not any("url(" in node.attributes.get("style", "") for node in page.walk())
    assert not page.all("link")


@pytest.mark.parametrize("kind", ALL)
def test_the_policy_allows_the_one_script_and_nothing_else(runs: Runs, kind: str) -> None:
    page = runs.page(kind)
    script = page.one("script")
    assert script.attributes == {}
    (policy,) = [node.attributes["content"] for node in page.all("meta") if node.attributes.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.raw.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert script.raw == runs.page("plain").one("script").raw


def test_hostile_names_change_no_element(runs: Runs) -> None:
    assert skeleton(runs.page("hostile")) == skeleton(runs.page("small"))


def test_hostile_names_are_shown_as_they_are(runs: Runs) -> None:
    page = runs.page("hostile")
    aliases = [cells[0].raw for cells in page.by_id("zoo").one("table").rows()]
    assert aliases == [showable(model["alias"]) for model in runs.json("hostile", "zoo")["models"]]
    assert {showable(name) for name in HOSTILE.values()} <= set(aliases)
    assert page.one("head").one("title").children == [f"{HOSTILE['reverse']} – modelglue report"]
    heads = [head.attributes["title"] for head in page.panel("Scores").all("th", "heat")[1:]]
    assert heads == list(HOSTILE_SKILLS)
    tooltips = [cell.one("title").children[0] for cell in page.one("svg", "heatmap").all("g", "cell")]
    for name in HOSTILE.values():
        assert sum(str(tip).startswith(showable(name)) for tip in tooltips) >= len(aliases)


def test_no_control_characters_reach_the_page(runs: Runs) -> None:
    text = runs.text("hostile")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "ünï\ufffddrawkcab\ufffd" in text


def test_half_a_surrogate_pair_does_not_stop_the_page(copy: Callable[[], Path]) -> None:
    run = copy()
    zoo = json.loads((run / "zoo.json").read_text())
    (run / "zoo.json").write_text(json.dumps({**zoo, "name": "zoo \ud83e end"}))
    assert (
        parse(write_report(run).read_text(encoding="utf-8")).one("header").one("p", "eyebrow").text == "modelglue report · zoo \ufffd end"
    )


def test_long_names_are_cut_in_pictures_only(runs: Runs) -> None:
    page, long = runs.page("hostile"), HOSTILE["generalist"]
    labels = [label.raw for label in page.one("svg", "heatmap").all("text")]
    assert labels.count("x" * 23 + "…") == 2
    assert long in [node.attributes.get("title") for node in page.panel("Scores").all("span", "name")]
    assert max(map(len, labels)) == 24
    assert float(page.one("svg", "heatmap").attributes["width"]) < 900


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """JSON with every string (and key) that is a name replaced, and every reason that lists names."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(one, names) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [renamed(one, names) for one in value]
    if isinstance(value, str) and value.startswith("best on "):
        return "best on " + ", ".join(names.get(word, word) for word in value.removeprefix("best on ").split(", "))
    return names.get(value, value) if isinstance(value, str) else value


def renamed_run(data: RunData, names: Mapping[str, str]) -> RunData:
    found = data.similarity
    assert found is not None
    return replace(
        data,
        similarity=replace(found, labels=tuple(names.get(label, label) for label in found.labels)),
        **{part: renamed(getattr(data, part), names) for part in ("zoo", "families", "decisions", "results")},
    )


#: three models, one skill
OLD = ["reverse-twin", "sort-twin", "generalist", "double"]
NAMES = st.lists(st.text(st.characters(), min_size=1, max_size=30), min_size=4, max_size=4, unique=True)
TAKEN = {"reverse", "sort", "next", "larger", "corrupted", "base", "average", "coefficient", "mixture", "merge", "single", "proxy"}


@given(names=NAMES.filter(lambda names: not (TAKEN | set(OLD)) & set(names)))
@settings(max_examples=8, deadline=None)
def test_any_name_is_text(runs: Runs, names: list[str]) -> None:
    """Whatever models and skills are called: the same elements, and the names word for word (but for control characters)."""
    data = read_run(runs.folder("one-family"))
    page = parse(render(renamed_run(data, dict(zip(OLD, names, strict=True)))))
    assert skeleton(page) == skeleton(runs.page("one-family"))
    aliases = [cells[0].raw for cells in page.by_id("zoo").one("table").rows()]
    skill = page.panel("Scores").all("th", "heat")[-1].attributes["title"]
    assert [*(aliases[place] for place in (1, 3, 6)), skill] == [showable(name) for name in names]


def test_equal_runs_give_equal_bytes(runs: Runs, tmp_path: Path) -> None:
    second = write_report(write_fake_run(tmp_path / "elsewhere", **KINDS["no-test"]))
    assert second.read_bytes() == (runs.folder("no-test") / "report.html").read_bytes()
    assert write_report(tmp_path / "elsewhere").read_bytes() == second.read_bytes()


def test_times_come_from_the_log_alone(copy: Callable[[], Path], runs: Runs) -> None:
    run = copy()
    log = run / "log.jsonl"
    log.write_text(log.read_text().replace('"seconds": 133.5', '"seconds": 7000').replace("18000", "18111"))
    for path in run.iterdir():
        path.touch()
    old, new = runs.text("plain"), write_report(run).read_text(encoding="utf-8")
    assert old != new
    before, after = re.compile(r'(?s).*(?=<section id="cost">)'), re.compile(r"(?s)</main>.*")
    for part in (before, after):
        assert part.search(old)[0] == part.search(new)[0]  # type: ignore[index]
    log.unlink()
    page = parse(write_report(run).read_text(encoding="utf-8"))
    assert not page.by_id("cost").all("div", "times")
    assert page.by_id("cost").all("dd", "value")[0].text == "204"


def test_the_report_is_no_input_of_itself(copy: Callable[[], Path]) -> None:
    run = copy()
    shutil.copytree(run, run / "mixture")
    (run / "report.html").write_text("<old>")
    assert "<old>" not in write_report(run).read_text()


def test_a_similarity_that_cannot_be_compared_anywhere(runs: Runs) -> None:
    data = read_run(runs.folder("one-model"))
    assert data.similarity is not None
    nothing = replace(data.similarity, matrix=np.full((1, 1), np.nan))
    cells = parse(render(replace(data, similarity=nothing))).one("svg", "heatmap").all("g", "cell")
    assert [cell.classes for cell in cells] == [["cell", "none"]]
