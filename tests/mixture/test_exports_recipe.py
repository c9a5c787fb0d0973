"""mergekit-moe's files: read unchanged, refused with file and line, and made into what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from modelglue.adapters import extract_lora
from modelglue.checkpoint import open_checkpoint, save
from modelglue.cli.app import main
from modelglue.errors import CheckpointError, MergeError, RecipeError, UserError
from modelglue.mixture import Encoded, ExpertSpec, Reader, entering, gate_row
from modelglue.mixture.exports import is_moe_recipe, read_moe_recipe, upcycle
from modelglue.mixture.exports.streamed import embedding_reader, streamed_reader
from modelglue.mixture.layer_gates import layer_gates
from modelglue.models import load_live
from modelglue.recipe import parse_document, read_recipe
from tests.models.tiny import letters, pieces, random_model, saved_model

FILE = """\
base_model: a
gate_mode: hidden
dtype: bf16
experts_per_token: 1
experts:
  - source_model: a
    positive_prompts: ["abc", "word"]
    negative_prompts: ["12"]
  - source_model: {model: {path: b}}
    positive_prompts:
      - "345"
    noise_scale: 0.25
    residual_scale: 0.5
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llamas of one vocabulary, and one that knows more tokens and was trained with another norm."""
    folder = tmp_path_factory.mktemp("zoo")
    saved_model(folder / "a", "llama", 1, tokenizer=letters())
    saved_model(folder / "b", "llama", 2, tokenizer=letters())
    saved_model(folder / "c", "llama", 3, tokenizer=pieces(), rms_norm_eps=1e-5, vocab_size=66, rope_theta=500.0)
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text)
    return path


def value(**changes: Any) -> dict[str, Any]:
    """The file as a mapping, without its dtype; `None` takes a key out."""
    found = {key: item for key, item in (yaml.safe_load(FILE) | {"dtype": None} | changes).items() if item is not None}
    return dict(found)


# -- reading ------------------------------------------------------------------------------------------------------------------------


def test_a_file_of_theirs_is_read() -> None:
    recipe, odd = read_moe_recipe(parse_document(FILE, "config.yml"))
    assert odd == []
    assert (recipe.base_model, recipe.gate_mode, recipe.dtype, recipe.experts_per_token) == ("a", "hidden", "bfloat16", 1)
    assert [expert.source_model for expert in recipe.experts] == ["a", "b"]
    assert recipe.experts[0].positive_prompts == ("abc", "word")
    assert (recipe.experts[1].noise_scale, recipe.experts[1].residual_scale) == (0.25, 0.5)
    assert read_moe_recipe(recipe.described())[0] == recipe


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ({"model": {"path": "x", "revision": "main"}}, "x@main"),
        ({"model": {"path": "x"}, "lora": {"path": "y"}}, "x+y"),
        ({"model": "x", "lora": None}, "x"),
    ],
)
def test_a_model_may_be_a_mapping(given: Any, reference: str) -> None:
    assert read_moe_recipe(value(base_model=given))[0].base_model == reference


def test_dialects_are_told_apart() -> None:
    assert is_moe_recipe(parse_document(FILE, "config.yml"))
    assert not is_moe_recipe(parse_document("level: ffn\nexperts: []\nbase_model: a", "mix.yml"))


def test_merge_sends_such_a_file_to_mix(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"config\.yml:5: experts: is a recipe for a mixture.*`modelglue mix FILE OUT`"):
        read_recipe(written(tmp_path, FILE))


FAULTS = {
    "noise_scale": ("noise_scal", r"config\.yml:12: experts\[1\]\.noise_scal: unknown key\. Did you mean 'noise_scale'\?"),
    "gate_mode": ("gatemode", r"config\.yml:2: gatemode: unknown key\. Did you mean 'gate_mode'"),
    "hidden": ("hiden", r"config\.yml:2: gate_mode: is 'hiden', allowed is 'hidden', 'hidden_avg'"),
    "experts_per_token: 1": ("experts_per_token: 3", r"config\.yml:4: experts_per_token: experts_per_token is 3; allowed is 1 to 2"),
    "dtype: bf16": ("dtype: int8", r"config\.yml:3: dtype: is 'int8', allowed is 'float32', 'float16' or 'bfloat16'"),
    "dtype:": ("architecture:", r"config\.yml:3: architecture: is 'bf16'; allowed are mixtral, MixtralForCausalLM"),
    '["abc", "word"]': ("[]", r"config\.yml:6: experts\[0\]: has no positive_prompts\. gate_mode 'hidden' needs"),
    '"word"': ('""', r"config\.yml:7: experts\[0\]\.positive_prompts: holds an empty prompt"),
    "0.25": ("-1", r"config\.yml:12: experts\[1\]\.noise_scale: is -1, allowed is a number >= 0"),
    "{model: {path: b}}": ("{path: b}", r"config\.yml:9: experts\[1\]\.source_model: allowed is a reference as text"),
}


@pytest.mark.parametrize("found", FAULTS)
def test_faults_have_a_line(found: str) -> None:
    other, message = FAULTS[found]
    assert FILE.count(found) >= 1
    with pytest.raises(RecipeError, match=message):
        read_moe_recipe(parse_document(FILE.replace(found, other, 1), "config.yml"))


def test_faults_are_reported_together() -> None:
    text = FILE.replace('["abc", "word"]', "[]").replace("experts_per_token: 1", "experts_per_token: 9\narchitecture: mixtrl")
    with pytest.raises(RecipeError) as caught:
        read_moe_recipe(parse_document(text, "config.yml"))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["config.yml:4", "config.yml:5", "config.yml:7"]
    assert "Did you mean 'mixtral'?" in lines[1]


def test_prompts_that_all_are_alike_are_refused_and_some_warned_of() -> None:
    same = [{"source_model": name, "positive_prompts": ["x"]} for name in "abc"]
    with pytest.raises(RecipeError, match="all have the same prompts, so no router can tell them apart"):
        read_moe_recipe(value(experts=same))
    _, odd = read_moe_recipe(value(experts=[*same[:2], {"source_model": "c", "positive_prompts": ["y"]}]))
    assert odd == ["<recipe>: experts[1]: has the same prompts as expert 0: both are always chosen together."]
    assert read_moe_recipe(value(experts=same, gate_mode="random"))[1] == []


def test_copies_without_noise_are_warned_of() -> None:
    experts = [{"source_model": "a"}, {"source_model": "a"}]
    assert "equal experts, to be trained apart" in read_moe_recipe(value(experts=experts, gate_mode="random"))[1][0]
    assert read_moe_recipe(value(experts=[{**one, "noise_scale": 0.1} for one in experts], gate_mode="random"))[1] == []


def test_more_than_one_shared_expert_is_refused() -> None:
    shared = [{"source_model": "a"}] * 2
    with pytest.raises(RecipeError, match="shared_experts: holds 2 items, allowed are 1 at most"):
        read_moe_recipe(value(shared_experts=shared))


# -- making -------------------------------------------------------------------------------------------------------------------------


def test_gates_are_the_rows_of_every_layer(zoo: Path) -> None:
    made = upcycle(value(), zoo).checkpoint
    model, tokenizer = load_live_of(zoo / "a"), letters()
    sides = {"p0": ["abc", "word"], "n0": ["12"], "p1": ["345"]}
    for layer in range(2):
        states = {}
        for side, prompts in sides.items():
            rows = [[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            states[side] = Encoded(entering(model, ids, mask, layer), mask)
        wanted = torch.stack([gate_row(states["p0"], states["n0"], "hidden"), gate_row(states["p1"], None, "hidden")])
        gate = made.tensor(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        assert gate.dtype == torch.float32
        torch.testing.assert_close(gate, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gate.norm(dim=1), torch.ones(2))


def test_layers_are_wide_only_while_they_run(tmp_path: Path) -> None:
    """A model in a short dtype gives the gates that it gives in float32, and is as short afterwards as before."""
    model = random_model("llama", 5).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "short")
    letters().save_pretrained(tmp_path / "short")
    checkpoint = open_checkpoint(tmp_path / "short")
    spec = [ExpertSpec("a", tmp_path, ("abc", "word"), ("12",))]
    streamed = streamed_reader(checkpoint)
    whole = layer_gates(Reader(load_live(checkpoint), letters(), 0), spec, "hidden", [0, 1])
    assert layer_gates(streamed, spec, "hidden", [0, 1]).equal(whole)
    first = streamed._model.model.layers[0].mlp.up_proj.weight
    assert first.dtype == torch.bfloat16
    assert first.equal(model.model.layers[0].mlp.up_proj.weight)
    assert embedding_reader(checkpoint).encode(["abc"]).states.dtype == torch.float32


def load_live_of(folder: Path) -> Any:
    return load_live(open_checkpoint(folder))


def gates_of(recipe: dict[str, Any], zoo: Path) -> torch.Tensor:
    made = upcycle(recipe, zoo).checkpoint
    return torch.stack([made.tensor(f"model.layers.{layer}.block_sparse_moe.gate.weight") for layer in range(2)])


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_experts_that_change_places_take_their_rows_along(mode: str, zoo: Path) -> None:
    experts = value()["experts"]
    there, back = (gates_of(value(gate_mode=mode, experts=order), zoo) for order in (experts, experts[::-1]))
    assert there.equal(back.flip(1))
    assert there[0].equal(there[1]) == (mode == "cheap_embed")


def test_random_gates_need_no_prompts_and_follow_the_seed(zoo: Path) -> None:
    experts = [{"source_model": "a"}, {"source_model": "b"}]
    first, again, other = (gates_of(value(gate_mode="random", experts=experts, seed=seed), zoo) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert not first[0].equal(first[1])
    bounded = gates_of(value(gate_mode="uniform_random", experts=experts), zoo)
    assert 0.15 < float(bounded.abs().max()) <= 0.25  # within 1 / sqrt(16)


def test_hidden_last_is_hidden_and_a_scale_sharpens(zoo: Path) -> None:
    plain = gates_of(value(), zoo)
    assert gates_of(value(gate_mode="hidden_last"), zoo).equal(plain)
    assert gates_of(value(gate_scale=4.0), zoo).equal(plain * 4)


def test_an_expert_with_scale_and_noise(zoo: Path) -> None:
    made = upcycle(value(), zoo).checkpoint
    stored = load_file(zoo / "b" / "model.safetensors")
    place = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    assert made.tensor(place.format(0, "w1")).equal(load_file(zoo / "a" / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"])
    noise = made.tensor(place.format(1, "w1")) - stored["model.layers.1.mlp.gate_proj.weight"]
    below = made.tensor(place.format(1, "w2")) * 2 - stored["model.layers.1.mlp.down_proj.weight"]
    for values in (noise, below):
        assert abs(float(values.mean())) < 0.25 * 3 / values.numel() ** 0.5
        assert 0.2 < float(values.std()) < 0.3
    assert not noise.flatten().equal(below.flatten())
    assert made.tensor(place.format(1, "w1")).equal(upcycle(value(), zoo).checkpoint.tensor(place.format(1, "w1")))


def test_an_expert_that_is_scaled_to_nothing_adds_nothing(zoo: Path) -> None:
    """With two experts at work and one at 0, what is left is the other's share."""
    shared = [{"source_model": "b", "residual_scale": 0.0}]
    plain = load_live(upcycle(value(architecture="qwen"), zoo).checkpoint)
    beside = load_live(upcycle(value(shared_experts=shared), zoo).checkpoint)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(beside(ids).logits, plain(ids).logits)


