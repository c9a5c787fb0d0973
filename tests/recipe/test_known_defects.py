"""What a well-known tool writes wrongly without a word, or dies of although it is valid: every one of them is right here, or refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelglue
from modelglue.errors import MergeError, RecipeError
from tests.recipe.on_disk import WORDS, write_model, write_recipe, write_tokenizer
from tests.zoo.models import tensors

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a, b (two layers, float32), in the working folder."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(text: str, out: str = "out") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the config that a recipe of mergekit's gives, written and read again."""
    write_recipe(Path("r.yaml"), text)
    modelglue.save(modelglue.merge("r.yaml"), out)
    return load_file(f"{out}/model.safetensors"), json.loads(Path(out, "config.json").read_text())


def linear(*models: str, more: str = "") -> str:
    return "merge_method: linear\nparameters: {weight: 1.0}\nmodels:\n" + "".join(f"  - model: {name}\n" for name in models) + more


# -- silently wrong there -----------------------------------------------------------------------------------------------------------


def test_01_tensors_that_nobody_has_listed_are_merged(folder: Path) -> None:
    extra = {f"model.layers.{n}.self_attn.surprise.bias": torch.full((3,), float(n + 1)) for n in range(2)}
    for seed, name in enumerate("xy", 1):
        write_model(folder / name, weights={**tensors(seed), **extra, "model.unheard_of": torch.full((2,), float(seed))})
    found, _ = merged(linear("x", "y"))
    assert sorted(found) == sorted([*tensors(1), *extra, "model.unheard_of"])
    assert torch.equal(found["model.unheard_of"], torch.full((2,), 1.5))


def test_02_one_model_twice_is_two_inputs(folder: Path) -> None:
    entries = "".join(f"  - model: a\n    parameters: {{weight: {weight}}}\n" for weight in (0.1, 1.0))
    found, _ = merged(f"merge_method: linear\nparameters: {{normalize: false}}\nmodels:\n{entries}")
    torch.testing.assert_close(found[NAME], 1.1 * tensors(1)[NAME])


@pytest.mark.parametrize("layers", ["[0, -1]", "[2, 0]", "[1, 1]", "[0, 3]"])
def test_03_layer_ranges_that_are_none_are_refused(folder: Path, layers: str) -> None:
    text = f"merge_method: passthrough\nslices:\n  - sources:\n      - {{model: a, layer_range: {layers}}}\n"
    write_recipe(Path("r.yaml"), text)
    with pytest.raises(RecipeError, match=r"r\.yaml:4: slices\[0\]\.sources\[0\]\.layer_range: "):
        modelglue.merge("r.yaml")


