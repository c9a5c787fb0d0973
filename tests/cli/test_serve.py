"""`modelglue serve` as a process, and what it refuses before it listens."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from modelglue.errors import UserError
from modelglue.serve import Engine, ModelHost
from modelglue.serve.run import serving
from tests.cli.conftest import Run
from tests.conftest import REPOSITORY
from tests.mixture.making import alone
from tests.models.tiny import bigram_model, letters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "chain"
    bigram_model({"a": "b", "b": "c", "c": "d"}, letters()).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def test_a_process_that_serves_until_it_is_interrupted(model: Path) -> None:
    command = [sys.executable, "-m", "modelglue", "serve", str(model), "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "MODELGLUE_API_KEY": "secret"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = "".join(iter(process.stdout.readline, "}\n")) + "}"
        where = json.loads(said)
        assert where["model"] == "chain"
        address = urlsplit(where["url"])
        assert (address.hostname, address.path) == ("127.0.0.1", "/v1")
        wire = http.client.HTTPConnection("127.0.0.1", address.port)
        body = json.dumps({"model": "chain", "prompt": "a", "max_tokens": 3, "temperature": 0})
        wire.request("POST", "/v1/completions", body, {"Content-Type": "application/json", "Authorization": "Bearer secret"})
        assert json.loads(wire.getresponse().read())["choices"][0]["text"] == "bcd"
        wire.close()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (0, "stopped\n")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached by others. Give an API key (--api-key-file), or listen on 127.0.0.1."),
        (["--host", "no.such.host.invalid"], "is no address of this machine"),
        (["--port", "70000"], "port 70000: there is no such port; allowed is 1 to 65535, or 0 for any that is free."),
        (["--rows", "0"], "the limit of rows is 0; allowed is a number from 1."),
        (["--max-body", "much"], "--max-body"),
        (["--api-key-file", "nowhere"], "nowhere: cannot be read"),
        (["--residency", "lru:1"], "is one model, and --residency says"),
    ],
)
def test_what_is_refused_before_anything_listens(run: Run, model: Path, options: list[str], said: str) -> None:
    result = run("serve", model, *options)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


@pytest.mark.parametrize("content", ["", "two words", "späh"])
def test_keys_that_are_none(run: Run, model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content, encoding="utf-8")
    result = run("serve", model, "--api-key-file", tmp_path / "key")
    assert (result.code, "holds no key" in result.err) == (2, True)


def test_the_variables_key_is_taken_as_a_files_is(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str | None] = []
    monkeypatch.setattr("modelglue.serve.run.serve", lambda *_, api_key, **__: taken.append(api_key))
    for value in ("secret\n", ""):
        monkeypatch.setenv("MODELGLUE_API_KEY", value)
        assert run("serve", model).code == 0
    assert taken == ["secret", None]
    monkeypatch.setenv("MODELGLUE_API_KEY", "two words")
    assert run("serve", model).err == "error: MODELGLUE_API_KEY: holds no key; allowed is one line of letters, digits and signs.\n"


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_without_the_extra_the_message_names_it(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    result = run("serve", model)
    assert result.code == 2
    assert result.err.startswith("error: serving needs the extra `serve`")
    assert "pip install 'modelglue[serve]'" in result.err


def test_an_address_that_is_taken(model: Path) -> None:
    with serving(Engine(ModelHost(alone(model.parent, "chain"))), "one") as url:
        port = urlsplit(url).port
        assert port is not None
        with (
            pytest.raises(UserError, match=rf"127.0.0.1:{port}: cannot be listened on"),
            serving(Engine(ModelHost(alone(model.parent, "chain"))), "two", port=port),
        ):
            pass
