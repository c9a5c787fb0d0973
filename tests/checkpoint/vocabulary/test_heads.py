"""Heads that some models tie to their embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.checkpoint.vocabulary import VocabularyRequest, align, tied_heads
from tests.checkpoint.vocabulary.models import EMBEDDING, HEAD, model, table


def test_no_head_anywhere_is_no_head() -> None:
    a, b = model("ab", seed=1, head=False), model("ab", seed=2, head=False)
    heads = tied_heads([a, b], None)
    assert heads.models[0] is a
    assert heads.models[1] is b
    assert heads.config == {}


@pytest.mark.parametrize("base_ties", [True, False])
def test_a_tied_model_gives_its_embedding_as_the_head(base_ties: bool) -> None:
    """The output has a head of its own, and its config says so: a loader that ties would not read it."""
    base, other = model("ab", seed=1, head=not base_ties), model("ab", seed=2, head=base_ties)
    heads = tied_heads([other], base)
    tied, untied = (heads.base, heads.models[0]) if base_ties else (heads.models[0], heads.base)
    source = base if base_ties else other
    assert tied is not None
    assert untied is (other if base_ties else base)
    assert list(tied.names()) == list(untied.names())
    assert torch.equal(tied.tensor(HEAD), table(source, EMBEDDING))
    assert torch.equal(tied.tensor(EMBEDDING), table(source, EMBEDDING))
    assert heads.config == ({"tie_word_embeddings": False} if base_ties else {})


def test_heads_everywhere() -> None:
    """Untied: nothing to say. Tied by config, with a copy on disk that no loader reads: the config stays."""
    a, b = model("ab", seed=1), model("ab", seed=2)
    assert tied_heads([a], b).config == {}
    a, b = model("ab", seed=1, tie_word_embeddings=True), model("ab", seed=2, tie_word_embeddings=True)
    heads = tied_heads([a], b)
    assert heads.models[0] is a
    assert heads.base is b
    assert heads.config == {}
    c = model("ab", seed=3, tie_word_embeddings=False)
    assert tied_heads([c], b).config == {"tie_word_embeddings": False}


def test_a_model_that_does_not_tie_is_not_given_a_head() -> None:
    """Its head is missing, which is the merge's to say."""
    a = model("ab", seed=1)
    b = model("ab", seed=2, head=False, tie_word_embeddings=False)
    assert tied_heads([a, b], None).models[1] is b


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {}),
        ({"x": 1}, {"tie_word_embeddings": False}),
        ({"text_config": {"tie_word_embeddings": True}}, {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}),
        ({"tie_word_embeddings": True, "text_config": {"vocab_size": 2}}, {"tie_word_embeddings": False}),
    ],
)
def test_where_the_config_says_it(config: dict[str, Any], changes: dict[str, Any]) -> None:
    tied = model("ab", seed=1, head=False)
    tied = TensorsCheckpoint({name: table(tied, name) for name in tied.names()}, config)
    assert tied_heads([model("ab", seed=2)], tied).config == changes


def test_every_name_of_a_shared_table() -> None:
    """T5 may store its shared table under the names of encoder and decoder as well; BERT its head's bias twice."""
    shared = torch.arange(6.0).view(3, 2)
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight"]
    config = {"vocab_size": 3, "tie_word_embeddings": True}
    whole, brief = TensorsCheckpoint(dict.fromkeys(names, shared + 1), config), TensorsCheckpoint({"shared.weight": shared}, config)
    heads = tied_heads([brief], whole)
    assert all(torch.equal(heads.models[0].tensor(name), shared) for name in names)
    assert heads.config == {}
    bert = {"bert.embeddings.word_embeddings.weight": shared, "cls.predictions.bias": torch.tensor([1.0, 2.0, 3.0])}
    head = {"cls.predictions.decoder.weight": shared + 2, "cls.predictions.decoder.bias": torch.tensor([4.0, 5.0, 6.0])}
    views = tied_heads([TensorsCheckpoint(bert, config)], TensorsCheckpoint({**bert, **head}, config))
    assert torch.equal(views.models[0].tensor("cls.predictions.decoder.weight"), shared)
    assert views.models[0].tensor("cls.predictions.decoder.bias").tolist() == [1.0, 2.0, 3.0]
    assert views.config == {"tie_word_embeddings": False}


@pytest.mark.parametrize("request_", [VocabularyRequest(), VocabularyRequest(pad_to_multiple_of=8)])
def test_a_missing_row_of_a_head_is_the_row_that_the_other_ties(request_: VocabularyRequest) -> None:
    """Vocabularies are aligned first: the head of one model takes a row from the embedding of another, which has no head."""
    base, other = model("ab", seed=1), model("abc", seed=2, head=False)
    alignment = align([other], base, request_)
    heads = tied_heads(alignment.models, alignment.base)
    assert heads.base is not None
    assert torch.equal(heads.base.tensor(HEAD)[2], table(other, EMBEDDING)[2])
    assert torch.equal(heads.base.tensor(HEAD)[:2], table(base, HEAD))
    assert torch.equal(heads.models[0].tensor(HEAD)[:3], table(other, EMBEDDING))
    assert heads.config == {}
