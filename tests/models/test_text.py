"""Text in, log probabilities and text out, against plain calls of the model and the conventions of lm-evaluation-harness."""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from transformers import LlamaForCausalLM

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError
from modelglue.models import LiveTextModel, batches, cached, likelihood, load_live
from modelglue.models.greedy import Stops, decode
from tests.models.tiny import bigram_model, bytes_, letters, marked, pieces, random_model

ARCHITECTURES = ["llama", "llama-tied", "gpt_neox", "gpt2", "qwen2", "gemma", "mixtral", "mistral-window"]
CONTEXTS = [
    "ask: what is it?",
    "ask: who is it?",
    "ask: where",
    "a",
    "",
    "ask: what is it? ",
    "this one is by far the longest of them all\n",
]
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in ("yes", "no", " maybe later", "y")] + [("once", "only")]
PROMPTS = ["reverse: abc =", "reverse: abcde =", "r", "sort: qwertyuiop =", "", "reverse: abc =", "x" * 40]


def _direct(model: Any, ids: Sequence[int], start: int) -> tuple[float, bool]:
    """One row by itself: no batch, no padding, no cache."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(dim=-1)
    cells = [(logits[position - 1], ids[position]) for position in range(start, len(ids))]
    return sum(float(row[target]) for row, target in cells), all(int(row.argmax()) == target for row, target in cells)


def _assert_close(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@contextmanager
def _shapes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of ids that the model reads inside the block."""
    seen: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(lambda _m, _a, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba"])
@pytest.mark.parametrize("worth_sharing", [1, 10**9])
def test_loglikelihood_is_that_of_each_row_by_itself(name: str, worth_sharing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "_WORTH_SHARING", worth_sharing)
    model, tokenizer = random_model(name), letters()
    expected = []
    for context, continuation in PAIRS:
        kept = context.rstrip()
        alone = tokenizer(kept)["input_ids"]  # begins with <s>, so an empty context is no special case
        expected.append(_direct(model, tokenizer(context + continuation)["input_ids"], len(alone)))
    _assert_close(LiveTextModel(model, tokenizer).loglikelihood(PAIRS), expected)


def test_loglikelihood_agrees_with_the_harness() -> None:
    harness = pytest.importorskip("lm_eval.api.model")
    from lm_eval.api.instance import Instance

    model, tokenizer = random_model("gpt_neox", vocab_size=48), letters()

    class PerRow(harness.TemplateLM):  # type: ignore[misc, name-defined]
        """The harness's own handling of text; one plain call of the model per row."""

        eot_token_id = 2
        prefix_token_id = 1

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids: list[int] = tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [_direct(model, context + continuation, len(context)) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        generate_until = loglikelihood_rolling  # type: ignore[assignment]

    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]
    theirs = PerRow().loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    _assert_close(LiveTextModel(model, tokenizer).loglikelihood(pairs), theirs)


def test_blanks_at_the_contexts_end_move_to_the_continuation() -> None:
    text = LiveTextModel(random_model("llama"), letters())
    moved, plain = text.loglikelihood([("abc  \n", "d"), ("abc", "  \nd")])
    assert moved == pytest.approx(plain)
    only_blanks, empty = text.loglikelihood([("  ", "d"), ("", "  d")])
    assert only_blanks == pytest.approx(empty)


def test_an_empty_context_is_the_beginning_of_sequence() -> None:
    model = random_model("llama")
    expected = _direct(model, [1, *letters()("abc", add_special_tokens=False)["input_ids"]], 1)
    _assert_close(LiveTextModel(model, letters()).loglikelihood([("", "abc")]), [expected])


def test_without_a_beginning_an_empty_context_is_the_end_of_text() -> None:
    tokenizer = copy.deepcopy(pieces(begin=False))
    tokenizer.bos_token = None
    model = random_model("gpt2")
    ids = tokenizer("xyz")["input_ids"]
    assert len(ids) == 3
    _assert_close(
        LiveTextModel(model, tokenizer).loglikelihood([("", "xyz"), ("x", "yz")]), [_direct(model, [2, *ids], 1), _direct(model, ids, 1)]
    )


def test_a_token_that_spans_the_border_counts_to_the_continuation() -> None:
    model, tokenizer = random_model("llama"), pieces()
    whole = tokenizer("xabc")["input_ids"]
    assert whole == [1, tokenizer.convert_tokens_to_ids("x"), tokenizer.convert_tokens_to_ids("abc")]
    _assert_close(
        LiveTextModel(model, tokenizer).loglikelihood([("xab", "c"), ("ab", "c")]),
        [_direct(model, whole, 2), _direct(model, [1, whole[2]], 1)],
    )


def test_nothing_to_score_is_certain_and_costs_nothing() -> None:
    model = random_model("llama")
    text = LiveTextModel(model, letters())
    assert text.loglikelihood([("abc", ""), ("", "")]) == [(0.0, True), (0.0, True)]
    with _shapes(model) as shapes:
        text.loglikelihood([("abc", ""), ("", "")])
    assert shapes == []
    assert text.loglikelihood([]) == []


def test_greedy_means_every_token_is_the_most_probable_one() -> None:
    text = LiveTextModel(bigram_model({"a": "b", "b": "c", "c": "d"}, letters()), letters())
    found = text.loglikelihood([("a", "bcd"), ("a", "bcb"), ("a", "bc"), ("a", "c"), ("a", "bcd</s>")])
    assert [greedy for _, greedy in found] == [True, False, True, False, True]


def test_a_context_is_read_once_whatever_the_number_of_its_continuations() -> None:
    model = random_model("llama")
    text = LiveTextModel(model, letters())
    text.loglikelihood([("a", "b")])  # the first call also finds out what kind of cache this is
    with _shapes(model) as shapes:
        text.loglikelihood([("question?", "a"), ("question?", "b"), ("question?", "c")])
    assert shapes == [(1, 10)]  # <s> and nine letters, and single letters are predicted without being read
    with _shapes(model) as shapes:
        text.loglikelihood([("question?", "yes"), ("question?", "no"), ("question?", "n")])
    assert shapes == [(1, 10), (2, 2)]
    with _shapes(model) as shapes:
        text.loglikelihood([("question?", "yes"), ("other question?", "no")])
    assert shapes == [(2, 17)]


def test_full_batches_read_one_continuation_of_every_context_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    text = LiveTextModel(model, letters())
    pairs = [(context, continuation) for context in ("abc", "cba", "cab") for continuation in ("yes", "nos")]
    alone = [text.loglikelihood([pair])[0] for pair in pairs]
    monkeypatch.setattr(likelihood, "MAX_ROWS", 3)
    with _shapes(model) as shapes:
        found = text.loglikelihood([*pairs, ("bac", "only")])
    assert shapes == [(4, 7), (3, 2), (3, 2)]  # the last continuation is alone with its context, and read with it
    _assert_close(found[:-1], alone)


def test_what_all_rows_begin_with_is_read_once() -> None:
    model = random_model("llama")
    text = LiveTextModel(model, letters())
    text.loglikelihood([("a", "b")])
    start = "the same long example in front of everything: "  # with <s>, 47 ids
    pairs = [(f"{start}{letter}", "y") for letter in "abcdefg"]
    with _shapes(model) as shapes:
        text.loglikelihood(pairs)
    assert shapes == [(1, 47), (7, 1)]
    with _shapes(model) as shapes:
        text.generate([context for context, _ in pairs], until=[], max_new_tokens=1)
    assert shapes == [(1, 47), (7, 1)]
    with _shapes(model) as shapes:
        text.loglikelihood(pairs[:6])  # saves 235 positions, less than a pass is worth
    assert shapes == [(6, 48)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=12), st.sampled_from(["llama", "mistral-window"]))
