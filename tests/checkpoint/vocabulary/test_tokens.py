"""Reading vocabularies and finding the tables that belong to them; the files are a stranger's."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.checkpoint.vocabulary import tables_of, vocabulary
from modelglue.checkpoint.vocabulary.pieces import BYTE, Piece, append_pieces, read_pieces
from modelglue.errors import CheckpointError
from tests.checkpoint.vocabulary.models import BIAS, EMBEDDING, HEAD, added, model

SETTINGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def tokens(files: dict[str, bytes], rows: int = 10) -> Any:
    return vocabulary(model({}, rows, files={"tokenizer.json": None, **files}))


# -- tokens -----------------------------------------------------------------------------------------------------------------------


def test_every_file_that_says_which_tokens_there_are() -> None:
    assert tokens({}) is None
    assert tokens({"tekken.json": b"{}"}) is None
    assert tokens({"vocab.json": b'{"a": 1, "b": 0}'}).ids == {"a": 1, "b": 0}
    assert tokens({"vocab.txt": b"[PAD]\r\nthe\r\n\xe2\x80\xa8\r\n"}).ids == {"[PAD]": 0, "the": 1, "\u2028": 2}
    assert tokens({"vocab.txt": b"a\nb"}).ids == {"a": 0, "b": 1}
    pieces = append_pieces(b"", [Piece("<unk>"), Piece("\u2581a", -1.0)])
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"):
        assert tokens({name: pieces}).ids == {"<unk>": 0, "\u2581a": 1}
    assert tokens({"tokenizer.json": b'{"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}'}).ids == {"a": 0, "b": 1}
    everything = {"vocab.json": b'{"j": 0}', "vocab.txt": b"t\n", "tokenizer.model": pieces, "merges.txt": b""}
    assert tokens({**everything, "tokenizer.json": b'{"model": {"vocab": {"x": 3}}}'}).ids == {"x": 3}
    assert tokens(everything).ids == {"j": 0}


def test_added_tokens_and_their_settings() -> None:
    whole = vocabulary(model({"a": 0}, 9, added_tokens=[added("<t>", 1), added("a", 0, special=False)]))
    assert whole is not None
    assert whole.ids == {"a": 0, "<t>": 1}
    assert whole.added == {"<t>": {**SETTINGS, "normalized": False, "special": True}, "a": SETTINGS}
    beside = tokens(
        {
            "vocab.json": b'{"a": 0, "b": 1}',
            "added_tokens.json": b'{"<u>": 2, "b": 1}',
            "tokenizer_config.json": b'{"added_tokens_decoder": {"3": {"content": "<v>", "lstrip": true, "special": true}}}',
        }
    )
    assert beside.ids == {"a": 0, "b": 1, "<u>": 2, "<v>": 3}
    assert beside.added == {
        "<v>": {**SETTINGS, "lstrip": True, "normalized": False, "special": True}, "<u>": SETTINGS, "b": SETTINGS,
    }  # fmt: skip


def test_ids_without_a_row_are_set_apart() -> None:
    found = vocabulary(model({"a": 0, "b": 5, "c": 4}, 5))
    assert found is not None
    assert found.ids == {"a": 0, "c": 4}
    assert found.beyond == {"b": 5}
    taller = vocabulary(model({"a": 0, "b": 5}, 8, vocab_size=5))
    assert taller is not None
    assert taller.beyond == {"b": 5}


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("tokenizer.json", b"\xff", "codec can't decode"),
        ("tokenizer.json", b"[" * 100_000, "nested too deeply"),
        ("tokenizer.json", b"{}", "KeyError"),
        ("tokenizer.json", b'{"model": {"vocab": 3}}', "int, not an object of ids"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}', "-1 is not the id of a token"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": true}}}', "True is not the id of a token"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 99999999999999999999}}}', "is not the id of a token"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0.5}}}', "0.5 is not the id of a token"),
        ("tokenizer.json", b'{"model": {"vocab": [[1, 2]]}}', "1 is not a token"),
        ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 0}}}', "is not Unicode text"),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"content": "x"}]}', "KeyError"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "invalid literal"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "AttributeError"),
        ("added_tokens.json", b'{"x": "1"}', "'1' is not the id of a token"),
    ],
)
def test_damaged_files_are_named(name: str, data: bytes, what: str) -> None:
    files = {"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}', name: data}
    with pytest.raises(CheckpointError) as caught:
        tokens(files)
    assert str(caught.value).startswith(f"the made {name}: is not a tokenizer file (")
    assert what in str(caught.value)
    assert len(str(caught.value)) < 400


# -- sentencepiece ----------------------------------------------------------------------------------------------------------------


def test_pieces_are_read_as_the_format_says() -> None:
    """Written by hand: fields in any order, unknown fields of every wire type, pieces not in one stretch."""
    first = b"\x15" + struct.pack("<f", -2.5) + b"\x0a\x03\xe2\x96\x81"  # score before text
    second = b"\x0a\x06<0x0A>\x18\x06\x22\x01z"  # a byte piece with an unknown field 4
    unknown = b"\x12\x02ab" + b"\x28\x96\x01" + b"\x31" + bytes(8) + b"\x3d" + bytes(4)
    data = b"\x0a" + bytes([len(first)]) + first + unknown + b"\x0a" + bytes([len(second)]) + second
    assert read_pieces(data) == [Piece("\u2581", -2.5), Piece("<0x0A>", 0.0, BYTE)]
    assert append_pieces(data, [Piece("x", 1.0)]) == data + b"\x0a\x08\x0a\x01x\x15" + struct.pack("<f", 1.0)


PIECES = st.lists(
    st.builds(Piece, st.text(st.characters(exclude_categories=["Cs"]), max_size=200), st.sampled_from([0.0, -1.5]), st.integers(1, 6)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(PIECES, PIECES)
def test_appended_pieces_are_read_again(pieces: list[Piece], more: list[Piece]) -> None:
    assert read_pieces(append_pieces(append_pieces(b"\x12\x01a", pieces), more)) == [*pieces, *more]


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 255))
def test_hostile_pieces_end_in_one_error(data: bytes, place: int, byte: int) -> None:
    """Random bytes, and a healthy model with one byte changed: pieces or a ValueError, nothing else."""
    healthy = bytearray(append_pieces(b"\x12\x01a", [Piece("abc", -1.0), Piece("d" * 40, 0.0, 3)]))
    healthy[place % len(healthy)] = byte
    for candidate in (data, bytes(healthy), bytes(healthy)[:place]):
        try:
            assert all(isinstance(piece.text, str) for piece in read_pieces(candidate))
        except ValueError as error:
            assert str(error)  # noqa: PT017 - a mutation may be harmless


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it has no pieces"),
        (b"\x0a", "ends inside a number"),
        (b"\x0a\x80", "ends inside a number"),
        (b"\x0a\xff\xff\xff\xff\x0f", "leads out of the file"),
        (b"\x0a" + b"\xff" * 11, "has no end"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "codec can't decode"),
    ],
)
def test_what_is_no_sentencepiece_model(data: bytes, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        tokens({"tokenizer.model": data})


# -- tables -----------------------------------------------------------------------------------------------------------------------


def tables(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> tuple[int, tuple[str, ...], str | None, tuple[str, ...]]:
    found = tables_of(TensorsCheckpoint({name: torch.zeros(shape) for name, shape in shapes.items()}, config))
    return found.rows, found.names, found.embedding, found.heads


def test_tables_of_the_usual_models() -> None:
    whole = model("abc", bias=True)
    assert tables_of(whole).names == (BIAS, HEAD, EMBEDDING)
    assert tables_of(whole).embedding == EMBEDDING
    assert tables_of(whole).heads == (HEAD,)
    gpt = {"wte.weight": (64, 8), "wpe.weight": (64, 8), "h.0.mlp.weight": (64, 8), "ln_f.bias": (8,)}
    assert tables(gpt, vocab_size=64) == (64, ("wte.weight",), "wte.weight", ())
    bert = {
        "bert.embeddings.word_embeddings.weight": (9, 4), "bert.embeddings.position_embeddings.weight": (9, 4),
        "bert.embeddings.token_type_embeddings.weight": (9, 4), "cls.predictions.bias": (9,), "cls.predictions.decoder.weight": (9, 4),
        "cls.predictions.decoder.bias": (9,), "bert.pooler.dense.weight": (4, 4),
    }  # fmt: skip
    assert tables(bert, vocab_size=9) == (
        9,
        (
            "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.bias",
            "cls.predictions.decoder.weight",
        ),
        "bert.embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",),
    )  # fmt: skip
    t5 = {"shared.weight": (9, 4), "encoder.embed_tokens.weight": (9, 4), "decoder.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}
    assert tables(t5, vocab_size=9)[2:] == ("shared.weight", ("lm_head.weight",))
    bart = {"model.shared.weight": (9, 4), "final_logits_bias": (1, 9)}
    assert tables(bart, vocab_size=9)[1] == ("final_logits_bias", "model.shared.weight")
    vision = {"vision.patch.weight": (9, 4), "language_model.model.embed_tokens.weight": (7, 4), "language_model.lm_head.weight": (7, 4)}
    assert tables(vision, text_config={"vocab_size": 7})[1] == ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")


def test_a_config_that_does_not_say_how_many_rows() -> None:
    shapes = {"backbone.embeddings.weight": (9, 4), "lm_head.weight": (9, 4), "norm.weight": (9,)}
    assert tables(shapes) == (9, ("backbone.embeddings.weight", "lm_head.weight"), "backbone.embeddings.weight", ("lm_head.weight",))
    assert tables(shapes, vocab_size=7)[0] == 9
    assert tables_of(TensorsCheckpoint({"embeddings.weight": torch.zeros(9, 4)}, {"vocab_size": 7})).limit == 7
    assert tables({"x.weight": (9, 4)}) == (0, (), None, ())


def test_unusual_names_are_found_by_their_height() -> None:
    shapes = {"tok.weight": (9, 4), "unembed.weight": (9, 4), "proj.weight": (4, 9), "layers.0.w": (9, 4)}
    assert tables(shapes, vocab_size=9)[1] == ("tok.weight", "unembed.weight")
    assert tables({"tok.weight": (9, 4)}, vocab_size=9) == (9, ("tok.weight",), "tok.weight", ())


def test_square_tables_are_told_by_their_names_only() -> None:
    """Eight tokens of eight numbers: the projection and the norm's bias are no tables."""
    shapes = {"embed_tokens.weight": (8, 8), "projection.weight": (8, 8), "norm.bias": (8,), "lm_head.weight": (8, 8), "lm_head.bias": (8,)}
    assert tables(shapes, vocab_size=8)[1] == ("embed_tokens.weight", "lm_head.bias", "lm_head.weight")