def test_a_shared_expert_with_prompts_has_a_gate(zoo: Path) -> None:
    made = upcycle(value(shared_experts=[{"source_model": "b", "positive_prompts": ["q"]}]), zoo)
    assert made.export == "Qwen2MoeForCausalLM"
    gate = made.checkpoint.tensor("model.layers.0.mlp.shared_expert_gate.weight")
    assert gate.shape == (1, 16)
    torch.testing.assert_close(gate.norm(), torch.tensor(1.0))
    down = made.checkpoint.tensor("model.layers.0.mlp.shared_expert.down_proj.weight")
    stored = load_file(zoo / "b" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert down.equal(stored)
    bare = upcycle(value(shared_experts=[{"source_model": "b"}], architecture="deepseek"), zoo)
    assert bare.checkpoint.tensor("model.layers.0.mlp.shared_expert.down_proj.weight").equal(stored * 2)
    assert not bare.checkpoint.tensor("model.layers.0.mlp.shared_expert_gate.weight").any()
    assert any("needs code from the hub" in text for text in bare.warnings)


def test_what_an_expert_loses_is_said(zoo: Path) -> None:
    experts = [*value()["experts"], {"source_model": "c", "positive_prompts": ["q"]}]
    said = upcycle(value(experts=experts), zoo).warnings
    assert "c: its rms_norm_eps is 1e-05, the mixture uses 1e-06 of a." in said
    assert any(text.startswith("c: was trained with other rotary positions") for text in said)
    assert any(text.startswith("c: has 66 token embeddings, a has 64") for text in said)
    assert any(text.startswith("c: knows 6 tokens that a does not ('") for text in said)
    assert not any(text.startswith("b:") for text in said)


def test_prompts_that_are_too_much_alike_are_warned_of(zoo: Path) -> None:
    experts = [{"source_model": name, "positive_prompts": [prompt]} for name, prompt in (("a", "12345a"), ("b", "12345a "))]
    made = upcycle(value(experts=experts, gate_mode="hidden_avg"), zoo)
    assert max(made.conditions) > 5
    assert any("condition number of the gates is above 5 in" in text for text in made.warnings)


def test_negatives_that_cancel_and_states_that_are_no_numbers_are_refused(zoo: Path, tmp_path: Path) -> None:
    experts = [{"source_model": "a", "positive_prompts": ["abc"], "negative_prompts": ["abc"]}, value()["experts"][1]]
    with pytest.raises(UserError, match="expert 'expert0': its negative prompts cancel"):
        upcycle(value(experts=experts), zoo)
    saved_model(tmp_path / "bad", "llama", 1, tokenizer=letters())
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.embed_tokens.weight"][:] = float("nan")
    save_file(weights, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="are not finite, so no gate can be made of them"):
        upcycle(value(base_model=str(tmp_path / "bad")), zoo)


def test_models_that_cannot_be_used_are_reported_together(zoo: Path, tmp_path: Path) -> None:
    saved_model(tmp_path / "gemma", "gemma", 1)
    saved_model(tmp_path / "gpt2", "gpt2", 1)
    experts = [{"source_model": str(tmp_path / name), "positive_prompts": [name]} for name in ("gemma", "gpt2")]
    with pytest.raises(CheckpointError) as caught:
        upcycle(value(experts=experts), zoo)
    assert "'gemma'" in str(caught.value)
    assert "'gpt2'" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"(?s)nowhere.*nobody"):
        upcycle(value(experts=[{"source_model": name, "positive_prompts": [name]} for name in ("nowhere", "nobody")]), zoo)
    saved_model(tmp_path / "mute", "llama", 1)
    with pytest.raises(CheckpointError, match="has no tokenizer, so no gate can be made from prompts"):
        upcycle(value(base_model=str(tmp_path / "mute")), zoo)
    with pytest.raises(MergeError, match="Qwen2MoeForCausalLM"):
        upcycle(value(shared_experts=[{"source_model": "b"}], architecture="mixtral"), zoo)