def test_no_answer_depends_on_what_else_is_asked(pairs: list[tuple[str, str]], name: str) -> None:
    text = _MODELS.setdefault(name, LiveTextModel(random_model(name), letters()))
    alone = [text.loglikelihood([pair])[0] for pair in pairs]
    _assert_close(text.loglikelihood(pairs), alone)


_MODELS: dict[str, LiveTextModel] = {}


def test_large_vocabularies_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = LiveTextModel(random_model("llama"), letters())
    expected = text.loglikelihood(PAIRS)
    monkeypatch.setattr(likelihood, "_SCORED_ELEMENTS", 64 * 3)
    monkeypatch.setattr(likelihood, "_LOGIT_ELEMENTS", 64 * 50)
    with _shapes(text.model) as shapes:
        _assert_close(text.loglikelihood(PAIRS), expected)
    assert max(rows * width for rows, width in shapes) <= 50


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba"])
@pytest.mark.parametrize("worth_sharing", [1, 10**9])
def test_generation_is_that_of_transformers_row_by_row(name: str, worth_sharing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "_WORTH_SHARING", worth_sharing)
    model, tokenizer = random_model(name, seed=3), letters()
    if "cache_params" in inspect.signature(model.forward).parameters:
        pytest.skip("the first releases of transformers 5 want positions counted by hand beside such a cache")
    # An end that these models do write: of a list of ids, each counts.
    model.generation_config.eos_token_id = [2, 40]
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0)
        written = out[0, ids.shape[1] :].tolist()
        expected.append(tokenizer.decode([token for token in written if token not in (2, 40)], skip_special_tokens=True))
    text = LiveTextModel(model, tokenizer)
    assert text.generate(PROMPTS, until=[], max_new_tokens=12) == expected
    assert [text.generate([prompt], until=[], max_new_tokens=12)[0] for prompt in PROMPTS] == expected
    assert len(set(expected)) > 3


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=9), st.integers(0, 9))
def test_no_text_depends_on_what_else_is_generated(prompts: list[str], steps: int) -> None:
    text = _MODELS.setdefault("llama", LiveTextModel(random_model("llama"), letters()))
    alone = [text.generate([prompt], until=["q", "xy"], max_new_tokens=steps)[0] for prompt in prompts]
    assert text.generate(prompts, until=["q", "xy"], max_new_tokens=steps) == alone


