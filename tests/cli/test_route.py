"""`modelglue route`: which expert, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelglue.mixture import ExpertSpec, Mixture, RouterSpec, write_mixture
from tests.cli.conftest import Run
from tests.models.tiny import bigram_model, letters


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Behind `mixture` an encoder of unit vectors: logits are shares of letters. `both` asks two experts."""
    folder = tmp_path_factory.mktemp("routes")
    for name in ("a", "b", "c"):
        bigram_model({name: "x"}, letters()).save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    experts = [ExpertSpec(name, folder / name, (name,)) for name in ("a", "b", "c")]
    write_mixture(folder / "mixture", experts, RouterSpec(), encoder=folder / "a")
    write_mixture(folder / "both", experts, RouterSpec(top_k=2), encoder=folder / "a")
    return folder


def test_which_expert_and_why(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_expert(mixture: Mixture, reference: str) -> None:
        raise AssertionError(f"{reference} was loaded")

    monkeypatch.setattr(Mixture, "_load", no_expert)
    result = run("route", models / "mixture", "abb", "c", "")
    assert (result.code, result.err) == (0, "")
    assert [line.split() for line in result.out.splitlines()] == [
        ["text", "expert", "weight", "margin", "a", "b", "c"],
        ["abb", "b", "1.00", "0.250", "0.250", "0.500", "0.000"],  # shares of <s> a b b
        ["c", "c", "1.00", "0.500", "0.000", "0.000", "0.500"],
        ["a", "1.00", "no", "token"],
    ]


def test_json(run: Run, models: Path) -> None:
    mixture = Mixture.load(models / "both")
    (route,) = mixture.route(["aab"])
    (found,) = json.loads(run("route", models / "both", "aab", "--json").out)
    assert found["text"] == "aab"
    assert (found["expert"], found["weight"]) == ("a", pytest.approx(route.weight))
    assert found["also"] == [{"expert": "b", "weight": pytest.approx(1 - route.weight)}]
    assert found["logits"] == pytest.approx(dict(zip("abc", route.logits, strict=True)))
    assert found["margin"] == pytest.approx(route.logits[0] - route.logits[1])
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["probabilities"]["a"] / found["probabilities"]["b"] == pytest.approx(route.weight / (1 - route.weight))
    (nothing,) = json.loads(run("route", models / "mixture", "", "--json").out)
    assert (nothing["expert"], nothing["margin"], nothing["logits"]) == ("a", None, {})


def test_brackets_and_line_feeds_are_shown_as_they_are(run: Run, models: Path) -> None:
    out = run("route", models / "mixture", "a [b]\nc", "a" * 60).out
    assert r"a [b]\nc" in out
    assert "a" * 45 + "..." in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "x"], "is one model, so there is nothing to choose. Give the folder of a mixture."),
        (["mixture"], "no prompt: give at least one, as in `modelglue route MIXTURE"),
        (["mixture", "x", "--jsn"], "there is no option '--jsn'. Did you mean '--json'?"),
        (["nowhere", "x"], "nowhere"),
    ],
)
def test_what_cannot_be_routed(run: Run, models: Path, arguments: list[str], said: str) -> None:
    result = run("route", models / arguments[0], *arguments[1:])
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_a_corrupted_mixture(run: Run, models: Path) -> None:
    broken = models / "broken"
    broken.mkdir()
    (broken / "mixture.json").write_bytes((models / "mixture" / "mixture.json").read_bytes())
    (broken / "router.safetensors").write_bytes((models / "mixture" / "router.safetensors").read_bytes()[:-8])
    result = run("route", broken, "x")
    assert (result.code, result.out) == (2, "")
    assert "router.safetensors" in result.err
