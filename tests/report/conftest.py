"""Fake runs, written once: they are read only, or copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelglue.report import write_report
from tests.report.fake_run import write_fake_run
from tests.report.tree import Node, parse

SMALL = {"proxy": 20, "confirmation": 20, "test": 30}
#: name -> how the run differs from the plain one
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small": {"items": SMALL},
    "many": {"models": 40, "items": {"proxy": 10, "confirmation": 10, "test": 20}},
    "one-family": {"models": 8, "items": {"proxy": 20}},
    "one-model": {"models": 1, "items": SMALL, "base": None},
    "no-test": {"items": {"proxy": 20, "confirmation": 20}},
    "bad-merges": {"items": SMALL, "blending": -0.5},
    "bad-mixture": {"items": SMALL, "astray": 1},
}
HOSTILE = {
    "reverse": "<script>alert('x')</script>",
    "sort": "a\"b'c&d<e>&amp;",
    "next": "名前 🦙 ünï\u202edrawkcab\u0000",
    "generalist": "x" * 300,
    "drifted": "]]></title></style></svg>--> <!-- ",
    "stranger": "{{ 7 * 7 }} {% raw %} ${7}",
}
HOSTILE_SKILLS = ("<b>bold</b>", '"onmouseover="alert(1)', "&lt;&#60;", "y" * 200, "`')//\\")


class Runs:
    """Every kind of run, written when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pages: dict[str, Node] = {}

    def folder(self, kind: str) -> Path:
        run = self.root / kind
        if not run.exists():
            options = (
                KINDS[kind] if kind in KINDS else {"rename": HOSTILE, "skills": HOSTILE_SKILLS, "name": HOSTILE["reverse"], "items": SMALL}
            )
            write_fake_run(run, **options)
            write_report(run)
        return run

    def text(self, kind: str) -> str:
        return (self.folder(kind) / "report.html").read_text(encoding="utf-8")

    def page(self, kind: str) -> Node:
        if kind not in self._pages:
            self._pages[kind] = parse(self.text(kind))
        return self._pages[kind]

    def json(self, kind: str, name: str) -> Any:
        return json.loads((self.folder(kind) / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the plain run that a test may spoil, without its page."""

    def make() -> Path:
        target = tmp_path / "run"
        shutil.copytree(runs.folder("plain"), target)
        (target / "report.html").unlink()
        return target

    return make
