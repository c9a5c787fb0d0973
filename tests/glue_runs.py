"""Shared by the short and the long kill tests: run `modelglue glue`, kill its process group, compare what is left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from tests.conftest import REPOSITORY

#: files whose bytes are a function of inputs and seeds
COMPARED = ("decisions.json", "families.json", "zoo.json", "results.json", "recipe.yaml")


def start_glue(glue_file: Path, run: Path) -> subprocess.Popen[bytes]:
    """`modelglue glue` in a process group of its own, so that one signal reaches its workers too."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "modelglue", "glue", str(glue_file), str(run), "--quiet"]
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of every compared file: JSON, recipes, and all that stands in representatives/ and mixture/."""
    paths = [run / name for name in COMPARED]
    for folder in ("representatives", "mixture"):
        paths += sorted(path for path in (run / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def assert_no_half_model(run: Path) -> None:
    """Every model folder under a final name is complete: config, weights that the safetensors library opens, recipe."""
    from safetensors import safe_open

    for folder in (run / "representatives").glob("*"):
        if folder.name.startswith("."):
            continue
        assert json.loads((folder / "config.json").read_text())["model_type"]
        assert (folder / "modelglue_recipe.yaml").is_file()
        weights = sorted(folder.glob("*.safetensors"))
        assert weights, folder
        for path in weights:
            with safe_open(path, framework="pt") as opened:
                assert list(opened.keys())
    if (run / "mixture").exists():
        json.loads((run / "mixture" / "mixture.json").read_text())


def committed_items(run: Path) -> int:
    """Item scores that the store holds."""
    store = run / "scores.sqlite"
    if not store.exists():
        return 0
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM scores").fetchone()[0])


def computed_items(run: Path) -> tuple[int, int]:
    """(items scored over all processes of this run, largest batch), from the log."""
    total = largest = 0
    for line in (run / "log.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed process
        if event["event"] == "batch":
            total += event["items"]
            largest = max(largest, event["items"])
    return total, largest
