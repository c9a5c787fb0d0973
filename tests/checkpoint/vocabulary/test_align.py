"""Alignment by token: which row every model gives for every token, held against a plain implementation with dictionaries."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import Checkpoint, MergedCheckpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.checkpoint.vocabulary import (
    FromModel,
    FromToken,
    TokenPolicy,
    VocabularyRequest,
    Zero,
    align,
    dressed,
    vocabulary,
)
from modelglue.errors import MergeError, RecipeError
from modelglue.methods import get
from tests.checkpoint.files import contents
from tests.checkpoint.vocabulary.models import BIAS, EMBEDDING, HEAD, added, model, table

TOKENS = ["<unk>", *"abcdefgh"]


# -- the plain implementation -----------------------------------------------------------------------------------------------------


def expected_ids(vocabularies: Sequence[Mapping[str, int]], request: VocabularyRequest) -> dict[str, int]:
    """The base's vocabulary is the first."""
    source = request.source if isinstance(request.source, int) else 0
    ids = dict(vocabularies[source])
    if request.source == "union":
        for other in vocabularies:
            for token in sorted(other, key=lambda token: other[token]):
                if token not in ids:
                    ids[token] = max(ids.values(), default=-1) + 1
    for token in request.tokens:
        if token not in ids:
            ids[token] = max(ids.values(), default=-1) + 1
    return ids


def expected_tables(
    vocabularies: Sequence[Mapping[str, int]], tables: Sequence[torch.Tensor], request: VocabularyRequest, based: bool
) -> list[torch.Tensor]:
    ids = expected_ids(vocabularies, request)
    count = max(ids.values()) + 1
    rows = count + -count % (request.pad_to_multiple_of or 1)
    width = tables[0].shape[1:]

    def default(token: str) -> torch.Tensor:
        source = request.tokens.get(token, TokenPolicy()).source
        if isinstance(source, Zero):
            return torch.zeros(width)
        if isinstance(source, FromModel):
            return tables[source.model][vocabularies[source.model][token]]
        if isinstance(source, FromToken):
            row = source.token_id if source.token is None else vocabularies[source.model][source.token]
            return tables[source.model][row]
        owners = [number for number, one in enumerate(vocabularies) if token in one]
        if not owners:
            return torch.zeros(width)
        if len(owners) == 1 or (based and owners[0] == 0):
            return tables[owners[0]][vocabularies[owners[0]][token]]
        return torch.stack([tables[owner][vocabularies[owner][token]] for owner in owners]).double().mean(0).float()

    built = []
    for own, rows_of in zip(vocabularies, tables, strict=True):
        out: list[torch.Tensor | None] = [None] * rows
        for token, number in ids.items():
            forced = request.tokens.get(token, TokenPolicy()).force
            out[number] = rows_of[own[token]] if token in own and not forced else default(token)
        there = [row for row in out if row is not None]
        mean = torch.stack(there).double().mean(0).float()
        built.append(torch.stack([mean if row is None else row for row in out]))
    return built


# -- against it -------------------------------------------------------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn) -> tuple[list[dict[str, int]], list[int], VocabularyRequest]:
    """2 to 4 vocabularies without holes, table heights of at least as many rows, and a request that can be obeyed."""
    vocabularies = []
    heights = []
    for _ in range(draw(st.integers(2, 4))):
        tokens = draw(st.permutations(draw(st.lists(st.sampled_from(TOKENS), min_size=1, unique=True))))
        vocabularies.append({token: number for number, token in enumerate(tokens)})
        heights.append(len(tokens) + draw(st.integers(0, 3)))
    policies = {}
    for token in draw(st.lists(st.sampled_from([*TOKENS, "new", "newer"]), max_size=4, unique=True)):
        number = draw(st.integers(0, len(vocabularies) - 1))
        sources: list[Any] = [None, Zero(), FromToken(number, token_id=draw(st.integers(0, heights[number] - 1)))]
        sources.append(FromToken(number, token=draw(st.sampled_from(sorted(vocabularies[number])))))
        sources += [FromModel(number)] if token in vocabularies[number] else []
        policies[token] = TokenPolicy(draw(st.sampled_from(sources)), draw(st.booleans()))
    source = draw(st.sampled_from(["union", "base", *range(len(vocabularies))]))
    return vocabularies, heights, VocabularyRequest(source, policies, draw(st.sampled_from([None, 1, 4, 16])))


