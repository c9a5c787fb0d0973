"""`modelglue glue` and `modelglue demo`: what they print, that they go on where they stopped, and which zoo the demo takes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelglue.cli import demo
from modelglue.cli.summary import print_summary
from modelglue.glue import GlueResult, glue
from tests.cli.conftest import Run
from tests.conftest import REPOSITORY
from tests.glue_runs import fingerprint
from tests.small_zoo import glue_file, write_pair_zoo, write_yaml

STEPS = [
    "hashing the models", "comparing weights", "2 families of 2, 1", "scoring every model on the proxy items",
    "choosing members and coefficients", "average 1/1: takes in reverse-b, score", "writing the merged models",
    "joining the experts with a router", "scoring on items that no decision has seen",
]  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue") / "zoo"
    return write_pair_zoo(folder, ["reverse", "double"], items=4, select={"strategy": "average"})


@pytest.fixture(scope="module")
def done(zoo: Path) -> GlueResult:
    """A finished run of it."""
    return glue(zoo, zoo.parents[1] / "run")


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# -- glue -------------------------------------------------------------------------------------------------------------------------


def test_what_a_run_prints(run: Run, zoo: Path, tmp_path: Path) -> None:
    """The steps on standard error while it works, the result on standard output."""
    found = run("glue", zoo, tmp_path / "run")
    assert found.code == 0
    printed = lines(found.err)
    assert len(printed) == len(STEPS)
    for line, step in zip(printed, STEPS, strict=True):
        assert re.match(rf"\d+:\d\d {re.escape(step)}", line), line

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    out = lines(found.out)
    assert "family 0 reverse, reverse-b" in out
    assert "family-0 = 0.500 reverse + 0.500 reverse-b (average)" in out
    assert "expert family-0 best on reverse" in out
    assert "expert stranger best on double" in out
    for row in results["models"]:
        low, high = row["interval"]
        scores = [f"{row['tasks'][skill]['score'] * 100:.1f}" for skill in ("reverse", "double")]
        line = " ".join([row["name"], *scores, f"{row['mean'] * 100:.1f}", f"{low * 100:.1f} to {high * 100:.1f}"])
        assert line in out
    first = results["comparisons"][0]
    assert any(line.startswith(f"result against {first['b']}: {first['difference'] * 100:+.1f} points (") for line in out)
    assert out[-3] == "result mixture of family-0, stranger"
    assert out[-2] == f"scored {results['cost']['candidates']} models and candidates, {results['cost']['items_scored']} items"
    assert out[-1] == f"report {tmp_path}/run/report.html"
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")


def test_a_finished_run_is_only_read(run: Run, done: GlueResult, zoo: Path) -> None:
    before = fingerprint(done.run)
    found = run("glue", zoo, done.run)
    assert (found.code, found.err) == (0, "")
    assert "items (already complete, nothing was done)" in found.text
    page = (done.run / "report.html").read_bytes()
    again = json.loads(run("glue", zoo, done.run, "--json").out)
    assert again["already_complete"] is True
    assert (done.run / "report.html").read_bytes() == page
    assert fingerprint(done.run) == before


def test_json(run: Run, done: GlueResult, zoo: Path) -> None:
    found = run("glue", zoo, done.run, "--json")
    assert found.err == ""
    assert json.loads(found.out) == {
        "run": str(done.run), "report": str(done.run / "report.html"), "already_complete": True,
        "outcome": done.outcome, "results": done.results,
    }  # fmt: skip


def test_quiet(run: Run, done: GlueResult, zoo: Path) -> None:
    found = run("glue", zoo, done.run, "--quiet")
    assert (found.code, found.out, found.err) == (0, "", "")


def test_a_recipe(run: Run, done: GlueResult, tmp_path: Path) -> None:
    """Rebuilt without a step of the search; there is nothing to report on."""
    found = run("glue", done.run / "recipe.yaml", tmp_path / "again")
    assert (found.code, found.err) == (0, "")
    assert found.out == f"{tmp_path}/again: rebuilt; the result is the mixture\n"
    value = json.loads(run("glue", done.run / "recipe.yaml", tmp_path / "again", "--json").out)
    assert value == {
        "run": f"{tmp_path}/again", "report": None, "already_complete": False, "outcome": done.outcome, "results": None,
    }  # fmt: skip
    assert not (tmp_path / "again" / "report.html").exists()


def test_on_a_terminal(run: Run, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines, above one that says how much has been scored."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    found = run("glue", zoo, tmp_path / "run")
    assert found.code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.err)
    assert all(step in text for step in STEPS)
    assert f"{STEPS[-1]} - 128 items scored" in text


def test_warnings_of_every_step_are_printed(run: Run, zoo: Path, tmp_path: Path) -> None:
    """Once each, in the order of the steps, and as they are, whatever they look like."""
    shutil.copytree(zoo.parent, tmp_path / "zoo")
    models = tmp_path / "zoo" / "models"
    shutil.rmtree(models / "reverse-b")
    shutil.copytree(models / "reverse", models / "reverse-b")
    found = run("glue", tmp_path / "zoo" / "zoo.yaml", tmp_path / "run")
    warnings = [line for line in found.out.splitlines() if line.startswith("warning: ")]
    assert warnings[0] == "warning: 'reverse-b' and 'reverse' are the same model, byte for byte."
    assert sum("proxy cannot tell these models apart" in warning for warning in warnings) == 1


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("single", "llama-pro", "single model llama-pro"),
        ("merge", "family-0", "merged model family-0"),
        ("single", "of", "single model of"),
        ("mixture", "mixture", "mixture"),
    ],
)
def test_the_name_of_a_result_is_whole(done: GlueResult, tmp_path: Path, kind: str, name: str, expected: str) -> None:
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    print_summary(GlueResult(tmp_path, {"kind": kind, "name": name}, None, False), None, Console(file=stream))
    assert stream.getvalue() == f"{tmp_path}: rebuilt; the result is the {expected}\n"


def test_stopped_by_the_user(run: Run, zoo: Path, done: GlueResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a model answers: exit code 130, and the next call goes on."""
    from modelglue.models import LiveTextModel

    generate, calls = LiveTextModel.generate, iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> list[str]:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LiveTextModel, "generate", interrupted)
        found = run("glue", zoo, done.run.with_name("stopped"), "--quiet")
    assert (found.code, found.out, found.err) == (130, "", "interrupted; run it again to continue\n")
    assert run("glue", zoo, done.run.with_name("stopped"), "--quiet").code == 0
    assert fingerprint(done.run.with_name("stopped")) == fingerprint(done.run)


