"""A mixture's file: what it may say, how its faults read, and the folder that becomes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelglue.checkpoint import open_checkpoint
from modelglue.cli.app import main
from modelglue.errors import CheckpointError, RecipeError, UserError
from modelglue.mixture import Mixture
from modelglue.mixture.levels import mix, prepare, read_mix
from modelglue.mixture.levels.from_zoo import from_zoo
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from modelglue.recipe import parse_document
from tests.conftest import REPOSITORY
from tests.mixture.levels_making import logits, some_ids
from tests.models.tiny import letters, pieces, saved_model

FILE = """\
format: modelglue/1
level: {level}
{more}
experts:
- {{model: a, prompts: {{positive: [abc, word], negative: ["12"]}}}}
- {{model: b, name: numbers, prompts_from: numbers.txt}}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llamas, of which one has wider feed-forward networks, and a GPT-NeoX with another tokenizer."""
    folder = tmp_path_factory.mktemp("zoo")
    saved_model(folder / "a", "llama", 1, tokenizer=letters())
    saved_model(folder / "b", "llama", 2, tokenizer=letters())
    saved_model(folder / "wide", "llama", 3, tokenizer=letters(), intermediate_size=32)
    saved_model(folder / "bare", "llama", 4)
    saved_model(folder / "neox", "gpt_neox", 5, tokenizer=pieces())
    saved_model(folder / "moe", "mixtral", 6, tokenizer=letters())
    saved_model(folder / "deep", "llama", 7, tokenizer=letters(), num_hidden_layers=3)
    saved_model(folder / "own-code", "llama", 8, tokenizer=letters())
    config = json.loads((folder / "own-code" / "config.json").read_text())
    (folder / "own-code" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_x.X"}}))
    (folder / "numbers.txt").write_text("12\n\n345\n")
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(text)
    return path


def value(*models: str, **keys: Any) -> dict[str, Any]:
    """A file as a mapping: each expert knows one letter."""
    return {"experts": [{"model": model, "prompts": {"positive": [chr(97 + n)]}} for n, model in enumerate(models)], **keys}


def exit_code(*tokens: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(tokens))
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("more", "faults"),
    [
        ("top_k: 3", ["mixture.yaml:3: top_k: is 3; allowed is 1 to 2, the number of experts."]),
        ("routing: token", ["mixture.yaml:3: routing: is token, which the level block does not allow"]),
        ("shard: wide", ["mixture.yaml:3: shard: unknown key. Did you mean 'shared'"]),
        ("router: {router_layer: 1}", ["mixture.yaml:3: router.router_layer: has no meaning at the level block"]),
        ("pack: true", ["mixture.yaml:3: pack: has no meaning at the level block"]),
        ("share_io: true", ["mixture.yaml:3: share_io: is for level: model."]),
        ("merged_layers: -1\ntop_k: 0", ["mixture.yaml:4: top_k: is 0", "mixture.yaml:3: merged_layers: is -1"]),
    ],
)  # fmt: skip
def test_faults_have_a_line(more: str, faults: list[str], zoo: Path) -> None:
    with pytest.raises(RecipeError) as error:
        read_mix(written(zoo, FILE.format(level="block", more=more)), zoo)
    lines = str(error.value).split("\n")
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.removeprefix(f"{zoo}/").startswith(fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompts": {"positive": ["a"]}}, "experts[1]: has the same prompts as 'a', so no router can tell them apart"),
        ({"prompts": {"positive": []}}, "experts[1]: has no prompts for the router"),
        ({"prompts": {"positive": [" "]}}, "experts[1]: has an empty prompt"),
        ({"name": "a"}, "experts[1]: a second expert is called 'a'"),
        ({"prompts_from": "nix.txt"}, "experts[1].prompts_from: "),
        ({"name": "../up"}, "experts[1].name: "),
    ],
)  # fmt: skip
def test_experts_that_no_router_can_use(change: dict[str, Any], fault: str) -> None:
    file = value("a", "b")
    file["experts"][1] |= change
    with pytest.raises(RecipeError, match="experts") as error:
        read_mix(file)
    assert fault in str(error.value)


def test_prompts_come_from_the_expert_its_file_or_its_domain(zoo: Path) -> None:
    _, recipe = read_mix(written(zoo, FILE.format(level="ffn", more="") + "- {model: wide, domain: [math]}\n"), zoo)
    assert [one.prompts.positive for one in recipe.experts] == [
        ["abc", "word"], ["12", "345"], ["reason", "math", "mathematics", "solve", "count"],
    ]  # fmt: skip
    assert recipe.experts[2].prompts.negative[:2] == ["chat", "assistant"]
    assert read_mix(value("a", "b", router={"gate_mode": "random"}) | {"experts": [{"model": "a"}, {"model": "b"}]})[1].top_k == 1


def test_the_files_of_the_documents_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "math-prompts.txt").write_text("1 + 1\n")
    blocks = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "mixtures.md").read_text(encoding="utf-8"), re.DOTALL)
    found = [read_mix(parse_document(block, "mixtures.md"), tmp_path)[1] for block in blocks if "experts:" in block]
    assert [one.name for one in found[0].experts] == ["chat", "coder", "math"]


def test_a_zoo_file_is_a_mixture_and_its_faults_stay_where_they_were_written() -> None:
    text = "zoo:\n  models:\n  - {id: org/a, revision: v1, adapter: x, domain: [chat], scores: {arc: 0.5}}\n  - {id: b, alias: two}\n"
    document = from_zoo(parse_document(text + "mixture: {level: block, top_k: 2}\nrouter: {gate_mode: random}\n", "zoo.yaml"))
    _, recipe = read_mix(document)
    assert [(one.model, one.name) for one in recipe.experts] == [("org/a@v1+x", "a"), ("b", "two")]
    assert (recipe.level, recipe.top_k, recipe.router.gate_mode) == ("block", 2, "random")
    learning = "mixture: {level: block}\nrouter: {source: scores, tasks: [x], store: s, gate_mode: random}\n"
    _, recipe = read_mix(parse_document(text + learning, "zoo.yaml"))
    assert (recipe.router.source, recipe.router.tasks, recipe.router.store) == ("scores", ["x"], "s")
    _, recipe = read_mix(parse_document(text + "router: {source: scores, gate_mode: random}\n", "glue.yaml"))
    assert (recipe.router.source, recipe.router.gate_mode) == ("auto", "random")  # what glue learns from is its own matter
    with pytest.raises(RecipeError) as error:
        read_mix(parse_document(text + "mixture: {level: blok}\n", "zoo.yaml"))
    assert "zoo.yaml:5: mixture.level: is 'blok'" in str(error.value)


@pytest.mark.parametrize(
    ("models", "level", "reason", "works"),
    [
        (("a", "neox"), "ffn", "'neox' is a GPTNeoXForCausalLM, 'a' a LlamaForCausalLM", "model"),
        (("a", "deep"), "block", "'deep' has 3 layers, 'a' 2", "model"),
        (("moe", "moe2"), "block", "is made of several tensors when it is loaded", "model"),
        (("a", "own-code"), "ffn", "'own-code' needs modelling code of its own (auto_map)", "model"),
    ],
)
def test_levels_that_experts_do_not_allow_name_the_reason_and_what_works(
    models: tuple[str, ...], level: str, reason: str, works: str, zoo: Path
) -> None:
    file = value(*(model.removesuffix("2") for model in models), level=level)
    for expert, name in zip(file["experts"], models, strict=True):
        expert["name"] = name
    with pytest.raises(UserError) as error:
        prepare(file, zoo)
    assert reason in str(error.value)
    assert str(error.value).endswith(f"What works with them is level: {works}.")


def test_other_tokens_refuse_shared_embeddings(zoo: Path, tmp_path: Path) -> None:
    saved_model(tmp_path / "c", "llama", 4, tokenizer=pieces(), vocab_size=64)
    file = value("a", str(tmp_path / "c"), level="ffn")
    with pytest.raises(RecipeError, match=r"number their tokens differently \('.+' is \d+ and missing\)"):
        prepare(file, zoo)


def test_parts_that_are_not_there_are_named(zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"experts\[0\].model: 'nix'(.|\n)*experts\[1\].model: 'nox'"):
        prepare(value("nix", "nox"), zoo)
    with pytest.raises(RecipeError, match="shared: is no expert"):
        prepare(value("a", "b", shared="nix", level="ffn"), zoo)
    with pytest.raises(RecipeError, match="shared: the experts cannot be averaged"):
        prepare(value("a", "wide", level="ffn"), zoo)
    with pytest.raises(RecipeError, match="merged_layers: is 2; allowed is 0 to 1"):
        prepare(value("a", "b", merged_layers=2, level="ffn"), zoo)
    with pytest.raises(UserError, match="has no tokenizer, so no gate can be made from"):
        prepare(value("bare", "a", shared="bare", level="ffn"), zoo)
    with pytest.raises(RecipeError, match="export: no class of transformers holds this mixture"):
        prepare(value("a", "b", level="block", export="standard"), zoo)


@pytest.mark.parametrize(("models", "level"), [(("a", "b"), "ffn"), (("a", "deep"), "model"), (("a", "neox"), "model")])
def test_auto_takes_the_first_level_that_experts_allow(models: tuple[str, ...], level: str, zoo: Path) -> None:
    made = prepare(value(*models), zoo)
    assert made.level == level
    assert bool(made.why) == (level == "model")


def test_a_standard_class_gives_the_same_logits_as_our_own(zoo: Path) -> None:
    for changes in ({"top_k": 2}, {"merged_layers": 1, "router": {"temperature": 0.5, "gate_mode": "random"}}):
        file = value("a", "b", level="ffn", **changes)
        standard, own = prepare({**file, "export": "standard"}, zoo), prepare({**file, "export": "own"}, zoo)
        assert (standard.model_class, own.model_class) != ("MixtureForCausalLM", "MixtureForCausalLM")
        assert own.model_class == "MixtureForCausalLM"
        found = [logits(load_live(one.made), some_ids()) for one in (standard, own)]  # type: ignore[arg-type]
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_the_lowest_layers_are_those_of_any_merge(zoo: Path, tmp_path: Path) -> None:
    merged = {"method": "slerp", "base": "a", "models": [{"model": "b"}], "parameters": {"t": 0.3}}
    mix(value("a", "b", level="block", merged_layers=1, merged=merged, shared="b"), tmp_path / "out", folder=zoo)
    made = load_file(tmp_path / "out" / "model.safetensors")
    a, b = (load_file(zoo / name / "model.safetensors") for name in "ab")
    assert torch.equal(made["lm_head.weight"], b["lm_head.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(made[name], a[name])
    assert float((made[name] - (a[name] + b[name]) / 2).abs().mean()) < float((a[name] - b[name]).abs().mean())
    assert torch.equal(made["model.layers.1.experts.0.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])
    assert not any(name.startswith("model.layers.0.experts") for name in made)


def test_the_command_writes_a_folder_that_its_recipe_makes_again(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(zoo, FILE.format(level="block", more="shared: a"))
    assert exit_code("mix", str(recipe), str(tmp_path / "out"), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["level"], said["class"], said["already_complete"]) == ("block", "MixtureForCausalLM", False)
    assert exit_code("mix", str(recipe), str(tmp_path / "out"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["already_complete"] is True
    monkeypatch.chdir(tmp_path)
    assert exit_code("mix", str(tmp_path / "out" / "modelglue_recipe.yaml"), str(tmp_path / "again"), "--quiet") == 0
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "no class of transformers holds experts that are joined in this way" in card
    assert "trust_remote_code=True" in card
    checkpoint = open_checkpoint(tmp_path / "out")
    text = LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))
    capsys.readouterr()
    assert exit_code("generate", str(tmp_path / "out"), "abc", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out == text.generate(["abc"], until=[], max_new_tokens=4)[0] + "\n"


def test_complete_models_become_a_mixture_folder(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "zoo:\n  models:\n  - {id: a, domain: [chat]}\n  - {id: neox, domain: [math]}\nmixture: {level: auto}\n"
    assert exit_code("mix", str(written(zoo, text)), str(tmp_path / "out")) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "level model, complete models: a, neox; not ffn: 'neox' is a GPTNeoXForCausalLM" in said
    assert Mixture.load(tmp_path / "out").experts == ["a", "neox"]
    with pytest.raises(UserError, match="has no tokenizer; at model level every expert needs its own"):
        mix(value("a", "bare", level="model"), tmp_path / "other", folder=zoo)


def test_an_interrupted_mix_leaves_nothing_and_goes_on(zoo: Path, tmp_path: Path) -> None:
    file = value("a", "b", level="block")

    def stop(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mix(file, tmp_path / "out", folder=zoo, progress=stop, workers=1)
    assert not (tmp_path / "out").exists()
    mix(file, tmp_path / "out", folder=zoo)
    mix(file, tmp_path / "clean", folder=zoo)
    for found in (tmp_path / "clean").iterdir():
        assert (tmp_path / "out" / found.name).read_bytes() == found.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "'mixture.top_k' is 5; allowed is a whole number from 1 to 2"),
        ({"format": "x"}, "not of the format modelglue-levels/1"),
        ({"level": "layer"}, "'mixture.level' is 'layer'; allowed are ffn, block, model"),
        ({"experts": []}, "no list of at least 2 experts"),
        ({"temperature": 0}, "'mixture.temperature' is 0; allowed is a number above 0"),
        ({"route_span": "first"}, "'mixture.route_span' is 'first'"),
        ({"backbone": "os"}, "the mixture's backbone is 'os'"),
        ({"experts": [{"config": {}}] * 1000}, "claims 1,000 experts, but it has only"),
        ({"router_width": 10**9}, "has no place for 'model.layers.0.router.weight'|cannot build"),
        ({"router_width": 3}, "has no place for 'model.layers.0.router.weight'"),
        ({"merged_layers": 1}, "no place for|has no place"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_by_name(change: dict[str, Any], message: str, zoo: Path, tmp_path: Path) -> None:
    mix(value("a", "b", level="block"), tmp_path / "out", folder=zoo)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "mixture": {**config["mixture"], **change}}))
    with pytest.raises(CheckpointError, match=message):
        load_live(open_checkpoint(tmp_path / "out"))