@settings(max_examples=60, deadline=None)
@given(recipes(), st.integers(1, 7), st.booleans())
def test_equals_the_plain_implementation(
    case: tuple[list[dict[str, int]], list[int], VocabularyRequest], limit: int, base_apart: bool
) -> None:
    """Whole tables, any chunk of them, and through a pickle; with a base and without."""
    vocabularies, heights, request = case
    checkpoints = [
        model(ids, rows, seed=10 * number, bias=True) for number, (ids, rows) in enumerate(zip(vocabularies, heights, strict=True), 1)
    ]
    if base_apart:
        models, base = checkpoints[1:], checkpoints[0]
        shift = {0: len(models), **{number: number - 1 for number in range(1, len(checkpoints))}}
    else:
        models, base, shift = checkpoints, None, {number: number for number in range(len(checkpoints))}
    alignment = align(models, base, _shifted(request, shift))
    views = [alignment.base, *alignment.models] if alignment.base is not None else list(alignment.models)
    ids = expected_ids(vocabularies, request)
    output = dressed(checkpoints[0], config=alignment.config, files=alignment.files)
    found = vocabulary(dressed(views[0], config=alignment.config, files=alignment.files))
    assert found is not None
    assert dict(found.ids) == ids
    for name in (EMBEDDING, HEAD, BIAS):
        tables = expected_tables(vocabularies, [table(one, name) for one in checkpoints], request, base_apart)
        for view, expected in zip(views, tables, strict=True):
            assert view is not None
            assert view.info(name).shape == expected.shape
            torch.testing.assert_close(view.tensor(name), expected, rtol=0, atol=1e-7)
            pieces = view.pieces(name, limit)
            assert [start for start, _ in pieces] + [view.info(name).numel] == [0] + [stop for _, stop in pieces]
            chunked = torch.cat([view.read(name, start, stop) for start, stop in pieces])
            assert torch.equal(chunked, view.read(name))
            assert torch.equal(pickle.loads(pickle.dumps(view)).read(name), view.read(name))
    assert output.config["vocab_size"] == tables[0].shape[0]
    assert alignment.report is not None
    assert alignment.report.rows == tables[0].shape[0]
    for one in alignment.report.models:
        counts = one.rows
        total = counts.own + counts.forced + counts.policy + counts.only + counts.base + counts.mean + counts.zero + counts.padding
        assert total == alignment.report.rows


def _shifted(request: VocabularyRequest, shift: Mapping[int, int]) -> VocabularyRequest:
    """The same request with the recipe's positions."""
    tokens = {}
    for token, policy in request.tokens.items():
        source = policy.source
        if isinstance(source, FromModel):
            source = FromModel(shift[source.model])
        elif isinstance(source, FromToken):
            source = FromToken(shift[source.model], source.token, source.token_id)
        tokens[token] = TokenPolicy(source, policy.force)
    asked = request.source if isinstance(request.source, str) else shift[request.source]
    return VocabularyRequest(asked, tokens, request.pad_to_multiple_of)


@settings(max_examples=20, deadline=None)
@given(st.permutations("abcdef"), st.integers(1, 9))
def test_a_renumbered_model_is_the_same_model(order: list[str], limit: int) -> None:
    """Rows in another order, with the tokenizer that says so, align to what they were before: bit for bit, in any chunks."""
    base = model("abcdef", seed=1)
    plain = model("abcdef", seed=5)
    ids = {token: number for number, token in enumerate(order)}
    moved = {}
    for name in (EMBEDDING, HEAD):
        rows = torch.empty_like(table(plain, name))
        for token, number in ids.items():
            rows[number] = table(plain, name)["abcdef".index(token)]
        moved[name] = rows
    renumbered = TensorsCheckpoint(
        {**moved, "model.layers.0.norm.weight": table(plain, "model.layers.0.norm.weight")}, plain.config, model(ids).files, "moved"
    )
    for source in ("base", "union"):
        aligned = align([renumbered], base, VocabularyRequest(source))
        assert aligned.base is base
        for name in plain.names():
            assert torch.equal(aligned.models[0].tensor(name), plain.tensor(name))
            parts = [aligned.models[0].read(name, *piece) for piece in aligned.models[0].pieces(name, limit)]
            assert torch.equal(torch.cat(parts), plain.read(name))