def test_workers(run: Run, zoo: Path, tmp_path: Path) -> None:
    for command in (("glue", zoo, tmp_path / "run"), ("demo", tmp_path / "run")):
        found = run(*command, "--workers", "0")
        assert found.code != 0
        assert "--workers" in found.out + found.err
    assert list(tmp_path.iterdir()) == []


# -- demo -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which the small zoo is the one that comes with the sources."""
    checkout = tmp_path / "checkout"
    shutil.copytree(zoo.parent, checkout / "examples" / "tiny-zoo")
    monkeypatch.setattr(demo, "__file__", str(checkout / "src" / "modelglue" / "cli" / "demo.py"))
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return checkout


def test_the_demo_is_glue_on_the_zoo_of_the_repository(run: Run, beside: Path, tmp_path: Path, done: GlueResult) -> None:
    """By default in runs/demo below the working folder; called again it has nothing to do."""
    found = run("demo", "--json")
    assert (found.code, found.err) == (0, "")
    value = json.loads(found.out)
    assert (value["run"], value["report"]) == ("runs/demo", "runs/demo/report.html")
    assert (value["outcome"], value["results"]) == (done.outcome, done.results)
    assert (tmp_path / "desk" / "runs" / "demo" / "report.html").is_file()
    again = run("demo", "runs/demo", "--json")
    assert json.loads(again.out) == {**value, "already_complete": True}
    assert run("demo", "--quiet").out == ""


def test_the_demo_below_the_working_folder(run: Run, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is installed without the repository, a checkout one stands in will do."""
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "modelglue" / "cli" / "demo.py"))
    monkeypatch.chdir(beside)
    assert demo._zoo_file() == beside / "examples" / "tiny-zoo" / "zoo.yaml"


def test_the_demo_without_a_zoo(run: Run, beside: Path, tmp_path: Path) -> None:
    shutil.rmtree(beside / "examples")
    found = run("demo")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"error: the tiny zoo is not here (looked for {beside}/examples/tiny-zoo/zoo.yaml and {tmp_path}/desk/examples/tiny-zoo/zoo.yaml). "
        "It comes with the repository: clone it and run `make demo` there.\n"
    )
    assert not (tmp_path / "desk" / "runs").exists()


def test_the_demo_starts_afresh_when_asked(run: Run, beside: Path, tmp_path: Path) -> None:
    (tmp_path / "desk" / "old").mkdir()
    (tmp_path / "desk" / "old" / "run.json").write_text('{"key": "other", "complete": true}')
    assert run("demo", "old").code == 2
    write_yaml(beside / "examples" / "tiny-zoo" / "zoo.yaml", glue_file(["stranger"], ["double"]))
    assert run("demo", "old", "--overwrite", "--quiet").code == 0
    assert json.loads((tmp_path / "desk" / "old" / "run.json").read_text())["complete"] is True


def test_the_zoo_of_this_repository() -> None:
    assert demo._zoo_file() == REPOSITORY / "examples" / "tiny-zoo" / "zoo.yaml"