def test_a_model_with_an_adapter_is_an_expert(zoo: Path, tmp_path: Path) -> None:
    extract_lora(open_checkpoint(zoo / "b"), open_checkpoint(zoo / "a"), tmp_path / "lora", max_rank=4)
    reference = f"{zoo / 'a'}+{tmp_path / 'lora'}"
    experts = [value()["experts"][0], {"source_model": reference, "positive_prompts": ["345"]}]
    made = upcycle(value(experts=experts), zoo).checkpoint
    adapted = open_checkpoint(reference).tensor("model.layers.0.mlp.up_proj.weight")
    assert made.tensor("model.layers.0.block_sparse_moe.experts.1.w3.weight").equal(adapted)
    assert not adapted.equal(open_checkpoint(zoo / "a").tensor("model.layers.0.mlp.up_proj.weight"))


# -- the command --------------------------------------------------------------------------------------------------------------------


def exit_code(*tokens: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(token) for token in tokens])
    return int(left.value.code or 0)


def test_the_command_writes_a_folder_that_its_recipe_makes_again(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(zoo, FILE)
    assert exit_code("mix", recipe, tmp_path / "out", "--copy-tokenizer", "--quiet") == 0
    assert exit_code("mix", tmp_path / "out" / "modelglue_recipe.yaml", tmp_path / "again", "--json") == 0
    assert '"class": "MixtralForCausalLM"' in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "modelglue_record.json", "README.md"} <= names
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name.rsplit(".", 2)[1]: tensor.dtype for name, tensor in weights.items()}
    assert (kinds["gate"], kinds["w1"], kinds["q_proj"]) == (torch.float32, torch.bfloat16, torch.bfloat16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 experts in one `MixtralForCausalLM`." in card
    assert "`modelglue mix modelglue_recipe.yaml ../again`" in card


def test_warnings_are_shown_and_strict_refuses_them(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = yaml.safe_dump(value(experts=[{"source_model": "a"}, {"source_model": "a"}], gate_mode="random"))
    assert exit_code("mix", written(zoo, text), tmp_path / "out", "--strict") == 2
    assert "equal experts, to be trained apart" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_grows_no_model_in_memory(zoo: Path, tmp_path: Path) -> None:
    """What is saved equals what is read, tensor by tensor, whatever the chunk."""
    made = upcycle(value(), zoo).checkpoint
    save(made, tmp_path / "out", chunk=37, workers=1)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(weights) == list(made.names())
    assert all(weights[name].equal(made.tensor(name)) for name in weights)