# -- what costs nothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["union", "base", 0, 1])
def test_equal_vocabularies_are_left_as_they_are(source: Any) -> None:
    a, b = model("abc", seed=1), model("abc", seed=2)
    alignment = align([a, b], None, VocabularyRequest(source))
    assert alignment.models[0] is a
    assert alignment.models[1] is b
    assert (alignment.config, alignment.files, alignment.warnings) == ({}, {}, ())


def test_the_tokenizer_of_another_model_is_copied_byte_for_byte() -> None:
    """Equal vocabularies in files of other bytes: the output has the asked one's, and no stray file of the base's."""
    a = model("abc", seed=1, files={"special_tokens_map.json": b"{}", "LICENSE": b"free"})
    spaced = b" " + a.files["tokenizer.json"]  # type: ignore[operator]
    b = model(spaced, seed=2, files={"tokenizer_config.json": b'{"x":  1}', "LICENSE": b"other"})
    alignment = align([b], a, VocabularyRequest(0))
    assert alignment.base is a
    assert alignment.files == {"tokenizer.json": spaced, "tokenizer_config.json": b'{"x":  1}', "special_tokens_map.json": None}
    assert dressed(a, files=alignment.files).files == {**b.files, "LICENSE": b"free"}


def test_a_run_of_own_rows_is_read_without_a_copy() -> None:
    a, b = model("abcdef", seed=1), model("abcdefgh", seed=2)
    view = align([a, b], None, VocabularyRequest()).models[0]
    assert view is not a
    rows = view.read(EMBEDDING, 3, 12)
    assert rows.data_ptr() == a.read(EMBEDDING, 3, 12).data_ptr()


# -- padding, holes, ids beyond the rows ------------------------------------------------------------------------------------------


def test_padding_rows_are_the_mean_of_the_rebuilt_rows() -> None:
    a, b = model("ab", seed=1, dtype=torch.bfloat16), model("ac", seed=2, dtype=torch.bfloat16)
    alignment = align([a, b], None, VocabularyRequest(pad_to_multiple_of=4))
    rows = torch.stack([table(a)[0], table(a)[1], table(b)[1]]).double()
    view = alignment.models[0]
    assert alignment.config == {"vocab_size": 4}
    assert torch.equal(view.tensor(EMBEDDING)[3], rows.mean(0).bfloat16())
    wide = align([a, b], None, VocabularyRequest(pad_to_multiple_of=4), widen=True).models[0]
    assert wide.info(EMBEDDING).dtype == "F32"
    assert torch.equal(wide.tensor(EMBEDDING)[3], rows.mean(0).float())
    assert torch.equal(wide.tensor(EMBEDDING)[:2], table(a).float())


def test_idle_rows_are_not_kept_and_that_is_said() -> None:
    """Tables padded to 8 for 3 tokens; a multiple brings the number back, filled with means."""
    a, b = model("abc", 8, seed=1), model("abc", 8, seed=2)
    alignment = align([a, b], None, VocabularyRequest())
    assert [view.info(EMBEDDING).shape for view in alignment.models] == [(3, 3), (3, 3)]
    assert alignment.config == {"vocab_size": 3}
    assert alignment.warnings[0] == (
        "model1: 5 of its 8 rows belong to no token and are not kept; the output has 3 rows. `pad_to_multiple_of` rounds them up."
    )
    padded = align([a, b], None, VocabularyRequest(pad_to_multiple_of=8))
    assert padded.config == {}
    assert padded.warnings == ()
    torch.testing.assert_close(padded.models[0].tensor(EMBEDDING)[7], table(a)[:3].mean(0))