_CHAIN = dict(pairwise(["x", "ab", "c", " q", "b\nc", ".x", "abc", "d"]))


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ([], "abc qb\nc.xabcd"),
        ([""], "abc qb\nc.xabcd"),
        (["\n"], "abc qb"),  # inside a token
        (["."], "abc qb\nc"),
        (["a"], ""),
        (["bc"], "a"),  # over a border
        (["c "], "ab"),  # ends in a blank
        (["abcd"], "abc qb\nc.x"),
        (["\nc.", " q"], "abc"),
        (["q", "c q"], "ab"),  # both at once: the earlier place counts
        (["no such"], "abc qb\nc.xabcd"),
        (["é", "z"], "abc qb\nc.xabcd"),
    ],
)
def test_stop_strings_are_looked_for_in_the_text(until: list[str], expected: str) -> None:
    text = LiveTextModel(bigram_model(_CHAIN, pieces()), pieces())
    assert text.generate(["x"], until=until, max_new_tokens=20) == [expected]


def test_a_row_stops_where_its_text_does() -> None:
    model = bigram_model(_CHAIN, pieces())
    text = LiveTextModel(model, pieces())
    text.generate(["x"], until=["\n"], max_new_tokens=1)
    with _shapes(model) as shapes:
        assert text.generate(["x"], until=["\n"], max_new_tokens=20) == ["abc qb"]
    assert shapes == [(1, 2), (1, 1), (1, 1), (1, 1)]  # ab, c, " q" are read; "b\nc" ends it


def test_rows_that_have_ended_leave_the_batch() -> None:
    model = bigram_model({"a": "b", "b": "c", "c": "d", "d": "e", "e": "f"}, letters())
    text = LiveTextModel(model, letters())
    text.generate(["a"], until=[], max_new_tokens=1)
    with _shapes(model) as shapes:
        found = text.generate(["f", "e", "e", "d", "d", "d", "d", "a"], until=[], max_new_tokens=9)
    assert found == ["", "f", "f", "ef", "ef", "ef", "ef", "bcdef"]
    # One of eight is left in; after three of eight have ended they go, and so on.
    assert [rows for rows, _ in shapes] == [8, 8, 5, 1, 1, 1]


@pytest.mark.parametrize(("steps", "expected"), [(0, ""), (-1, ""), (1, "b"), (2, "bc"), (3, "bcd"), (99, "bcd")])
def test_at_most_so_many_tokens_are_written(steps: int, expected: str) -> None:
    text = LiveTextModel(bigram_model({"a": "b", "b": "c", "c": "d"}, letters()), letters())
    assert text.generate(["a"], until=[], max_new_tokens=steps) == [expected]
    assert text.generate([], until=[], max_new_tokens=steps) == []


