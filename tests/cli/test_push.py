"""`modelglue push` against a hub in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoint.outputs import write_output
from tests.cli.conftest import Run
from tests.cli.fake_hub import TOKEN, FakeHub, fake_hub

#: the hub's own library calls its http library in a way that one warns of
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = write_output(tmp_path / "out", recipe="method: linear\nbase: org/base\nmodels:\n- {model: ../a, weight: 1}\n")
    (folder / ".hidden").write_text("not of the output")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub that this process talks to; the libraries have read their environment long ago."""
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_everything_arrives(run: Run, hub: FakeHub, output: Path) -> None:
    found = run("push", output, "org/merged")
    assert found.code == 0, found.err
    assert found.out == f"{hub.url}/org/merged/commit/c0ffee\n"
    assert found.err == f"warning: the recipe in {output} names local paths, which everybody will see: ../a.\n"
    assert hub.files("org/merged") == visible(output)
    assert len(hub.files("org/merged")) == 5
    assert hub.repositories["org/merged"]["private"] is False
    assert hub.messages == ["Add out, merged by modelglue"]


def test_by_the_environment(tmp_path: Path, output: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN, in a process of its own."""
    with fake_hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        tokens = [sys.executable, "-m", "modelglue", "push", str(output), "org/merged", "--json"]
        done = subprocess.run(tokens, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {
            "folder": str(output), "repository": "org/merged", "commit": f"{hub.url}/org/merged/commit/c0ffee",
        }  # fmt: skip
        assert hub.files("org/merged") == visible(output)


def test_branch_message_and_privacy(run: Run, hub: FakeHub, output: Path) -> None:
    found = run("push", output, "org/merged", "--private", "--revision", "v2", "--message", "Second try", "--quiet")
    assert (found.code, found.out, found.err) == (0, "", "")
    assert hub.files("org/merged", "v2") == visible(output)
    assert hub.files("org/merged") == {}
    assert hub.repositories["org/merged"]["private"] is True
    assert hub.messages == ["Second try"]


def test_what_is_there_is_not_sent_again(run: Run, hub: FakeHub, output: Path) -> None:
    assert run("push", output, "org/merged").code == 0
    assert sum(line.startswith("PUT") for line in hub.log) == 1
    assert run("push", output, "org/merged").code == 0
    assert sum(line.startswith("PUT") for line in hub.log) == 1
    assert hub.files("org/merged") == visible(output)


def test_a_public_repository_is_no_private_one(run: Run, hub: FakeHub, output: Path) -> None:
    hub.repositories["org/merged"] = {"private": False, "branches": {"main": {}}}
    found = run("push", output, "org/merged", "--private")
    assert (found.code, "exists and is public" in found.err) == (2, True)
    assert hub.files("org/merged") == {}


def test_incomplete_outputs_are_refused_before_anything_is_asked(run: Run, hub: FakeHub, output: Path, zoo: Path) -> None:
    found = run("push", zoo / "a", "org/merged")
    assert (found.code, "holds no modelglue_record.json" in found.err) == (2, True)
    (output / "modelglue_recipe.yaml").write_text("method: ties\n")
    found = run("push", output, "org/merged")
    assert found.code == 2
    assert "is not what was written, so it is not uploaded:\n  modelglue_recipe.yaml: is not the recipe" in found.err
    assert run("push", zoo / "nowhere", "org/merged").code == 2
    assert hub.log == []


@pytest.mark.parametrize("name", ["merged", "a/b/c", "org/", "../x", "org/me rged"])
def test_names_of_repositories(run: Run, hub: FakeHub, output: Path, name: str) -> None:
    found = run("push", output, name)
    assert (found.code, "is no name of a repository. Allowed is org/name." in found.err) == (2, True)
    assert hub.log == []


def test_no_token(run: Run, hub: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    found = run("push", output, "org/merged")
    assert (found.code, "Set HF_TOKEN to a token with write permission" in found.err) == (2, True)
    assert hub.log == []


def test_a_wrong_token(run: Run, hub: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    found = run("push", output, "org/merged", "--quiet")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: 'org/merged': the token is not valid. Set HF_TOKEN to a valid one with write permission. (401")


@pytest.mark.parametrize(
    ("address", "status", "code", "expected"),
    [
        ("/repos/create", 403, 2, "the token may not write there"),
        ("/repos/create", 404, 2, "there is no such organisation, repository or revision"),
        ("/preupload/", 403, 2, "the token may not write there"),
        ("/commit/", 400, 2, "the hub refused:"),
        ("/blobs/", 403, 2, "the token may not write there"),
        ("/commit/", 501, 1, "the hub refused:"),
    ],
)
def test_refusals_of_the_hub(run: Run, hub: FakeHub, output: Path, address: str, status: int, code: int, expected: str) -> None:
    hub.refuse[address] = status
    found = run("push", output, "org/merged", "--quiet")
    assert found.code == code
    assert found.err.startswith(f"error: 'org/merged': {expected}")
    assert f"({status}" in found.err
    assert "Traceback" not in found.err
    assert hub.repositories.get("org/merged", {"branches": {"main": {}}})["branches"]["main"] == {}


def test_offline(run: Run, hub: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = run("push", output, "org/merged", "--quiet")
    assert (found.code, found.err) == (2, "error: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.\n")
    assert hub.log == []


def test_nobody_answers(run: Run, hub: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = run("push", output, "org/merged", "--quiet")
    assert found.code == 1
    assert found.err.startswith("error: 'org/merged': the hub at http://127.0.0.1:9 cannot be reached, or broke off (")
