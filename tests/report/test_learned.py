"""What the page says of a router that was learned from scores, or that could have been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelglue.report import write_report
from tests.report.conftest import Runs
from tests.report.tree import Node, parse

TRAINING = {"held_out": {"against": "prompts"}}


def page_with(runs: Runs, folder: Path, **router: Any) -> Node:
    shutil.copytree(runs.folder("small"), folder)
    path = folder / "decisions.json"
    decisions = json.loads(path.read_text(encoding="utf-8"))
    decisions["router"] |= router
    path.write_text(json.dumps(decisions), encoding="utf-8")
    write_report(folder)
    return parse((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("self_test", [True, False])
def test_a_learned_router(runs: Runs, tmp_path: Path, self_test: bool) -> None:
    tasks = {"reverse": {"trained": 0.9, "reference": 0.6, "oracle": 0.95}, "sort": {"trained": 0.5, "reference": 0.25, "oracle": 0.5}}
    learned = {
        "used": True,
        "message": "The router <learned>: +27.5 points.",
        "training": TRAINING,
        "held_out_tasks": tasks,
        "held_out_load": {},
    }
    without = {} if self_test else {"self_test": None, "margin": None, "condition_number": {"gate": None}}
    page = page_with(runs, tmp_path / "run", learned=learned, gate_mode="scores", **without)
    panel = page.panel("Learned from proxy scores")
    assert panel.all("p")[0].text == "The router <learned>: +27.5 points."
    assert [head.text for head in panel.all("th")][:4] == ["skill", "prompts", "learned", "best expert of the skill"]
    rows = [[cell.text for cell in row.nodes] for row in panel.one("tbody").all("tr")]
    assert rows == [["reverse", "60.0", "90.0", "95.0"], ["sort", "25.0", "50.0", "50.0"]]
    facts = [fact.text for fact in page.panel("The router").all("div", "value")]
    assert facts[-1] == "learned"
    assert len(facts) == (5 if self_test else 2)
    assert bool([panel for panel in page.all("h3") if panel.text.startswith("Self-test")]) == self_test


def test_nothing_to_learn_from(runs: Runs, tmp_path: Path) -> None:
    learned = {"used": False, "message": "8 scored items are too few.", "training": None, "held_out_tasks": {}, "held_out_load": {}}
    panel = page_with(runs, tmp_path / "run", learned=learned).panel("Learned from proxy scores")
    assert panel.one("p").text == "8 scored items are too few."
    assert not panel.all("table")