def test_a_special_token_can_be_a_stop_string() -> None:
    tokenizer = copy.deepcopy(pieces())
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<end>", special=True, normalized=False)]})
    model = bigram_model({"a": "b", "b": "<end>", "<end>": "c", "c": "d"}, tokenizer)
    text = LiveTextModel(model, tokenizer)
    assert text.generate(["a"], until=["<end>"], max_new_tokens=9) == ["b"]
    assert text.generate(["a"], until=["\n"], max_new_tokens=9) == ["bcd"]


def test_every_end_that_a_model_comes_with_ends_a_text(tmp_path: Path) -> None:
    """The tokenizer's, the config's, and those of generation_config.json."""
    bigram_model(dict(pairwise("abcdefgh")), letters(), eos_token_id=letters().convert_tokens_to_ids("d")).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    ends = letters().convert_tokens_to_ids(["f", "z"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    text = LiveTextModel(load_live(open_checkpoint(tmp_path)), letters())
    assert text.generate(["a", "d", "g"], until=[], max_new_tokens=9) == ["bc", "e", "h"]


def test_contexts_longer_than_the_limit_keep_their_end() -> None:
    model, tokenizer = random_model("gpt2", n_positions=16), letters()
    text = LiveTextModel(model, tokenizer)
    long = "the beginning of this is lost, its end stays"
    ids = tokenizer(long)["input_ids"]
    out = model.generate(
        torch.tensor([ids[-11:]]), attention_mask=torch.ones(1, 11), do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=63
    )
    assert text.generate([long, "a"], until=[], max_new_tokens=5)[0] == tokenizer.decode(out[0, 11:], skip_special_tokens=True)
    assert text.truncated == 1
    # The last id is only predicted, so 17 ids fit.
    both = tokenizer(long + "xyz")["input_ids"]
    _assert_close(text.loglikelihood([(long, "xyz"), ("a", "b")])[:1], [_direct(model, both[-17:], 14)])
    assert text.truncated == 2
    _assert_close(text.loglikelihood([("a", long)]), [_direct(model, tokenizer("a" + long)["input_ids"][-17:], 1)])
    assert text.truncated == 3
    text.loglikelihood([("a" * 13, "xyz")])  # <s>, 13 and 3: exactly 17
    assert text.truncated == 3


def test_more_tokens_are_asked_for_than_there_are_positions() -> None:
    """A prompt keeps half of the positions, and what fits behind it is written."""
    tokenizer = letters()
    model = bigram_model(dict(pairwise("abcdefghijklmnopqrstuvwxyz")), tokenizer, max_position_embeddings=8)
    text = LiveTextModel(model, tokenizer)
    assert text.generate(["a", "xyzkl", "xa", "mno", ""], until=[], max_new_tokens=50) == ["bcdefg", "mnop", "bcdef", "pqrs", ""]
    assert text.truncated == 1  # <s>xyzkl is six ids
    assert text.generate(["a", "kl"], until=[], max_new_tokens=3) == ["bcd", "mno"]
    assert text.truncated == 1


def test_what_a_model_calls_its_cache_is_asked_once() -> None:
    """Releases of transformers 5 before the renaming know only `past_key_values`."""
    from transformers.cache_utils import DynamicCache

    class Older(LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None, use_cache: Any = None
        ) -> Any:
            new = LlamaForCausalLM.forward
            output = new(
                self, input_ids, attention_mask, position_ids, past_key_values or DynamicCache(config=self.config), use_cache=use_cache
            )
            return SimpleNamespace(logits=output.logits, past_key_values=output[1])

    model = random_model("llama")
    text = LiveTextModel(model, letters())
    expected = text.loglikelihood(PAIRS), text.generate(PROMPTS, until=["\n"], max_new_tokens=6)
    older = Older(model.config).eval()
    older.load_state_dict(model.state_dict())
    found = LiveTextModel(older, letters())
    _assert_close(found.loglikelihood(PAIRS), expected[0])
    assert found.generate(PROMPTS, until=["\n"], max_new_tokens=6) == expected[1]


def test_a_model_without_a_cache_is_refused() -> None:
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> Any:  # type: ignore[override]
            return SimpleNamespace(logits=LlamaForCausalLM.forward(self, input_ids).logits)

    text = LiveTextModel(Forgetful(random_model("llama").config).eval(), letters())
    with pytest.raises(CheckpointError, match="Forgetful: hands out no cache"):
        text.generate(["a"], until=[], max_new_tokens=2)


def test_nan_is_passed_on() -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    text = LiveTextModel(model, letters())
    (value, greedy), (empty, _) = text.loglikelihood([("ab", "cd"), ("ab", "")])
    assert math.isnan(value)
    assert not greedy
    assert empty == 0.0
    text.generate(["ab"], until=["\n"], max_new_tokens=3)


def test_a_text_that_begins_itself_is_not_begun_twice() -> None:
    model = random_model("llama")
    text = LiveTextModel(model, letters())
    begun, plain = text.loglikelihood([("<s>abc", "de"), ("abc", "de")])
    assert begun == pytest.approx(plain)
    assert text.generate(["<s>abc"], until=[], max_new_tokens=5) == text.generate(["abc"], until=[], max_new_tokens=5)


def test_a_tokenizer_that_closes_every_text_does_not_close_contexts() -> None:
    closing = pieces(begin=True)
    import copy

    tokenizer = copy.deepcopy(closing)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("xyz")["input_ids"][-1] == 2
    model = random_model("llama")
    found, plain = (LiveTextModel(model, one) for one in (tokenizer, pieces()))
    pairs = [("xyz", "pqr"), ("xyz", "r"), ("", "w"), ("xyz", "</s>")]
    _assert_close(found.loglikelihood(pairs), plain.loglikelihood(pairs))
    assert found.generate(["xyz"], until=[], max_new_tokens=5) == plain.generate(["xyz"], until=[], max_new_tokens=5)


def test_an_id_without_an_embedding_is_an_error() -> None:
    text = LiveTextModel(random_model("llama", vocab_size=40), letters())
    with pytest.raises(CheckpointError, match=r"the tokenizer makes id 46 of 'ab\?', .* embeddings for 40 ids only"):
        text.generate(["ab?"], until=[], max_new_tokens=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=300), st.integers(1, 4000), st.booleans())
def test_batches(lengths: list[int], positions: int, equal: bool) -> None:
    found = batches(lengths, positions, equal=equal)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= cached.MAX_ROWS for batch in found)
    for batch in found:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or len(batch) * longest <= positions
        assert not equal or {lengths[place] for place in batch} == {longest}
    in_order = [lengths[place] for batch in found for place in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert batches(list(lengths), positions, equal=equal) == found


def test_batches_are_full() -> None:
    assert batches([5, 9, 5, 5], 10) == [[1], [0, 2], [3]]
    assert batches([1] * 300) == [list(range(128)), list(range(128, 256)), list(range(256, 300))]
    assert batches([4, 3, 4, 3], 100, equal=True) == [[0, 2], [1, 3]]
    assert batches([]) == []


_DECODERS = {
    "pieces": (pieces(), [2, *range(4, 8), *range(48, 53)], "abcx. q\n"),
    "marked": (marked(), list(range(2, 12)), "ab \né"),
    "bytes": (bytes_(), [2, *bytes_()("ab \né.", add_special_tokens=False)["input_ids"]], "ab \né."),
}


@pytest.mark.parametrize("kind", _DECODERS)
def test_decoding_the_row_is_left_out_only_where_no_stop_string_can_have_ended(kind: str) -> None:
    """Against looking at the whole text after every id, for random tokens and stop strings."""
    tokenizer, tokens, characters = _DECODERS[kind]
    source = random.Random(0)
    hits = 0
    for _ in range(400):
        until = ["".join(source.choice(characters) for _ in range(source.randint(1, 3))) for _ in range(source.randint(1, 2))]
        stops, ids = Stops(tokenizer, until), []
        for _ in range(12):
            ids.append(source.choice(tokens))
            reached = any(stop in decode(tokenizer, ids) for stop in until)
            assert stops.reached(ids) == reached, (until, ids)
            if reached:
                hits += 1
                break
    assert hits > 100
