"""`modelglue report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modelglue.cli.app import main


def call(*arguments: object) -> int:
    """Exit code of the command."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_it_prints_the_path(copy: Callable[[], Path], capfd: pytest.CaptureFixture[str]) -> None:
    run = copy()
    assert call("report", run) == 0
    assert capfd.readouterr() == (f"{run / 'report.html'}\n", "")
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_gives_path_and_size(copy: Callable[[], Path], capfd: pytest.CaptureFixture[str]) -> None:
    run = copy()
    assert call("report", run, "--json") == 0
    out, err = capfd.readouterr()
    page = run / "report.html"
    assert json.loads(out) == {"report": str(page), "bytes": page.stat().st_size}
    assert err == ""


def test_quiet_prints_nothing(copy: Callable[[], Path], capfd: pytest.CaptureFixture[str]) -> None:
    run = copy()
    assert call("report", run, "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert (run / "report.html").stat().st_size > 100_000


def test_what_is_no_run_is_the_users_to_mend(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("report", tmp_path / "nowhere") == 2
    assert call("report", tmp_path) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        f"error: {tmp_path / 'nowhere'}: no such folder. Give the folder that `modelglue glue` wrote.\n"
        f"error: {tmp_path}: holds no run.json, so it is no modelglue-run/1 folder. Give the folder that `modelglue glue` wrote.\n"
    )


def test_a_broken_file_is_the_users_to_mend(copy: Callable[[], Path], capfd: pytest.CaptureFixture[str]) -> None:
    run = copy()
    (run / "decisions.json").write_text("{")
    assert call("report", run) == 2
    assert f"error: {run / 'decisions.json'}: is not JSON" in capfd.readouterr().err
