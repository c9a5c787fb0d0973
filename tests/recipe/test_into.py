"""A merge put back into a larger model: what the larger model must say of it afterwards."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelglue
from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, save
from modelglue.errors import MergeError
from modelglue.recipe import build_with_warnings, read_recipe
from tests.recipe.on_disk import WORDS, write_model, write_tokenizer
from tests.zoo.models import CONFIG, tensors

EMBEDDING = "language_model.model.embed_tokens.weight"
TEXT = {key: value for key, value in CONFIG.items() if key != "architectures"}


def write_pictures(folder: Path, words: Sequence[str] = WORDS, text: dict[str, Any] = TEXT, **config: Any) -> dict[str, torch.Tensor]:
    """A vision-language model whose language tower is that of `tensors(1)`."""
    weights = {f"language_model.{name}": value for name, value in tensors(1).items()}
    weights |= {f"vision_tower.layers.{number}.weight": torch.full((3, 2), float(number)) for number in range(2)}
    write_model(folder, weights=weights, words=words)
    said = {"architectures": ["Pictures"], "model_type": "pictures", "dtype": "float32", "text_config": text, **config}
    (folder / "config.json").write_text(json.dumps(said))
    return weights


def put(out: Path, **recipe: Any) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Config and tokens of a written merge, and what it warned of; its recipe gives the same bytes again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(modelglue.merge(recipe), out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(modelglue.merge(out / "modelglue_recipe.yaml"), out.with_name("again"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (out.with_name("again") / name).read_bytes(), name
    config, tokenizer = (json.loads((out / name).read_text()) for name in ("config.json", "tokenizer.json"))
    return config, tokenizer["model"]["vocab"], [str(one.message) for one in caught]


def recipe(*models: Any, **more: Any) -> dict[str, Any]:
    return {"method": "linear", "models": list(models), "into": {"model": "vlm", "part": "language_model"}, **more}


PART = {"model": "vlm", "part": "language_model", "weight": 1}
LLM = {"model": "llm", "weight": 1}


@pytest.mark.parametrize(
    "text", [TEXT, {key: value for key, value in TEXT.items() if key != "vocab_size"}], ids=["said", "left to a default"]
)
def test_the_tokenizer_of_the_merge_goes_with_its_rows(text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = write_pictures(tmp_path / "vlm", (*WORDS[:-1], "<image>"), text, image_token_index=7, bos_token_id=0)
    (tmp_path / "vlm" / "chat_template.jinja").write_text("a template of pictures")
    write_model(tmp_path / "llm", 2, words=("</s>", "<s>", *WORDS[2:-1], "new"))
    config, vocab, said = put(tmp_path / "out", **recipe(PART, LLM, base="llm", tokenizer={"source": "union"}))
    assert [word for word, _ in sorted(vocab.items(), key=lambda item: item[1])] == ["</s>", "<s>", *WORDS[2:-1], "new", "<image>"]
    assert config["text_config"]["vocab_size"] == 9
    assert (config["image_token_index"], config["bos_token_id"]) == (8, 1)
    found = load_file("out/model.safetensors")[EMBEDDING]
    assert found.shape == (9, 6)
    llm = load_file("llm/model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(found[1], (whole[EMBEDDING][0] + llm[1]) / 2)  # <s>
    torch.testing.assert_close(found[8], whole[EMBEDDING][7])  # <image>, which the language model takes over
    assert Path("out/chat_template.jinja").read_text() == "a template of pictures"
    assert said == []


def test_a_special_token_that_the_merge_does_not_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "vlm", (*WORDS[:-1], "<image>"), image_token_index=7)
    write_model(tmp_path / "llm", 2)
    config, _, said = put(tmp_path / "out", **recipe(PART, LLM, base="llm", tokenizer={"source": "base"}))
    assert config["image_token_index"] is None
    assert said == ["config.json: image_token_index was 7, a token that the output's vocabulary does not have; check it."]


def test_other_tokens_are_refused_where_nothing_was_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "vlm")
    write_model(tmp_path / "llm", 2, words=WORDS[::-1])
    with pytest.raises(MergeError, match=r"the merge and vlm \(into\) number their tokens differently .* Add `tokenizer: "):
        modelglue.merge(recipe(LLM))
    write_tokenizer(tmp_path / "llm", {word: number for number, word in enumerate(WORDS)})
    assert modelglue.merge(recipe(LLM)).names()


def test_the_written_dtype_and_chat_template_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "vlm")
    write_model(tmp_path / "llm", 2)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config, _, said = put(tmp_path / "out", **recipe(PART, LLM, dtype={"store": "bfloat16"}, chat_template=template))
    assert config["dtype"] == "bfloat16"
    assert Path("out/chat_template.jinja").read_text() == template
    assert {value.dtype for value in load_file("out/model.safetensors").values()} == {torch.bfloat16}
    assert said == []


def pictures(seed: int, tied: bool, **text: Any) -> TensorsCheckpoint:
    weights = {f"language_model.{name}": value for name, value in tensors(seed).items() if not tied or name != "lm_head.weight"}
    config = {"architectures": ["Pictures"], "model_type": "pictures", "tie_word_embeddings": tied, "text_config": {**TEXT, **text}}
    return TensorsCheckpoint({**weights, "vision_tower.weight": torch.ones(2)}, config, label="vlm")


def odd(value: dict[str, Any], **opened: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    built = build_with_warnings(read_recipe(value), opened.__getitem__)
    return built.checkpoint, built.warnings


def test_a_part_ties_its_head_where_the_whole_does() -> None:
    tied, _ = odd({"method": "linear", "models": [PART]}, vlm=pictures(1, tied=True))
    assert tied.config == {**TEXT, "tie_word_embeddings": True}
    stored, _ = odd({"method": "linear", "models": [PART]}, vlm=pictures(1, tied=False))
    assert stored.config == {**TEXT, "tie_word_embeddings": False}


def test_a_head_that_is_no_copy_any_more_is_untied() -> None:
    """The whole stores its head and ties it all the same, as some do; a merge with an untied model would be lost on loading."""
    vlm = pictures(1, tied=False)
    vlm = TensorsCheckpoint({name: vlm.tensor(name) for name in vlm.names()}, {**vlm.config, "tie_word_embeddings": True}, label="vlm")
    llm = TensorsCheckpoint(tensors(2), {**CONFIG, "tie_word_embeddings": False}, label="llm")
    found, _ = odd(recipe(PART, LLM), vlm=vlm, llm=llm)
    assert found.config["tie_word_embeddings"] is False
    same, _ = odd(recipe(PART), vlm=vlm)
    assert same.config["tie_word_embeddings"] is True


def test_another_size_is_refused() -> None:
    wide = {**tensors(2), "model.layers.1.mlp.up_proj.weight": torch.ones(12, 6)}
    value = recipe(LLM)
    with pytest.raises(MergeError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is \[12, 6\] in the merge and \[10, 6\] in the part"):
        odd(value, vlm=pictures(1, tied=False), llm=TensorsCheckpoint(wide, CONFIG, label="llm"))


def test_models_that_compute_otherwise_are_named() -> None:
    """Of a part the config of its tower counts, not what stands at the top for the whole model."""
    vlm, llm = pictures(1, tied=False, rope_theta=1e6), TensorsCheckpoint(tensors(2), {**CONFIG, "rope_theta": 1e4}, label="llm")
    said = "llm has rope_theta = 10000.0, vlm (language_model) has 1000000.0; the output takes the first one's."
    assert odd({"method": "linear", "models": [PART, LLM]}, vlm=vlm, llm=llm)[1] == (said,)
    into = "the merge has rope_theta = 10000.0, vlm (into) has 1000000.0; the output takes the first one's."
    assert odd(recipe(LLM), vlm=vlm, llm=llm)[1] == (into,)
    assert odd(recipe(LLM), vlm=vlm, llm=llm)[0].config["text_config"]["rope_theta"] == 1e6
