"""The card: what its front matter and its words say of parents, licences and the model's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modelglue.checkpoint import MergedCheckpoint, SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.output.card import model_card
from modelglue.methods import get
from tests.checkpoint.files import write_single


def card_of(folder: Path, *licences: str | None) -> tuple[dict[str, Any], str]:
    """(front matter, words) of a merge of the models org/0, org/1, ... out of the hub's cache."""
    models = []
    for number, licence in enumerate(licences):
        snapshot = folder / f"models--org--{number}" / "snapshots" / f"c0ffee{number}"
        models.append(SafetensorsCheckpoint(write_single(snapshot, {"w": torch.ones(1)}), f"org/{number}"))
        if licence is not None:
            (snapshot / "README.md").write_text(f"---\n{licence}\n---\nThe donor's own words.\n")
    merged = MergedCheckpoint(get("linear"), models, None, {"weight": [1.0] * len(models), "normalize": True})
    _, front, words = model_card(merged, "method: linear", {}).split("---\n", 2)
    return yaml.safe_load(front), words


def test_a_licence_that_all_parents_have(tmp_path: Path) -> None:
    front, words = card_of(tmp_path, "license: apache-2.0", "license: apache-2.0")
    assert front == {
        "base_model": ["org/0", "org/1"], "base_model_relation": "merge", "library_name": "transformers", "license": "apache-2.0",
        "tags": ["merge", "modelglue"],
    }  # fmt: skip
    assert "| model | revision | licence |\n|---|---|---|\n| `org/0` | `c0ffee0` | apache-2.0 |\n| `org/1` | `c0ffee1` |" in words
    assert "Every parent is under apache-2.0." in words
    assert "The donor's own words" not in words


def test_a_licence_with_a_name_of_its_own(tmp_path: Path) -> None:
    front, _ = card_of(tmp_path, *["license: other\nlicense_name: x-licence\nlicense_link: LICENSE"] * 2)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "x-licence", "LICENSE")


def test_licences_that_do_not_go_together(tmp_path: Path) -> None:
    front, words = card_of(tmp_path, "license: llama3", "license: cc-by-nc-4.0", None)
    assert "license" not in front
    assert "- org/0 is under llama3, whose terms hold for the merge as well, beside cc-by-nc-4.0.\n" in words
    assert "- org/1 is under cc-by-nc-4.0, for non-commercial use only; llama3 beside it does not change that.\n" in words
    assert "- org/2 names no licence: find out whether it may be merged and published.\n" in words


def test_several_permissive_licences(tmp_path: Path) -> None:
    front, words = card_of(tmp_path, "license: mit", "license: apache-2.0")
    assert "license" not in front
    assert "under several licences, of which none is known to forbid a merge" in words


def test_no_licence_anywhere(tmp_path: Path) -> None:
    front, words = card_of(tmp_path, None, None)
    assert "license" not in front
    assert "| model | revision |\n" in words
    assert "No parent names its licence" in words


@pytest.mark.parametrize(
    ("name", "tag", "loader"),
    [
        ("MistralForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", None, "AutoModelForSeq2SeqLM"),
        ("LlavaForConditionalGeneration", "image-text-to-text", "AutoModelForImageTextToText"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
        ("BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("BertModel", None, "AutoModel"),
        (None, None, "AutoModelForCausalLM"),
    ],
)
def test_task_and_class(name: str | None, tag: str | None, loader: str) -> None:
    import transformers

    config = {} if name is None else {"architectures": [name]}
    card = model_card(TensorsCheckpoint({"w": torch.ones(1)}, config), "x", {})
    assert yaml.safe_load(card.split("---\n")[1]).get("pipeline_tag") == tag
    assert f"model = {loader}.from_pretrained" in card
    assert hasattr(transformers, loader)


def test_processors_are_loaded_where_there_are_any() -> None:
    made = TensorsCheckpoint({"w": torch.ones(1)}, {"architectures": ["LlavaForConditionalGeneration"]}, {"processor_config.json": b"{}"})
    assert "processor = AutoProcessor.from_pretrained" in model_card(made, "x", {})
    assert "tokenizer = AutoTokenizer.from_pretrained" in model_card(TensorsCheckpoint({"w": torch.ones(1)}), "x", {})


def test_references_with_marks_of_tables_do_not_break_the_table() -> None:
    card = model_card(TensorsCheckpoint({"w": torch.ones(1)}, label="a|b"), "x", {})
    assert "| `a\\|b` |" in card
