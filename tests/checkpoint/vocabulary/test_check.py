"""Without a tokenizer section: models must agree, or be cut to what they have in common."""

from __future__ import annotations

import json

import pytest
import torch

from modelglue.checkpoint import TensorsCheckpoint, file_bytes
from modelglue.checkpoint.vocabulary import check_vocabularies, dressed, truncate, vocabulary
from modelglue.errors import MergeError
from tests.checkpoint.vocabulary.models import EMBEDDING, HEAD, added, model, table


def refusal(models: list[TensorsCheckpoint], base: TensorsCheckpoint | None = None) -> str:
    with pytest.raises(MergeError) as caught:
        check_vocabularies(models, base, [f"m{number}" for number in range(len(models))] + ["base"])
    return str(caught.value)


REMEDY = (
    " Add `tokenizer: {source: base}` (or `source: union`) to the recipe, which aligns rows by token; "
    "or `vocabulary_mismatch: truncate`, which takes the common rows as they are."
)


def test_models_that_agree_pass() -> None:
    a, b = model("abc", seed=1), model("abc", seed=2)
    check_vocabularies([a, b], None)
    check_vocabularies([a], b)
    other_bytes = model(b" " + file_bytes(a.files["tokenizer.json"]), seed=3)
    check_vocabularies([a, other_bytes], b)


def test_another_numbering_is_refused_with_the_remedies() -> None:
    assert refusal([model("abc", seed=1), model("acb", seed=2)]) == (
        "m1 and m0 number their tokens differently (2 tokens, among them 'b': 2 and 1), so their embedding rows do not mean the same."
        + REMEDY
    )
    assert refusal([model("ab", seed=1), model("abc", seed=2)], model("ab", seed=3)) == (
        "m1 and base number their tokens differently (1 tokens, among them 'c': 2 and None), so their embedding rows do not mean the same."
        + REMEDY
    )


def test_equal_tokens_on_tables_of_other_heights_are_refused() -> None:
    assert refusal([model("abc", 3, seed=1), model("abc", 8, seed=2)]) == (
        "m1 has 8 embedding rows and m0 3, so their tables do not match." + REMEDY
    )
    bare = {"tokenizer.json": None}
    assert "m1 has 8 embedding rows" in refusal([model("abc", 3, seed=1, files=bare), model("abc", 8, seed=2, files=bare)])


def test_tokens_that_no_model_has_a_row_for_do_not_matter() -> None:
    check_vocabularies([model("ab", seed=1), model("abx", 2, seed=2)], None)
    assert "'x': 2 and None" in refusal([model("ab", 3, seed=1), model("abx", 3, seed=2)])


def test_an_unread_vocabulary_is_refused_unless_the_files_are_equal() -> None:
    a, b, c = (
        model("ab", seed=seed, files={"tokenizer.json": None, "tekken.json": data}) for seed, data in enumerate((b"{}", b"{}", b"[]"), 1)
    )
    check_vocabularies([a, b], None)
    assert "which is not read" in refusal([a, c])


def test_truncation_takes_the_common_rows_and_says_how_many() -> None:
    """Also out of the tokenizer and the special ids of the output, which takes after the base."""
    base = model(
        "abcd", seed=1, added_tokens=[added("<pad>", 4)], pad_token_id=4, eos_token_id=[1, 4],
        files={"generation_config.json": b'{"pad_token_id": 4, "top_k": 3}'},
    )  # fmt: skip
    other = model("abc", seed=2)
    cut = truncate([other], base)
    assert cut.models[0] is other
    assert cut.base is not None
    assert torch.equal(cut.base.tensor(EMBEDDING), table(base)[:3])
    assert torch.equal(cut.base.read(HEAD, 2, 5), table(base, HEAD).view(-1)[2:5])
    assert cut.config == {"vocab_size": 3, "pad_token_id": None, "eos_token_id": [1]}
    output = dressed(cut.base, config=cut.config, files=cut.files)
    found = vocabulary(output)
    assert found is not None
    assert (found.ids, found.beyond) == ({"a": 0, "b": 1, "c": 2}, {})
    assert json.loads(file_bytes(output.files["generation_config.json"])) == {"pad_token_id": None, "top_k": 3}
    assert cut.warnings[0] == "the tables are cut to the 3 rows that all models have."
    assert "number their tokens differently (2 tokens, among them '<pad>': None and 4)" in cut.warnings[1]
    assert cut.warnings[1].endswith("They are merged by number all the same.")


def test_nothing_to_cut() -> None:
    a, b = model("abc", seed=1), model("acb", seed=2)
    same = truncate([a, b], None)
    assert same.models[0] is a
    assert same.models[1] is b
    assert (same.config, same.files) == ({}, {})
    assert len(same.warnings) == 1
