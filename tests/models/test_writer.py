"""Sampling, beams and running batches: a row's text is its own, whoever is beside it."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.models import LiveTextModel, Unanswered
from modelglue.models.beams import beam_search
from modelglue.models.sampling import Draw, Sampling, choose
from modelglue.models.writer import Asked, Writer
from tests.models.tiny import CONFIGS, bigram_model, bytes_, letters, marked, pieces, random_model

PROMPTS = ["abc", "what is 12?", "x", "", "letters: abcabc", "a longer one, of forty letters and more 12"]
WARM = Sampling(temperature=1.0, top_p=0.9, seed=7)


@cache
def writer(name: str = "llama") -> Writer:
    return Writer(LiveTextModel(random_model(name, seed=3), pieces()))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_greedy_rows_are_what_the_model_generates(name: str) -> None:
    """Cached, padded and joined, in every architecture: also where pads would change a state, and where a window is outgrown."""
    expected = writer(name).model.generate(PROMPTS, until=["b\n"], max_new_tokens=9)
    assert len(set(expected)) > 3
    assert writer(name).write(PROMPTS, until=["b\n"], max_new_tokens=9) == expected


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral-window", "mamba"])
def test_cached_is_uncached_token_for_token(name: str) -> None:
    made = writer(name)
    for prompt in PROMPTS[:3]:
        row = made.row(Asked(made.ids(prompt), 12), [])
        batch = made.batch()
        with made.running():
            batch.tick([row])
            while batch.rows:
                batch.tick()
            ids = made.ids(prompt)
            for token in row.written:
                assert int(made.model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
                ids.append(token)
        assert row.finish == ("length" if len(row.written) == 12 else "stop")


@settings(max_examples=20, deadline=None)
@given(data=st.data(), name=st.sampled_from(["llama", "gpt_neox", "mistral-window"]))
def test_neither_neighbours_nor_comings_and_goings_change_a_text(data: st.DataObject, name: str) -> None:
    made = writer(name)
    picks = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6))
    seeds = data.draw(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=len(picks), max_size=len(picks)))
    joins = data.draw(st.lists(st.integers(0, 5), min_size=len(picks), max_size=len(picks)))
    leaves = data.draw(st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=len(picks), max_size=len(picks)))
    how = [None if seed is None else Sampling(temperature=0.9, top_p=0.8, seed=seed) for seed in seeds]
    rows = [made.row(Asked(made.ids(PROMPTS[pick]), 7), ["b"], sampling) for pick, sampling in zip(picks, how, strict=True)]
    batch = made.batch()
    with made.running():
        for moment in range(16):
            gone = [row for row, leave in zip(rows, leaves, strict=True) if leave == moment]
            batch.tick([row for row, join in zip(rows, joins, strict=True) if join == moment and row not in gone], gone)
    for row, pick, sampling, leave in zip(rows, picks, how, leaves, strict=True):
        alone = made.write([PROMPTS[pick]], until=["b"], max_new_tokens=7, sampling=sampling)[0]
        if leave is None:
            assert row.text() == alone
            assert row.finish in ("stop", "length")
        else:
            assert alone.startswith(row.text())


def test_one_seed_one_text() -> None:
    alone = [writer().write([prompt], until=[], max_new_tokens=12, sampling=WARM)[0] for prompt in PROMPTS]
    assert writer().write(PROMPTS, until=[], max_new_tokens=12, sampling=WARM) == alone
    assert writer().write(PROMPTS[::-1], until=[], max_new_tokens=12, sampling=WARM) == alone[::-1]
    other = writer().write(PROMPTS, until=[], max_new_tokens=12, sampling=Sampling(temperature=1.0, top_p=0.9, seed=8))
    assert other != alone
    cold = Sampling(temperature=0.0, seed=8)
    assert writer().write(PROMPTS, until=[], max_new_tokens=12, sampling=cold) == writer().model.generate(
        PROMPTS, until=[], max_new_tokens=12
    )


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    many = [Draw(Sampling(temperature=1.0, seed=seed), 0) for seed in range(4000)]
    found = Counter(draw.choose(logits) for draw in many)
    assert [found[token] / 4000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    hot = Counter(Draw(Sampling(temperature=2.0, seed=seed), 0).choose(logits) for seed in range(4000))
    roots = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert [hot[token] / 4000 for token in range(4)] == pytest.approx((roots / roots.sum()).tolist(), abs=0.03)
    for temperature in (1e-6, 1e-320):  # even where a logit divided by it is infinite
        cold = Draw(Sampling(temperature=temperature, seed=0), 0)
        assert {cold.choose(torch.tensor([-3.0, 9.0, 40.0, -float("inf")])) for _ in range(20)} == {2}


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_a_nucleus_holds_the_fewest_that_suffice(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([8.0, 4.0, 2.0, 2.0]).log()[[2, 0, 3, 1]]  # not in order; 0.5, 0.25, 0.125, 0.125
    places = {0: 1, 1: 3, 2: 0, 3: 2}
    found = {Draw(Sampling(temperature=1.0, top_p=top_p, seed=seed), 0).choose(logits) for seed in range(400)}
    assert found == {places[rank] for rank in kept}


def test_impossible_tokens_are_never_drawn_and_numbers_that_are_none_are_seen() -> None:
    logits = torch.tensor([[-float("inf"), 1.0, -float("inf")], [float("nan"), 1.0, 2.0], [1.0, 3.0, 3.0]])
    draws = [Draw(Sampling(temperature=5.0, seed=1), 0), Draw(Sampling(temperature=1.0), 0), None]
    ids, sound = choose(logits, draws)
    assert (ids[0], ids[2]) == (1, 1)
    assert sound == [True, False, True]


@pytest.mark.parametrize("values", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(values))} is .*; allowed is"):
        Sampling(**values)  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_end_a_row() -> None:
    model = random_model("llama", seed=3)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    broken = Writer(LiveTextModel(model, pieces()))
    for beams in (1, 2):
        (found,) = broken.write(["abc"], until=[], max_new_tokens=3, beams=beams)
        assert isinstance(found, Unanswered)


@pytest.mark.parametrize("tokenizer", [pieces, bytes_, letters])
@pytest.mark.parametrize("until", [[], ["b"], ["12", "ab3"], ["q\nq"]])
def test_what_is_given_piece_by_piece_is_the_text(tokenizer: object, until: list[str]) -> None:
    assert callable(tokenizer)
    changes = {"vocab_size": 260} if tokenizer is bytes_ else {}
    made = Writer(LiveTextModel(random_model("llama", seed=4, **changes), tokenizer()))
    for seed in range(12):
        row = made.row(Asked(made.ids("abc"), 20), until, Sampling(temperature=1.0, seed=seed))
        batch, given = made.batch(), []
        with made.running():
            batch.tick([row])
            given.append(row.fresh())
            while batch.rows:
                batch.tick()
                given.append(row.fresh())
        assert "".join(given) == row.text()
        assert not any(stop in row.text() for stop in until)


def test_a_stop_string_that_is_half_there_is_held_back() -> None:
    made = Writer(LiveTextModel(bigram_model(dict(itertools.pairwise("abcdefgh")), letters()), letters()))
    row = made.row(Asked(made.ids("a"), 20), ["cdf", "efg"])
    batch, given = made.batch(), []
    with made.running():
        batch.tick([row])
        given.append(row.fresh())
        while batch.rows:
            batch.tick()
            given.append(row.fresh())
    assert given == ["b", "", "", "cd", "", ""]
    assert (row.text(), row.finish) == ("bcd", "stop")


# -- beams ------------------------------------------------------------------------------------------------------------------------


def _brute_force(made: Writer, prompt: str, steps: int) -> tuple[list[int], float]:
    """The best continuation of all, one step at a time, by the mean log probability."""
    best: tuple[list[int], float] = ([], -float("inf"))
    going: list[tuple[list[int], float]] = [([], 0.0)]
    for step in range(1, steps + 1):
        ids = torch.tensor([made.ids(prompt) + written for written, _ in going])
        values = made.model.model(input_ids=ids).logits[:, -1].double().log_softmax(dim=-1)
        after = []
        for (written, total), row in zip(going, values, strict=True):
            for token, value in enumerate(row.tolist()):
                if token in made.model.ends([]):
                    best = max(best, (written, (total + value) / step), key=lambda found: found[1])
                else:
                    after.append(([*written, token], total + value))
        going = after
    return max(best, *((written, total / steps) for written, total in going), key=lambda found: found[1])


@pytest.mark.parametrize("prompt", PROMPTS[:4])
def test_beams_that_hold_everything_find_the_best(prompt: str) -> None:
    made = Writer(LiveTextModel(random_model("llama", seed=3, vocab_size=12, hidden_size=8, eos_token_id=[2, 5]), marked()))
    row = made.row(Asked(made.ids("ab"[: len(prompt)]), 3), [])
    with made.running():
        found = beam_search(made.reader, row.ids, width=200, steps=3, ends=row.ends, stops=row.stops)
        expected, score = _brute_force(made, "ab"[: len(prompt)], 3)
    assert found[0].ids == expected
    assert found[0].score == pytest.approx(score, abs=1e-6)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_one_beam_is_greedy_and_more_are_no_worse() -> None:
    made = writer()
    with made.running():
        for prompt in PROMPTS:
            row = made.row(Asked(made.ids(prompt), 8), [])
            totals = []
            for width in (1, 4):
                found = beam_search(made.reader, row.ids, width=width, steps=8, ends=row.ends, stops=row.stops, length_penalty=0.0)
                totals.append(found[0].total)
                if width == 1:
                    text = made.model.tokenizer.decode(found[0].ids, skip_special_tokens=True)
                    assert text == made.model.generate([prompt], until=[], max_new_tokens=8)[0]
            assert totals[1] >= totals[0] - 1e-9


def test_beams_do_not_depend_on_the_other_prompts() -> None:
    together = writer().write(PROMPTS, until=["b"], max_new_tokens=8, beams=3)
    assert together == [writer().write([prompt], until=["b"], max_new_tokens=8, beams=3)[0] for prompt in PROMPTS]
    assert together != writer().write(PROMPTS, until=["b"], max_new_tokens=8)


def test_beams_need_a_cache_that_can_be_reordered() -> None:
    with pytest.raises(UserError, match="Use one beam"):
        writer("mamba").write(["ab"], until=[], max_new_tokens=3, beams=2)
