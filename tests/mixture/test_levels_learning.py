"""Mixtures whose file asks for a router from scores: what is learned, when it is used, and recipes that need no scores any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import RecipeError
from modelglue.mixture import Mixture
from modelglue.mixture.levels import mix, prepare, read_mix
from modelglue.mixture.routing import ScoredItem, ScoredItems
from modelglue.models import load_live, load_tokenizer
from tests.models.tiny import letters, saved_model

RECIPE = "modelglue_recipe.yaml"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for number, name in enumerate(("a", "b")):
        saved_model(folder / name, "llama", number, tokenizer=letters())
    return folder


class Scores:
    """Expert 0 is right on letters, expert 1 on digits; or each on every other item (`noise`), or both always."""

    def __init__(self, count: int = 18, what: Literal["told", "noise", "alike"] = "told") -> None:
        self.asked: list[tuple[list[str], list[str]]] = []
        self.count, self.what = count, what

    def __call__(self, document: Any, router: Any, experts: Mapping[str, Checkpoint], folder: Path | None) -> ScoredItems:
        self.asked.append((list(router.tasks), list(experts)))
        rows = []
        for number in range(self.count):
            places = [number // 9 % 3, number // 3 % 3, number % 3]
            for task, signs, values in (("words", "abc", (1.0, 0.0)), ("numbers", "123", (0.0, 1.0))):
                text = "".join(signs[place] for place in places)
                odd = float(number % 2)
                rows.append(ScoredItem(task, str(number), text, {"told": values, "noise": (odd, 1 - odd), "alike": (1.0, 1.0)}[self.what]))
        return ScoredItems(tuple(experts), tuple(rows))


def file(
    level: str, *, swapped: bool = False, prompts: bool = True, more: Mapping[str, Any] | None = None, **router: Any
) -> dict[str, Any]:
    """`swapped`: each expert has the other's prompts, so that a router from prompts sends everything astray."""
    texts = [["abc", "cab"], ["123", "231"]]
    experts: list[dict[str, Any]] = [{"model": "a"}, {"model": "b"}]
    if prompts:
        for expert, own in zip(experts, reversed(texts) if swapped else texts, strict=True):
            expert["prompts"] = {"positive": own}
    return {"level": level, "experts": experts, "router": {"tasks": ["some"], "gate_mode": "hidden_avg", **router}, **(more or {})}


