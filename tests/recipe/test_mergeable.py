"""May these models be merged? Architectures, vocabularies, and configs that change what equal weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import MergeError, UserError
from modelglue.recipe import check_mergeable, vocabulary, warnings_of
from tests.recipe.on_disk import WORDS, write_model, write_tokenizer
from tests.zoo.models import model, tensors

WEIGHTS = tensors(0)


def written(folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(write_model(folder, **options))


# -- architecture -----------------------------------------------------------------------------------------------------------------


def test_one_architecture(tmp_path: Path) -> None:
    a = written(tmp_path / "a")
    check_mergeable([a, written(tmp_path / "b")])
    mistral = written(tmp_path / "mistral", architectures=["MistralForCausalLM"])
    with pytest.raises(MergeError) as caught:
        check_mergeable([a, mistral])
    assert str(caught.value) == (
        f"{tmp_path}/mistral is a MistralForCausalLM and {tmp_path}/a a LlamaForCausalLM; one merge takes one architecture. "
        "Leave one of them out, join them as experts of a mixture, or say allow_mixed: true if their tensors fit."
    )


@pytest.mark.parametrize("unknown", [None, [], "LlamaForCausalLM"])
def test_an_unknown_architecture_is_no_mismatch(unknown: Any) -> None:
    """The tensors decide then: a merge of bare weight files needs no config."""
    check_mergeable([model(WEIGHTS), model(WEIGHTS, architectures=unknown)])
    check_mergeable([model(WEIGHTS, architectures=unknown), model(WEIGHTS)])


# -- vocabulary -------------------------------------------------------------------------------------------------------------------


def test_vocabularies_must_number_alike(tmp_path: Path) -> None:
    a = written(tmp_path / "a")
    check_mergeable([a, written(tmp_path / "same")])
    swapped = written(tmp_path / "swapped", words=["<s>", "</s>", "b", "a", "c", "d", "e", "f"])
    with pytest.raises(MergeError) as caught:
        check_mergeable([a, swapped])
    assert str(caught.value) == (
        f"{tmp_path}/swapped and {tmp_path}/a number their tokens differently (2 tokens, among them 'a': 3 and 2), "
        "so their embedding rows do not mean the same. Add `tokenizer: {source: base}` (or `source: union`) to the recipe, which aligns "
        "rows by token; or `vocabulary_mismatch: truncate`, which takes the common rows as they are."
    )
    shorter = written(tmp_path / "shorter", words=WORDS[:-1])
    with pytest.raises(MergeError, match=r"\(1 tokens, among them 'f': None and 7\)"):
        check_mergeable([a, shorter])
    longer = written(tmp_path / "longer", words=[*WORDS, "g"])  # a token without a row in any model
    check_mergeable([a, longer])


def test_the_same_vocabulary_may_be_written_differently(tmp_path: Path) -> None:
    a = written(tmp_path / "a")
    b = written(tmp_path / "b", words=None)
    vocab = {word: number for number, word in enumerate(WORDS)}
    write_tokenizer(tmp_path / "b", dict(reversed(vocab.items())), added=[{"content": "<s>", "id": 0}])
    assert a.files["tokenizer.json"].read_bytes() != b.files["tokenizer.json"].read_bytes()
    check_mergeable([a, b])


def test_no_tokenizer_is_nothing_to_compare(tmp_path: Path) -> None:
    a, bare = written(tmp_path / "a"), written(tmp_path / "bare", words=None)
    assert vocabulary(bare) is None
    check_mergeable([a, bare])
    check_mergeable([bare, a])


def test_words_of_dictionaries_lists_and_added_tokens(tmp_path: Path) -> None:
    a = written(tmp_path / "a", words=["x", "y"])
    assert vocabulary(a) == {"x": 0, "y": 1}
    unigram = written(tmp_path / "unigram", words=None)
    write_tokenizer(tmp_path / "unigram", [["<unk>", 0.0], ["x", -1.5]], added=[{"content": "<pad>", "id": 5}])
    assert vocabulary(unigram) == {"<unk>": 0, "x": 1, "<pad>": 5}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "{}", '{"model": {}}', '{"model": {"vocab": 3}}', '{"model": {"vocab": [[]]}}',
        '{"model": {"vocab": {}}, "added_tokens": [{}]}', '{"model": {"vocab": {}}, "added_tokens": [3]}', "\xff",
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    a, broken = written(tmp_path / "a"), written(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{tmp_path}/broken/tokenizer.json: is not a tokenizer file"):
        check_mergeable([a, broken])


# -- functions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ({}, {}, None),
        ({}, {"rms_norm_eps": 1e-5}, None),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta = 1000000.0, first has 10000.0"),
        ({"rope_theta": 1e4}, {}, None),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, None),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta = 1000000.0, first has 10000.0"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = {'factor': 2, 'type': 'linear'}, first has none"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": None},
            "rope_scaling = none, first has {'factor': 2, 'type': 'linear'}",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": {"rope_type": "linear", "factor": 2}}, None),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act = gelu, first has silu"),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": 1}, "num_key_value_heads = 1, first has 2"),
        ({"num_attention_heads": 2}, {"num_attention_heads": 3}, "num_attention_heads = 3, first has 2"),
        ({"logit_scale": 1.0}, {"logit_scale": 2.0}, "logit_scale = 2.0, first has 1.0"),
        ({"head_dim": 4}, {"head_dim": None}, None),
    ],
)  # fmt: skip
def test_configs_that_compute_differently_are_warned_of(
    ours: dict[str, Any], theirs: dict[str, Any], difference: str | None, tmp_path: Path
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    checkpoints = [written(first, **ours), written(other, **theirs)]
    check_mergeable(checkpoints)
    expected = [] if difference is None else [f"{other} has {difference.replace('first', str(first))}; the output takes the first one's."]
    assert warnings_of(checkpoints) == expected


def test_every_model_is_compared_with_the_first(tmp_path: Path) -> None:
    checkpoints = [written(tmp_path / name, hidden_act=act) for name, act in (("a", "silu"), ("b", "gelu"), ("c", "silu"), ("d", "relu"))]
    assert [warning.split(" has ")[0] for warning in warnings_of(checkpoints)] == [f"{tmp_path}/b", f"{tmp_path}/d"]


def test_a_model_without_config_is_compared_with_none_and_gives_none(tmp_path: Path) -> None:
    a, bare = written(tmp_path / "a", rope_scaling={"type": "linear", "factor": 2}), written(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_scaling"]
    assert warnings_of([a, bare]) == []
    [said] = warnings_of([bare, a])
    assert said == f"{tmp_path}/bare has no config.json, so the output has none. Put one there, or name another model first."