def test_a_hole_in_the_numbering_keeps_its_row_where_both_have_it() -> None:
    holed = {"a": 0, "b": 1, "c": 4}
    a, b, c = model(holed, seed=1), model(holed, seed=2), model({"a": 0, "b": 1, "d": 2}, seed=3)
    alignment = align([a, b, c], None, VocabularyRequest())
    assert torch.equal(alignment.models[1].tensor(EMBEDDING)[:5], table(b))
    rebuilt = alignment.models[2].tensor(EMBEDDING)
    torch.testing.assert_close(rebuilt[2], rebuilt[[0, 1, 4, 5]].mean(0))
    assert torch.equal(rebuilt[5], table(c)[2])


def test_tokens_beyond_the_rows_are_dropped() -> None:
    """The base numbers a token that it has no row for; another model has one."""
    base = model({"a": 0, "b": 1, "x": 2}, 2, seed=1)
    other = model({"a": 0, "b": 1, "x": 2}, seed=2)
    alignment = align([other], base, VocabularyRequest())
    assert alignment.config == {"vocab_size": 3}
    assert torch.equal(alignment.base.tensor(EMBEDDING)[2], table(other)[2])  # type: ignore[union-attr]
    cut = align([other], base, VocabularyRequest("base"))
    assert cut.config == {}
    assert cut.models[0].info(EMBEDDING).shape == (2, 3)
    assert b'"x"' not in cut.files["tokenizer.json"]  # type: ignore[operator]
    assert cut.warnings[0].startswith("model1: its tokenizer numbers 1 tokens beyond its 2 rows ('x')")


def test_an_aligned_merge_is_written_like_any_other(tmp_path: Path) -> None:
    """By one process and by two: equal folders, with the made tokenizer, the true row count, and the rows of the plain implementation."""
    vocabularies = [{token: number for number, token in enumerate(tokens)} for tokens in ("abcd", "dcbae")]
    models = [model(ids, seed=seed) for seed, ids in enumerate(vocabularies, 1)]
    request = VocabularyRequest(pad_to_multiple_of=8)
    alignment = align(models, None, request)
    merged = MergedCheckpoint(get("linear"), alignment.models, None, {"weight": [0.25, 0.75], "normalize": True})
    output = dressed(merged, config=alignment.config, files=alignment.files, description={"tokenizer": {"source": "union"}})
    for workers in (1, 2):
        save(output, tmp_path / str(workers), workers=workers, chunk=7)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    read = open_checkpoint(tmp_path / "1")
    a, b = expected_tables(vocabularies, [table(one) for one in models], request, based=False)
    torch.testing.assert_close(read.tensor(EMBEDDING), 0.25 * a + 0.75 * b)
    assert read.config["vocab_size"] == 8
    assert vocabulary(read).ids == {**vocabularies[0], "e": 4}  # type: ignore[union-attr]
    assert (tmp_path / "1" / "modelglue_recipe.yaml").read_text().rstrip().endswith("tokenizer:\n  source: union")


# -- what is said -----------------------------------------------------------------------------------------------------------------


def test_a_token_without_any_row_gets_zeros_and_a_warning() -> None:
    a, b = model("ab", seed=1), model("ab", seed=2)
    alignment = align([a, b], None, VocabularyRequest(tokens={"<new>": TokenPolicy(), "<zero>": TokenPolicy(Zero())}))
    assert torch.equal(alignment.models[0].tensor(EMBEDDING)[2:], torch.zeros(2, 3))
    assert alignment.warnings == ("no model has a row for '<new>': zeros. Give a source in `tokens`.",)
    assert alignment.report is not None
    assert str(alignment.report.models[0].rows) == "2 of its own, 1 as the recipe says, 1 zeros"


def test_forced_without_a_source_is_the_default_for_every_model() -> None:
    a, b = model("ab", seed=1), model("ba", seed=2)
    request = VocabularyRequest(tokens={"b": TokenPolicy(force=True)})
    assert torch.equal(align([b], a, request).models[0].tensor(EMBEDDING)[1], table(a)[1])
    mean = (table(a)[1].double() + table(b)[0].double()) / 2
    assert torch.equal(align([a, b], None, request).models[1].tensor(EMBEDDING)[1], mean.float())