def choices(folder: Path) -> list[int]:
    """Where a mixture sends three letters and three digits: at the first layer that decides."""
    if (folder / "mixture.json").is_file():
        return [route.expert for route in Mixture.load(folder).route(["bca", "312"])]
    checkpoint = open_checkpoint(folder)
    model, tokenizer = load_live(checkpoint), load_tokenizer(checkpoint)
    found = []
    for text in ("bca", "312"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        model(ids, prompt_length=ids.shape[1])
        found.append(int(model.routing.logits[0].argmax()))
    return found


@pytest.mark.parametrize(
    ("level", "more"),
    [("model", {}), ("block", {}), ("block", {"top_k": 2, "merged_layers": 0}), ("model", {"share_io": True})],
    ids=["model", "block", "block-top2", "shared-io"],
)
def test_scores_outvote_misleading_prompts_and_the_recipe_needs_no_scores(
    level: str, more: dict[str, Any], zoo: Path, tmp_path: Path
) -> None:
    scores = Scores()
    made = mix(file(level, swapped=True, more=more), tmp_path / "out", folder=zoo, scorer=scores)
    assert scores.asked == [(["some"], ["a", "b"])]
    said = made.prepared.learned
    assert said is not None
    held_out = said["training"]["held_out"]
    assert said["used"] is True
    assert (held_out["trained"], held_out["against"], held_out["oracle"]) == (1.0, "prompts", 1.0)
    assert held_out["reference"] < 0.2
    assert held_out["difference"] == pytest.approx(1.0 - held_out["reference"])
    assert said["message"].startswith(f"The router learned from scores: {100 * held_out['difference']:+.1f} points (")
    assert choices(tmp_path / "out") == [0, 1]

    recipe = yaml.safe_load((tmp_path / "out" / RECIPE).read_text())
    kept = recipe["router"]["learned" if level == "model" and not more else "layer_gates"]
    assert kept["training"] == said["training"]
    assert "tasks" not in recipe["router"]
    again = mix(tmp_path / "out" / RECIPE, tmp_path / "again")
    assert again.prepared.learned is None
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("level", ["model", "block"])
def test_prompts_stay_where_scores_are_no_better(level: str, zoo: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"router_layer": 0, "encoder": "a"} if level == "model" else {}
    made = mix(file(level, **settings), tmp_path / "out", folder=zoo, scorer=Scores(10, "noise"))
    said = made.prepared.learned
    assert said is not None
    assert said["used"] is False
    assert said["message"].startswith("The router learned from scores is not better by more than chance, so the router from prompts stays")
    mix(file(level) | {"router": {"gate_mode": "hidden_avg", **settings}}, tmp_path / "plain", folder=zoo)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    asked = mix(file(level, source="scores", **settings), tmp_path / "asked", folder=zoo, scorer=Scores(10, "noise")).prepared.learned
    assert asked is not None
    assert (asked["used"], asked["training"]) == (True, said["training"])
    assert asked["message"].startswith("The router learned from scores, as asked; it is not better by more than chance")
    recipe = yaml.safe_load((tmp_path / "asked" / RECIPE).read_text())
    assert recipe["router"].keys() >= {"learned" if level == "model" else "layer_gates"}


@pytest.mark.parametrize("level", ["model", "block"])
def test_experts_need_no_prompts_where_scores_tell(level: str, zoo: Path, tmp_path: Path) -> None:
    made = mix(file(level, prompts=False), tmp_path / "out", folder=zoo, scorer=Scores())
    assert made.prepared.learned is not None
    held_out = made.prepared.learned["training"]["held_out"]
    assert (held_out["against"], held_out["reference"], held_out["difference"]) == ("best expert", 0.5, 0.5)
    assert choices(tmp_path / "out") == [0, 1]
    with pytest.raises(RecipeError, match=r"router\.tasks: all experts score alike: there is nothing .* There are no prompts to make one"):
        prepare(file(level, prompts=False), zoo, Scores(what="alike"))
    with pytest.raises(RecipeError, match=r"router\.source: is scores, but 4 scored items are too few \(at least 20\)"):
        prepare(file(level, source="scores"), zoo, Scores(2))


def test_equal_files_and_scores_give_equal_bytes(zoo: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        mix(file("block", swapped=True, objective="expected"), tmp_path / name, folder=zoo, scorer=Scores())
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name


def test_feed_forward_experts_keep_their_prompts(zoo: Path) -> None:
    scores = Scores()
    made = prepare(file("auto", swapped=True), zoo, scores)
    assert (made.level, scores.asked) == ("ffn", [])
    assert made.learned is not None
    assert made.learned["message"].startswith("The router is from prompts at the level ffn, where scores of complete models say nothing")
    with pytest.raises(
        RecipeError, match=r"router\.source: is scores, but the experts are joined at the level ffn, .* Say level: block or model"
    ):
        prepare(file("auto", source="scores"), zoo, scores)


@pytest.mark.parametrize(
    ("level", "router", "faults"),
    [
        ("model", "source: scores", ["router.source: is scores, but there are no items"]),
        ("ffn", "{source: scores, tasks: [x]}", ["router.source: is scores, which are of complete models"]),
        ("block", "{source: prompts, tasks: [x], store: s}", ["router.tasks: has no meaning for a", "router.store: has no meaning"]),
        ("block", "{store: s, objective: expected}", ["router.store: has no meaning without", "router.objective: has no"]),
        ("model", "{tasks: [x], kind: mlp}", ["router.kind: is mlp, which prompts cannot make"]),
        ("model", "{source: score}", ["router.source: is 'score'"]),
    ],
)  # fmt: skip
def test_faults_of_the_router_have_a_line(level: str, router: str, faults: list[str], tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    router = router if router.startswith("{") else f"{{{router}}}"
    path.write_text(f"level: {level}\nrouter: {router}\nexperts:\n- {{model: a, domain: [chat]}}\n- {{model: b, domain: [math]}}\n")
    with pytest.raises(RecipeError) as error:
        read_mix(path)
    lines = str(error.value).split("\n")
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(f"{path}:2: {fault}")


def test_learned_routers_that_do_not_fit_are_refused(zoo: Path, tmp_path: Path) -> None:
    recipes = {}
    for level, key in (("model", "learned"), ("block", "layer_gates")):
        mix(file(level, swapped=True), tmp_path / level, folder=zoo, scorer=Scores())
        recipes[level] = yaml.safe_load((tmp_path / level / RECIPE).read_text())
        spoiled = yaml.safe_load((tmp_path / level / RECIPE).read_text())
        spoiled["router"][key]["tensors"] = "bm90aGluZw=="
        with pytest.raises(RecipeError, match=rf"router\.{key}: the recipe's router cannot be read"):
            prepare(spoiled, tmp_path / level)
        beside = yaml.safe_load((tmp_path / level / RECIPE).read_text())
        beside["router"]["tasks"] = ["x"]
        with pytest.raises(RecipeError, match=r"router\.tasks: stands beside a router that has been learned"):
            prepare(beside, tmp_path / level)
    crossed = {**recipes["block"], "level": "model"}
    with pytest.raises(RecipeError, match=r"router\.layer_gates: is no router of the level model"):
        prepare(crossed, tmp_path / "block")
    deeper = {**recipes["block"], "merged_layers": 1}
    with pytest.raises(RecipeError, match=r"router\.layer_gates: the recipe's router has a tensor '0\.bias'; layers 1 to 1 decide"):
        prepare(deeper, tmp_path / "block")


def test_nobody_scores_unasked(zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"router\.tasks: needs the experts' scores, and nobody was given who scores"):
        prepare(file("model"), zoo)
