"""The application around the commands: help, versions, wrong words, completion, signals, pipes."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from cyclopts import App

import modelglue
from modelglue.cli.app import COMMANDS
from tests.cli.conftest import Run, tree
from tests.conftest import REPOSITORY
from tests.recipe.on_disk import write_recipe

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"}
MODELGLUE = (sys.executable, "-m", "modelglue")


def start(*tokens: str | Path, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [*MODELGLUE, *map(str, tokens)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


# -- help -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), ("--help",), ("-h",)])
def test_the_list_of_commands(run: Run, tokens: tuple[str, ...]) -> None:
    found = run(*tokens)
    assert (found.code, found.err) == (0, "")
    assert "Usage: modelglue COMMAND" in found.out
    assert "Add --traceback to any command to see where an error came from." in found.text
    for name in COMMANDS:
        assert f"│ {name} " in found.out
    # the whole line of help stands there, though it may be broken into several
    flat = " ".join(found.out.replace("│", " ").split())
    for _, text in COMMANDS.values():
        assert text in flat


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_its_docstring(run: Run, command: str) -> None:
    found = run(command, "--help")
    assert (found.code, found.err) == (0, "")
    module, _, function = COMMANDS[command][0].partition(":")
    target = getattr(import_module(module), function)
    doc = target.help if isinstance(target, App) else inspect.getdoc(target)  # search is a list of commands itself
    assert doc
    flat = " ".join(found.out.replace("│", " ").split())
    for paragraph in doc.partition("Parameters\n---")[0].strip().split("\n\n"):
        assert " ".join(paragraph.replace("`", "").split()) in flat
    assert "[default: False]" not in flat
    assert "[default: None]" not in flat


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"{modelglue.__version__}\n"


# -- wrong words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("mege", "'merge'"),
        ("Merge", "'merge' or 'serve'"),
        ("method", "'methods'"),
        ("inspct", "'inspect'"),
        ("similarty", "'similarity'"),
        ("chekc", "'check'"),
    ],
)
def test_a_mistyped_command(run: Run, word: str, near: str) -> None:
    found = run(word, "x", "y")
    assert (found.code, found.out) == (2, "")
    assert found.err == f"error: there is no command '{word}'. Did you mean {near}? Known: {', '.join(COMMANDS)}.\n"


def test_a_word_that_is_like_no_command(run: Run) -> None:
    assert run("zzzzzz").err == f"error: there is no command 'zzzzzz'. Known: {', '.join(COMMANDS)}.\n"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("merge",), "requires an argument"),
        (("merge", "r.yaml"), "requires an argument"),
        (("check",), "requires an argument"),
        (("inspect",), "requires an argument"),
        (("inspect", "a", "b"), "Unused Tokens: ['b']."),
        (("methods", "--jsno"), "Did you mean --json?"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_wrong_arguments(run: Run, tokens: tuple[str, ...], expected: str) -> None:
    found = run(*tokens)
    assert (found.code, found.out) == (2, "")
    assert expected in " ".join(found.err.replace("│", " ").split())
    assert "Traceback" not in found.err


# -- completion -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = run("--install-completion", "--shell", shell, "--output", tmp_path / "script")
    assert found.code == 0
    script = (tmp_path / "script").read_text()
    for name in COMMANDS:
        assert name in script
    assert "shard-size" in script
    if (binary := shutil.which(shell)) is not None:
        assert subprocess.run([binary, "-n", tmp_path / "script"], check=False).returncode == 0


def test_bash_completes_with_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    monkeypatch.setenv("HOME", str(tmp_path))
    run("--install-completion", "--shell", "bash", "--output", tmp_path / "script")
    ask = (
        "source ./script; COMP_WORDS=(modelglue m); COMP_CWORD=1; COMP_LINE='modelglue m'; COMP_POINT=11; "
        "function=$(complete -p modelglue | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); $function; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run([bash, "--norc", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["merge", "merge-adapters", "methods", "mix"]


# -- as a process -----------------------------------------------------------------------------------------------------------------


def test_a_merge(zoo: Path) -> None:
    code, out, err = finish(start("merge", "recipe.yaml", "out", cwd=zoo))
    assert (code, out) == (0, "")
    assert err.startswith("out: 14 tensors, 1.9 kB (")
    code, out, err = finish(start("merge", "out/modelglue_recipe.yaml", "again", "--quiet", cwd=zoo))
    assert (code, out, err) == (0, "", "")
    assert tree(zoo / "again") == tree(zoo / "out")
    code, out, err = finish(start("merge", "out/modelglue_recipe.yaml", "elsewhere/again", "--quiet", cwd=zoo))
    assert (code, out, err) == (0, "", "")
    assert (zoo / "elsewhere" / "again" / "model.safetensors").read_bytes() == (zoo / "out" / "model.safetensors").read_bytes()


def test_an_error(zoo: Path) -> None:
    write_recipe(zoo / "recipe.yaml", "method: liner\nmodels:\n  - {model: a, weight: 1}\n")
    code, out, err = finish(start("merge", "recipe.yaml", "out", cwd=zoo))
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe.yaml:1: method: there is no merge method 'liner'.")
    assert len(err.splitlines()) == 1
    code, out, err = finish(start("merge", "recipe.yaml", "out", "--traceback", cwd=zoo))
    assert (code, out) == (2, "")
    assert err.startswith("Traceback")


def test_ctrl_c(zoo: Path) -> None:
    """The recipe is a pipe that the merge waits for, so the signal comes while it runs, however slow the machine is."""
    os.mkfifo(zoo / "pipe.yaml")
    before = {path.name for path in zoo.iterdir()}
    # under nohup, or in the background of a script, tests inherit that the signal is ignored
    process = start("merge", "pipe.yaml", "out", cwd=zoo, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with (zoo / "pipe.yaml").open("w"):  # opens when the other end does
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
    assert (code, out, err) == (130, "", "interrupted; run it again to continue\n")
    assert {path.name for path in zoo.iterdir()} == before


@pytest.mark.parametrize("tokens", [("methods", "--json"), ("methods",), ("--help",)])
def test_a_reader_that_has_gone(tokens: tuple[str, ...]) -> None:
    """`modelglue methods | head`: no traceback, and nothing about exceptions that were ignored."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([*MODELGLUE, *tokens], env=ENVIRONMENT, text=True, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, err = process.communicate()
    assert (process.returncode, err) == (1, "")
