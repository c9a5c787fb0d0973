"""Signatures: what may be merged, from headers, config and tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from modelglue.checkpoint import TensorsCheckpoint, open_checkpoint
from modelglue.zoo import Signature, config_warnings, groups, signature
from tests.zoo.models import CONFIG, model, tensors

if TYPE_CHECKING:
    from pathlib import Path


def tokenized(folder: Path, vocab: dict[str, int], name: str) -> TensorsCheckpoint:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    return TensorsCheckpoint(tensors(0), CONFIG, {"tokenizer.json": path})


def sign(**config: Any) -> Signature:
    return signature(model(tensors(0), **config))


class TestStructure:
    def test_sizes_are_read_and_filled_in(self) -> None:
        found = sign()
        assert found.architecture == {
            "class": "LlamaForCausalLM", "layers": 2, "hidden size": 6, "feed-forward size": 10, "attention heads": 2,
            "key/value heads": 2, "head size": 3, "experts": None,
        }  # fmt: skip
        gpt = signature(TensorsCheckpoint({}, {"architectures": ["GPT2LMHeadModel"], "n_layer": 3, "n_embd": 8, "n_head": 2}))
        assert gpt.architecture["layers"] == 3
        assert gpt.architecture["head size"] == 4

    def test_text_part_of_a_composed_config(self) -> None:
        found = signature(TensorsCheckpoint({}, {"architectures": ["X"], "text_config": {"num_hidden_layers": 5}}))
        assert found.architecture["layers"] == 5

    def test_embedding_and_head_are_left_out_by_name_or_by_rows(self) -> None:
        weights = {
            "model.embed_tokens.weight": torch.zeros(8, 6),
            "lm_head.weight": torch.zeros(8, 6),
            "strange_name.weight": torch.zeros(8, 6),
            "transformer.wpe.weight": torch.zeros(16, 6),
            "model.layers.0.mlp.output.weight": torch.zeros(8, 6),
            "model.norm.weight": torch.zeros(6),
        }
        found = signature(TensorsCheckpoint(weights, {"vocab_size": 8}))
        assert list(found.tensors) == [
            "model.layers.0.mlp.output.weight",
            "model.norm.weight",
            "transformer.wpe.weight",
        ]

    def test_biases_and_shapes_separate(self) -> None:
        plain = signature(model(tensors(0, bias=False)))
        assert not plain.same_structure(sign())
        assert "q_proj.bias: absent and 6" in " ".join(plain.differences(sign())["structural"])
        deeper = signature(model(tensors(0, layers=3), num_hidden_layers=3))
        assert groups([sign(), plain, sign(), deeper]) == [[0, 2], [1], [3]]


class TestFunction:
    @pytest.mark.parametrize(
        "config",
        [
            {"rope_theta": 1e6},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"hidden_act": "gelu"},
            {"partial_rotary_factor": 0.5},
            {"logit_scale": 0.1},
            {"residual_multiplier": 0.2},
            {"final_logit_softcapping": 30.0},
        ],
    )
    def test_what_changes_the_function_separates_unless_allowed(self, config: dict[str, Any]) -> None:
        pair = [sign(), sign(**config)]
        assert pair[0].same_structure(pair[1])
        assert groups(pair) == [[0], [1]]
        assert groups(pair, allow_config_mismatch=True) == [[0, 1]]
        assert pair[0].differences(pair[1])["functional"]

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({}, {"rope_theta": 10000}),
            ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}}),
            ({"rope_scaling": None}, {"rope_theta": 10000.0}),
            (
                {"rope_scaling": {"type": "linear", "factor": 2.0}},
                {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            ),
            ({"rotary_pct": 0.25}, {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0}}),
            ({"hidden_act": None, "activation_function": "silu"}, {}),
        ],
    )
    def test_spellings_of_the_same_function(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        assert sign(**ours).function == sign(**theirs).function

    def test_soft_fields_only_warn(self) -> None:
        pair = [sign(), sign(rms_norm_eps=1e-5, torch_dtype="float16")]
        assert groups(pair) == [[0, 1]]
        assert config_warnings(pair, ["a", "b"]) == [
            "'a' and 'b' differ in norm epsilon (1e-06 and 1e-05); a merge takes the first one's.",
            "'a' and 'b' differ in training dtype (None and float16); a merge takes the first one's.",
        ]
        assert config_warnings(pair[:1], ["a"]) == []


class TestTokens:
    VOCAB: dict[str, int] = {"a": 0, "b": 1, "c": 2}  # noqa: RUF012 - constant

    @pytest.mark.parametrize(
        ("other", "relation"),
        [
            ({"a": 0, "b": 1, "c": 2}, "equal"),
            ({"a": 0, "b": 1, "c": 2, "d": 3}, "prefix"),
            ({"a": 0, "b": 1}, "prefix"),
            ({"a": 1, "b": 0, "c": 2}, "different"),
            ({"a": 0, "c": 1, "b": 2, "d": 3}, "different"),
            ({"d": 0, "a": 1, "b": 2, "c": 3}, "different"),
        ],
    )
    def test_relation(self, tmp_path: Path, other: dict[str, int], relation: str) -> None:
        pair = [signature(tokenized(tmp_path, self.VOCAB, "one")), signature(tokenized(tmp_path, other, "two"))]
        assert pair[0].token_relation(pair[1]) == pair[1].token_relation(pair[0]) == relation
        assert groups(pair) == ([[0, 1]] if relation == "equal" else [[0], [1]])
        assert groups(pair, allow_vocabulary_mismatch=True) == [[0, 1]]

    def test_without_tokenizer_files_nothing_is_known(self, tmp_path: Path) -> None:
        known, other = (tokenized(tmp_path, vocab, name) for vocab, name in ((self.VOCAB, "one"), ({"z": 0}, "two")))
        unknown = model(tensors(0))
        assert signature(unknown).token_relation(signature(known)) == "unknown"
        assert groups([signature(one) for one in (unknown, known, other, unknown)]) == [[0, 1, 3], [2]]


def test_real_folders(tiny_zoo: Path) -> None:
    found = [signature(open_checkpoint(tiny_zoo / "models" / name)) for name in ("reverse", "stranger", "drifted", "larger")]
    assert groups(found) == [[0, 2, 3], [1]]
    assert found[1].architecture["class"] == "GPTNeoXForCausalLM"
    assert "gpt_neox.embed_in.weight" not in found[1].tensors
    assert found[0].token_relation(found[1]) == "different"
    assert found[0].differences(found[1])["structural"][0] == "class (LlamaForCausalLM and GPTNeoXForCausalLM)"


def test_no_transformers_is_imported() -> None:
    """Signatures and families know no model class; and importing the package reads no torch."""
    import subprocess
    import sys

    code = "import sys, modelglue.zoo, modelglue.search; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