def test_without_a_base_no_row_of_several_counts_more() -> None:
    """As in mergekit, which asks a base only where the recipe has one."""
    a, b, c = model("ax", seed=1), model("a", seed=2), model("xa", seed=3)
    mean = (table(a)[1].double() + table(c)[0].double()) / 2
    assert torch.equal(align([a, b, c], None, VocabularyRequest()).models[1].tensor(EMBEDDING)[1], mean.float())
    assert torch.equal(align([b, c], a, VocabularyRequest()).models[0].tensor(EMBEDDING)[1], table(a)[1])


def test_the_same_model_twice_counts_once() -> None:
    """It must not weigh double in the mean over the models that have a token."""
    base, a, b = model("z", seed=1), model("zx", seed=2), model("zx", seed=3)
    alignment = align([a, b, a], base, VocabularyRequest())
    mean = (table(a)[1].double() + table(b)[1].double()) / 2
    assert torch.equal(alignment.base.tensor(EMBEDDING)[1], mean.float())  # type: ignore[union-attr]
    assert alignment.models[0] is a
    assert alignment.models[2] is a


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FromModel(1), "tokens: 'b' takes the row of 'b' in model2, which has no such token."),
        (FromToken(1, token="ca"), "tokens: 'b' takes the row of 'ca' in model2, which has no such token. Did you mean 'c' or 'a'?"),
        (FromToken(1, token_id=5), "tokens: 'b' takes row 5 of model2, which has rows 0 to 1."),
        (FromModel(2), "the tokenizer section names model 2; the recipe has 2."),
    ],
)
def test_sources_that_do_not_exist(policy: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        align([model("ab", seed=1), model("ac", seed=2)], None, VocabularyRequest(tokens={"b": TokenPolicy(policy)}))
    assert str(caught.value) == message


def test_requests_are_checked() -> None:
    with pytest.raises(RecipeError, match="exactly one of token and token_id"):
        FromToken(0)
    with pytest.raises(RecipeError, match="exactly one of token and token_id"):
        FromToken(0, "a", 1)
    with pytest.raises(RecipeError, match="token_id is -1"):
        FromToken(0, token_id=-1)
    with pytest.raises(RecipeError, match="'unoin' is neither union nor base"):
        VocabularyRequest("unoin")
    with pytest.raises(RecipeError, match="pad_to_multiple_of is 0"):
        VocabularyRequest(pad_to_multiple_of=0)


def test_models_that_cannot_be_aligned_are_all_named() -> None:
    bare = model("ab", seed=2, files={"tokenizer.json": None}, label="bare")
    tekken = model("ab", seed=3, files={"tokenizer.json": None, "tekken.json": b"{}"}, label="tekken")
    shifted = model(
        "ab", seed=4, files={"tokenizer.json": None, "spiece.model": b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01b"}, label="t", model_type="t5"
    )
    tableless = TensorsCheckpoint({"layers.0.w": torch.zeros(2, 2)}, {"vocab_size": 2}, model("ab").files, "tableless")
    with pytest.raises(MergeError) as caught:
        align([model("ab"), bare, tekken, shifted, tableless], None, VocabularyRequest())
    lines = str(caught.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["bare", "the made tekken.json", "t", "tableless"]
    assert "which is not read" in lines[1]


def test_rows_of_another_length_or_kind_are_refused() -> None:
    a, wide = model("ab", seed=1), model("ac", seed=2, width=4)
    with pytest.raises(MergeError, match="has rows of 4 numbers in model2 and of 3 in model1"):
        align([a, wide], None, VocabularyRequest())
    whole = TensorsCheckpoint({EMBEDDING: torch.zeros(2, 3, dtype=torch.int8)}, {"vocab_size": 2}, model("ac").files, "whole")
    with pytest.raises(MergeError, match=f"whole: '{EMBEDDING}' is I8; rows can be moved in floating tables only"):
        align([a, whole], None, VocabularyRequest())


# -- identity ---------------------------------------------------------------------------------------------------------------------


def test_a_view_is_known_by_what_it_shows() -> None:
    a, b, c = model("ab", seed=1), model("ac", seed=2), model("ac", seed=3)

    def view(other: Checkpoint, **options: Any) -> Checkpoint:
        return align([a, other], None, VocabularyRequest(**options)).models[0]

    assert view(b).stamp == view(b).stamp
    assert view(b).identity == view(b).identity
    assert len({view(b).identity, view(c).identity, view(b, pad_to_multiple_of=8).identity, a.identity}) == 4
    assert len({view(b).stamp, view(c).stamp, view(b, pad_to_multiple_of=8).stamp, a.stamp}) == 4
    assert view(b).describe() == {"model": "model1"}
    assert [one.describe()["model"] for one in view(b).sources()] == ["model1", "model2"]
    assert view(b).config["vocab_size"] == 3
    assert view(b).origins(EMBEDDING) == [(a, EMBEDDING), (b, EMBEDDING)]
    assert view(b).origins("model.layers.0.norm.weight") == [(a, "model.layers.0.norm.weight")]


# -- names and configs ------------------------------------------------------------------------------------------------------------


def test_the_row_count_is_written_where_the_config_has_it() -> None:
    nested = model("ab", seed=1, vocab_size=None, text_config={"vocab_size": 2, "hidden_size": 3}, tie_word_embeddings=None)
    silent = model("ab", seed=2, vocab_size=None)
    other = model("abc", seed=3)
    assert align([nested, other], None, VocabularyRequest()).config == {"text_config": {"vocab_size": 3}}
    assert align([silent, other], None, VocabularyRequest()).config == {"vocab_size": 3}
    assert align([silent, model("ab", seed=4)], None, VocabularyRequest()).config == {}


@pytest.mark.parametrize("source", ["union", 0])
def test_special_ids_follow_their_tokens(source: Any) -> None:
    """bos, eos and pad are looked up in the output's tokenizer, in config, text config and generation config."""
    base = model(
        {"<s>": 0, "</s>": 1, "a": 2, "<img>": 3}, seed=1,
        bos_token_id=0, eos_token_id=[1, 2], pad_token_id=None, image_token_index=3, text_config={"eos_token_id": 1},
        files={"generation_config.json": b'{"eos_token_id": [1], "temperature": 0.5, "suppress_tokens": [2, 3]}'},
    )  # fmt: skip
    other = model(
        {"a": 0, "<img>": 1, "</s>": 2, "<s>": 3}, seed=2, files={"tokenizer_config.json": b'{"eos_token": "</s>"}'}, bos_token_id=3
    )
    alignment = align([other], base, VocabularyRequest(source))
    if source == "union":
        assert alignment.config == {}
        assert alignment.files == {}
        return
    assert alignment.config == {"bos_token_id": 3, "eos_token_id": 2, "image_token_index": 1, "text_config": {"eos_token_id": 2}}
    generation = alignment.files["generation_config.json"]
    assert generation == b'{\n  "eos_token_id": 2,\n  "temperature": 0.5,\n  "suppress_tokens": [\n    0,\n    1\n  ]\n}\n'


def test_a_special_token_that_the_output_lacks_is_said() -> None:
    base = model({"<s>": 0, "</s>": 1, "a": 2}, seed=1, eos_token_id=1, bos_token_id=0)
    other = model({"<s>": 0, "a": 1}, seed=2)
    alignment = align([other], base, VocabularyRequest(0))
    assert alignment.config == {"eos_token_id": None, "vocab_size": 2}
    assert alignment.warnings == ("config.json: eos_token_id was 1, a token that the output's vocabulary does not have; check it.",)


def test_settings_of_the_first_model_win() -> None:
    import json

    base = model("ab", seed=1)
    first = model("ab", seed=2, added_tokens=[added("<t>", 2, special=True)])
    second = model("ab", seed=3, added_tokens=[added("<t>", 2, special=False), added("<u>", 3, special=False)])
    alignment = align([first, second], base, VocabularyRequest())
    made = json.loads(alignment.files["tokenizer.json"])  # type: ignore[arg-type]
    assert made["added_tokens"] == [added("<t>", 2, special=True), added("<u>", 3, special=False)]
    assert made["model"]["vocab"] == {"a": 0, "b": 1}
