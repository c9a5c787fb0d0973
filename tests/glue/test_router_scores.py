"""`modelglue mix` with `router.tasks`: experts are scored once, scores that a store has are used, and faults say where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelglue.cli.app import main
from modelglue.evaluation import ScoreStore, evaluate
from modelglue.glue.router_scores import RouterScores
from modelglue.mixture import Mixture
from modelglue.mixture.levels import prepare
from tests.small_zoo import TINY_ZOO, write_tasks, write_yaml

SKILLS = ["reverse", "double"]
ITEMS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a file whose experts have prompts that mislead."""
    made = tmp_path_factory.mktemp("mix")
    write_tasks(made / "tasks", SKILLS, items=ITEMS)
    write_yaml(made / "mixture.yaml", file())
    return made


def file(**router: Any) -> dict[str, Any]:
    experts = [
        {"model": str(TINY_ZOO / "models" / name), "name": name, "prompts": {"positive": [f"{wrong}: abcd ="]}}
        for name, wrong in (("reverse", "double"), ("stranger", "reverse"))
    ]
    tasks = [f"{skill}_proxy" for skill in SKILLS]
    return {"level": "model", "experts": experts, "router": {"tasks": tasks, "include": "tasks", "store": "scores.sqlite", **router}}


def mixed(capsys: pytest.CaptureFixture[str], *tokens: str) -> Any:
    with pytest.raises(SystemExit) as left:
        main(["mix", *tokens, "--json"])
    assert not left.value.code
    return json.loads(capsys.readouterr().out)["router"]


def test_scores_are_made_once_and_teach_the_router(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(
        TINY_ZOO / "models" / "reverse", [f"{skill}_proxy" for skill in SKILLS], include=folder / "tasks", store=folder / "scores.sqlite"
    )
    said = mixed(capsys, str(folder / "mixture.yaml"), str(tmp_path / "first"))
    assert said["newly_scored"] == 2 * ITEMS  # the stranger's; `reverse` was evaluated before
    assert (said["used"], said["training"]["held_out"]["against"], said["training"]["items"]) == (True, "prompts", 2 * ITEMS)
    assert [route.name for route in Mixture.load(tmp_path / "first").route(["reverse: abc =", "double: abc ="])] == ["reverse", "stranger"]
    again = mixed(capsys, str(folder / "mixture.yaml"), str(tmp_path / "second"))
    assert again == {**said, "newly_scored": 0}
    for name in ("router.safetensors", "mixture.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_was_scored_before_a_stop_is_kept(folder: Path, tmp_path: Path) -> None:
    class Stopping:
        def __init__(self, name: str, total: int) -> None:
            self.name, self.total = name, total

        def __enter__(self) -> Any:
            def listen(_skill: str, _items: int) -> None:
                raise KeyboardInterrupt

            return listen if self.name == "stranger" else None

        def __exit__(self, *_: object) -> None:
            pass

    value = file()
    del value["router"]["store"]
    with pytest.raises(KeyboardInterrupt):
        prepare(value, folder, RouterScores(tmp_path / "own.sqlite", Stopping))
    with ScoreStore(tmp_path / "own.sqlite") as store:
        before = store.counts()[1]
    scores = RouterScores(tmp_path / "own.sqlite")
    made = prepare(value, folder, scores)
    assert 2 * ITEMS < before < 4 * ITEMS
    assert scores.fresh == 4 * ITEMS - before
    assert made.learned is not None
    assert made.learned["used"] is True


@pytest.mark.parametrize(
    ("router", "place", "what"),
    [
        ({"tasks": ["revers_proxy"]}, "router.tasks", "revers_proxy"),
        ({"include": "nowhere"}, "router.include", "nowhere: no such folder"),
        ({"store": "mixture.yaml"}, "router.store", "mixture.yaml: "),
        ({"store": "no/where.sqlite"}, "router.store", "cannot be used as a store of scores"),
    ],
)
def test_tasks_and_stores_that_cannot_be_used(
    router: dict[str, Any], place: str, what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_yaml(folder / "faulty.yaml", file(**router))
    with pytest.raises(SystemExit) as left:
        main(["mix", str(path), str(tmp_path / "out")])
    assert left.value.code == 2
    said = capsys.readouterr().err
    number = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(f"{place.partition('.')[2]}:"))
    assert f"faulty.yaml:{number}: {place}: " in said.replace("\n", "")
    assert what in said.replace("\n", " ")
    assert not (tmp_path / "out").exists()