def test_04_different_vocabularies_need_a_word(folder: Path) -> None:
    longer = {**tensors(2), "model.embed_tokens.weight": torch.ones(9, 6), "lm_head.weight": torch.ones(9, 6)}
    write_model(folder / "long", weights=longer, words=(*WORDS, "g"), vocab_size=9)
    write_recipe(Path("r.yaml"), linear("a", "long"))
    with pytest.raises(MergeError, match=r"tokenizer: \{source: base\}"):
        modelglue.merge("r.yaml")
    found, config = merged(linear("a", "long", more="tokenizer_source: union\n"))
    assert (found["lm_head.weight"].shape, config["vocab_size"]) == ((9, 6), 9)
    write_recipe(Path("r.yaml"), linear("long", "a", more="vocab_mismatch: truncate\n"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cut = modelglue.merge("r.yaml")
    assert (cut.info("lm_head.weight").shape, cut.config["vocab_size"]) == ((8, 6), 8)
    assert any("cut to the 8 rows" in str(warning.message) for warning in caught)


def test_05_config_and_tokenizer_are_the_first_models_whatever_the_hash_seed(folder: Path) -> None:
    for number, name in enumerate(("c", "d", "e")):
        write_model(folder / name, number, rms_norm_eps=number + 0.5)
    write_recipe(folder / "r.yaml", linear("d", "c", "e"))
    script = "import modelglue; print(modelglue.merge('r.yaml').config['rms_norm_eps'])"
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
        assert run.stdout.strip() == "1.5"


def test_11_weights_that_sum_to_zero_are_refused(folder: Path) -> None:
    entries = "".join(f"  - model: {name}\n    parameters: {{weight: {weight}}}\n" for name, weight in (("a", 1), ("b", -1)))
    write_recipe(Path("r.yaml"), f"merge_method: linear\nmodels:\n{entries}")
    with pytest.raises(RecipeError, match="the weights sum to 0"):
        modelglue.merge("r.yaml")
    gradient = entries.replace("weight: -1", "weight: [1, -1]")
    write_recipe(Path("r.yaml"), f"merge_method: linear\nmodels:\n{gradient}")
    with pytest.raises(RecipeError, match=r"the weights sum to 0.*\(tensor 'model\.layers\.1\."):
        modelglue.merge("r.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("density", "densty", "is no parameter of ties. Did you mean 'density'?"),
        ("parameters: {weight", "weight: 1.0\n    parameters: {weight", "is a parameter. Parameters stand under 'parameters:'"),
        ("base_model", "base_modl", "unknown key. Did you mean 'base_model'?"),
        ("dtype", "dytpe", "unknown key. Did you mean"),
    ],
)
def test_12_misspelt_keys_are_refused(folder: Path, old: str, new: str, said: str) -> None:
    text = "merge_method: ties\nbase_model: base\ndtype: float32\nmodels:\n  - model: a\n    parameters: {weight: 1.0, density: 0.5}\n"
    write_recipe(Path("r.yaml"), text.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        modelglue.merge("r.yaml")
    assert said in str(caught.value)


def test_13_norm_and_head_come_from_all_models_of_the_last_slice(folder: Path) -> None:
    text = """\
merge_method: linear
parameters: {weight: 1.0}
slices:
  - sources:
      - {model: a, layer_range: [0, 1]}
  - sources:
      - {model: a, layer_range: [1, 2]}
      - {model: b, layer_range: [1, 2]}
"""
    found, _ = merged(text)
    torch.testing.assert_close(found["lm_head.weight"], (tensors(1)["lm_head.weight"] + tensors(2)["lm_head.weight"]) / 2)
    torch.testing.assert_close(found[NAME], (tensors(1)[NAME] + tensors(2)[NAME]) / 2)
    assert torch.equal(found["model.embed_tokens.weight"], tensors(1)["model.embed_tokens.weight"])


def test_14_a_head_that_is_written_is_not_tied(folder: Path) -> None:
    tied = {name: value for name, value in tensors(1).items() if name != "lm_head.weight"}
    write_model(folder / "tied", weights=tied, tie_word_embeddings=True)
    found, config = merged(linear("tied", "b"))
    torch.testing.assert_close(found["lm_head.weight"], (tied["model.embed_tokens.weight"] + tensors(2)["lm_head.weight"]) / 2)
    assert config["tie_word_embeddings"] is False
    found, config = merged(linear("tied", "tied"), "both")
    assert "lm_head.weight" not in found
    assert config["tie_word_embeddings"] is True


# -- crashes there on valid input -----------------------------------------------------------------------------------------------------


def test_a_single_conditional_mapping_is_a_list_of_one(folder: Path) -> None:
    def with_weight(weight: str) -> str:
        return linear("a", "b").replace("  - model: a\n", f"  - model: a\n    parameters: {{weight: {weight}}}\n")

    one, _ = merged(with_weight("{filter: mlp, value: 3.0}"), "one")
    many, _ = merged(with_weight("[{filter: mlp, value: 3.0}]"), "many")
    torch.testing.assert_close(one[NAME], (3 * tensors(1)[NAME] + tensors(2)[NAME]) / 4)
    torch.testing.assert_close(one["lm_head.weight"], (tensors(1)["lm_head.weight"] + tensors(2)["lm_head.weight"]) / 2)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_base_that_the_slices_do_not_list_is_added(folder: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nslices:\n"
    part = "  - sources:\n      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}\n"
    found, _ = merged(text + part)
    torch.testing.assert_close(found[NAME], tensors(0)[NAME] + 0.5 * (tensors(1)[NAME] - tensors(0)[NAME]))
    differing = part + "      - {model: b, layer_range: [0, 2], parameters: {weight: 0.5}}\n"
    write_recipe(Path("r.yaml"), text + differing.replace("b, layer_range: [0, 2]", "b, layer_range: [1, 3]"))
    with pytest.raises(RecipeError, match="does not say which layers of the base it takes"):
        modelglue.merge("r.yaml")


def test_linear_with_a_base_outside_the_models(folder: Path) -> None:
    entries = "models:\n" + "".join(f"  - model: {name}\n    parameters: {{weight: 1.0}}\n" for name in "ab")
    found, _ = merged(f"merge_method: linear\nbase_model: base\n{entries}", "donor")
    torch.testing.assert_close(found[NAME], (tensors(1)[NAME] + tensors(2)[NAME]) / 2)
    found, _ = merged(f"merge_method: linear\nbase_model: base\nparameters: {{weight: 2.0}}\n{entries}", "joined")
    torch.testing.assert_close(found[NAME], (tensors(1)[NAME] + tensors(2)[NAME] + 2 * tensors(0)[NAME]) / 4)


def test_passthrough_with_a_base(folder: Path) -> None:
    found, _ = merged("merge_method: passthrough\nbase_model: base\nmodels:\n  - model: a\n")
    assert all(torch.equal(found[name], value) for name, value in tensors(1).items())


def test_bert_merges(folder: Path) -> None:
    """With its optional position ids, and a head that only some of its classes have."""
    names = ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]
    names += [f"bert.encoder.layer.{n}.attention.self.query.weight" for n in range(2)]
    weights = {name: torch.arange(12.0).view(4, 3) + number for number, name in enumerate(names)}
    weights["bert.embeddings.position_ids"] = torch.arange(5)
    for shift, name in enumerate(("x", "y")):
        shifted = {key: value if value.dtype == torch.int64 else value + shift for key, value in weights.items()}
        config: dict[str, Any] = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
        write_model(folder / name, weights=shifted, words=None, **config)
    found, _ = merged(linear("x", "y"))
    assert all(torch.equal(found[name], weights[name] + 0.5) for name in names)
    assert torch.equal(found["bert.embeddings.position_ids"], torch.arange(5))


def test_token_entries_with_zero_and_without_a_source(folder: Path) -> None:
    longer = {**tensors(2), "model.embed_tokens.weight": torch.ones(10, 6), "lm_head.weight": torch.ones(10, 6)}
    write_model(folder / "long", weights=longer, words=(*WORDS, "g", "h"), vocab_size=10)
    tokens = "tokenizer:\n  tokens:\n    g: {source: {kind: zero}}\n    h: {force: true}\n"
    found, config = merged(linear("a", "long", more=tokens))
    assert config["vocab_size"] == 10
    torch.testing.assert_close(found["model.embed_tokens.weight"][8], torch.full((6,), 0.5))  # 0 in a, 1 in long
    torch.testing.assert_close(found["model.embed_tokens.weight"][9], torch.ones(6))


def test_a_token_beyond_the_rows_that_another_model_owns(folder: Path) -> None:
    longer = {**tensors(2), "model.embed_tokens.weight": torch.ones(9, 6), "lm_head.weight": torch.ones(9, 6)}
    write_model(folder / "long", weights=longer, words=(*WORDS, "g"), vocab_size=9)
    write_tokenizer(folder / "a", {word: number for number, word in enumerate((*WORDS, "x", "g"))})  # g is 9, a has 8 rows
    with pytest.warns(UserWarning, match=r"a: its tokenizer numbers 1 tokens beyond its 9 rows \('x'\)"):
        found, _ = merged(linear("a", "long", more="tokenizer_source: union\n"))
    assert found["model.embed_tokens.weight"].shape == (9, 6)
    torch.testing.assert_close(found["model.embed_tokens.weight"][8], torch.ones(6))


def test_a_merge_needs_no_network(folder: Path) -> None:
    """Nothing asks the hub of models that lie in folders; sockets are shut."""
    write_recipe(folder / "r.yaml", linear("a", "b"))
    script = (
        "import socket\ndef shut(*args, **kwargs): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = shut\nimport modelglue\nmodelglue.save(modelglue.merge('r.yaml'), 'out')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(path.name for path in (folder / "out").iterdir() if path.suffix != ".md") == [
        "config.json", "model.safetensors", "modelglue_recipe.yaml", "modelglue_record.json", "tokenizer.json",
    ]  # fmt: skip


# -- the methods' own -----------------------------------------------------------------------------------------------------------------


def two(method: str, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None = None, **parameters: Any) -> torch.Tensor:
    """One tensor merged by a recipe over folders of one tensor."""
    for name, tensor in (("a", a), ("b", b), ("base", base)):
        if tensor is not None:
            Path(f"one-{name}").mkdir(exist_ok=True)
            save_file({"w": tensor}, f"one-{name}/model.safetensors")
    value: dict[str, Any] = {"method": method, "parameters": parameters, "models": [{"model": "one-a"}, {"model": "one-b"}]}
    if base is not None:
        value["base"] = "one-base"
    return modelglue.merge(value).tensor("w")


def test_06_sce_keeps_the_shape_of_a_tensor_that_no_model_changed(folder: Path) -> None:
    base = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(two("sce", base, base, base, select_topk=0.5), base)


def test_07_breadcrumbs_without_gamma_keeps_the_delta(folder: Path) -> None:
    base, a = torch.zeros(4, 5), torch.arange(1.0, 21).view(4, 5)
    found = two("breadcrumbs", a, a, base, weight=0.5, density=1.0, gamma=0.0)
    torch.testing.assert_close(found, a)


def test_08_nuslerp_of_antiparallel_tensors_keeps_their_size(folder: Path) -> None:
    a = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    assert two("nuslerp", a, -1.5 * a, weight=1.0).norm() <= 1.5 * a.norm()


def test_09_model_stock_keeps_small_deltas_and_bears_opposite_ones(folder: Path) -> None:
    base, delta = torch.ones(16, 16), 1e-6 * torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    found = two("model_stock", base + delta, base + delta, base)
    torch.testing.assert_close(found - base, (base + delta) - base, rtol=0.05, atol=1e-8)
    assert bool(two("model_stock", base + 1000 * delta, base - 1000 * delta, base).isfinite().all())


def test_10_sce_weighs_deltas_of_normal_size_by_their_energy(folder: Path) -> None:
    base = torch.zeros(4, 4)
    found = two("sce", torch.full((4, 4), 1e-3), torch.full((4, 4), 2e-3), base)
    torch.testing.assert_close(found, torch.full((4, 4), (1e-3 * 1 + 2e-3 * 4) / 5), rtol=1e-4, atol=0)


def test_15_random_methods_are_seeded(folder: Path) -> None:
    text = "merge_method: dare_ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 1.0, density: 0.5}\n"
    first, _ = merged(text, "first")
    second, _ = merged(text, "second")
    third, _ = merged(text + "seed: 1\n", "third")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[NAME], third[NAME])


def test_16_arithmetic_on_bfloat16_is_rounded_once(folder: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b, base = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(3))
    found = two("ties", a, b, base, weight=0.7, density=0.6)
    exact = two("ties", a.float(), b.float(), base.float(), weight=0.7, density=0.6)
    assert torch.equal(found, exact.bfloat16())


def test_ties_keeps_something_of_a_small_tensor(folder: Path) -> None:
    base, a = torch.zeros(16), torch.arange(1.0, 17)
    found = two("ties", a, a, base, weight=1.0, density=0.05)
    assert found.count_nonzero() == 1
    assert math.isclose(found[15].item(), 16.0)


def test_della_takes_tensors_of_one_column(folder: Path) -> None:
    base, a = torch.zeros(6, 1), torch.ones(6, 1)
    found = two("della", a, a, base, weight=1.0, density=0.7, epsilon=0.1)
    assert found.shape == (6, 1)
    assert bool(found.isfinite().all())
