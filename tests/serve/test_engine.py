"""The engine by itself: turns, limits, failures and farewells, without any HTTP."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.errors import CheckpointError, UserError
from modelglue.mixture import ExpertSpec, Mixture, RouterSpec, write_mixture
from modelglue.models import LiveTextModel
from modelglue.models.sampling import Sampling
from modelglue.models.writer import Writer
from modelglue.serve import BusyError, Engine, Job, Limits, MixtureHost, ModelHost
from modelglue.serve.hosts import Placed
from modelglue.serve.jobs import Ended, Event, Failed, Piece, Started
from tests.models.tiny import bigram_model, letters, pieces, random_model, saved_model

NEXT = dict(zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True))


class Mail:
    """What an engine tells of some jobs, in the order of its telling."""

    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[str, Event]] = queue.Queue()

    def job(self, prompt: str, *, name: str | None = None, tokens: int = 4, **how: Any) -> Job:
        called = name or prompt
        how.setdefault("sampling", Sampling())
        return Job(lambda event: self.queue.put((called, event)), prompt, max_tokens=tokens, **how)

    def until_over(self, jobs: int) -> list[tuple[str, Event]]:
        """All that comes until so many jobs (of one choice) are over."""
        found: list[tuple[str, Event]] = []
        while jobs:
            found.append(self.queue.get(timeout=60))
            jobs -= isinstance(found[-1][1], Ended | Failed)
        return found


def alphabet() -> LiveTextModel:
    return LiveTextModel(bigram_model(NEXT, letters()), letters())


def last(found: Sequence[tuple[str, Event]]) -> dict[str, Event]:
    return {name: event for name, event in found if isinstance(event, Ended | Failed)}


def test_pieces_are_told_as_they_are_written() -> None:
    mail = Mail()
    with Engine(ModelHost(alphabet())) as engine:
        engine.submit([mail.job("a", stream=True), mail.job("x", name="end")])
        found = mail.until_over(2)
    assert [event for name, event in found if name == "a"] == [
        Started(None, None, 2), Piece(0, "b"), Piece(0, "c"), Piece(0, "d"), Piece(0, "e"), Ended(0, "bcde", "length", 4),
    ]  # fmt: skip
    assert [event for name, event in found if name == "end"] == [Started(None, None, 2), Ended(0, "yz", "stop", 2)]


def test_more_than_may_wait_is_sent_away_and_nothing_of_it_begun() -> None:
    mail = Mail()
    engine = Engine(ModelHost(alphabet()), Limits(queue=2))
    engine.submit([mail.job("a"), mail.job("b")])  # nobody has begun yet
    with pytest.raises(BusyError, match="2 prompts wait already, at most 2 may"):
        engine.submit([mail.job("c")])
    with engine:
        assert set(last(mail.until_over(2))) == {"a", "b"}
        engine.submit([mail.job("c"), mail.job("d")])  # there is room again
        assert set(last(mail.until_over(2))) == {"c", "d"}
        with pytest.raises(BusyError):
            engine.submit([mail.job("x")] * 3)
        assert mail.queue.empty()
    with pytest.raises(BusyError, match="the server is closing"):
        engine.submit([mail.job("e")])


def test_more_choices_than_rows_would_wait_for_ever() -> None:
    with Engine(ModelHost(alphabet()), Limits(rows=2, choices=2)) as engine, pytest.raises(UserError, match="asks for 3 choices"):
        engine.submit([Mail().job("a", choices=3)])


def test_prompts_of_clients_are_not_remembered() -> None:
    model, mail = alphabet(), Mail()
    with Engine(ModelHost(model)) as engine:
        engine.submit([mail.job("abc")])
        mail.until_over(1)
    assert model.encoder._known == {}


def test_rows_beyond_the_limit_wait_for_their_turn() -> None:
    mail = Mail()
    with Engine(ModelHost(alphabet()), Limits(rows=2, choices=2)) as engine:
        engine.submit([mail.job(letter, tokens=3) for letter in "abcde"])
        found = mail.until_over(5)
    began = [name for name, event in found if isinstance(event, Started)]
    assert began == list("abcde")
    third = [name for name, _ in found].index("c")
    assert {name for name, event in found[:third] if isinstance(event, Ended)} == {"a", "b"}
    assert {name: event.text for name, event in last(found).items() if isinstance(event, Ended)} == {
        "a": "bcd", "b": "cde", "c": "def", "d": "efg", "e": "fgh",
    }  # fmt: skip


def test_time_that_is_up() -> None:
    mail = Mail()
    with Engine(ModelHost(alphabet()), Limits(timeout=1e-9)) as engine:
        engine.submit([mail.job("a")])
        assert mail.until_over(1) == [("a", Failed("timeout", "the answer was not complete after 1e-09 seconds."))]
        engine.submit([mail.job("b")])  # the queue has been told of its end
        assert isinstance(last(mail.until_over(1))["b"], Failed)


def test_who_is_cancelled_hears_nothing_more_and_the_others_go_on() -> None:
    mail = Mail()
    gone, stays = mail.job("a", tokens=24, stream=True), mail.job("b", tokens=20)
    engine = Engine(ModelHost(alphabet()))
    cancelled: list[Event] = []

    def deliver(event: Event) -> None:
        cancelled.append(event)
        if len(cancelled) == 3:  # in the engine's own thread: between two tokens
            engine.cancel([gone])

    gone.deliver = deliver
    never = mail.job("never")
    engine.submit([gone, stays, never])
    engine.cancel([never])
    with engine:
        found = mail.until_over(1)
    assert [type(event) for event in cancelled] == [Started, Piece, Piece]
    assert found == [("b", Started(None, None, 2)), ("b", Ended(0, "cdefghijklmnopqrstuv", "length", 20))]


def test_farewell_to_what_runs() -> None:
    mail = Mail()
    engine = Engine(ModelHost(LiveTextModel(random_model("llama", seed=3, eos_token_id=None), pieces())))
    begun = mail.job("abc", tokens=50, stream=True)
    with engine:
        engine.submit([begun])
        assert isinstance(mail.queue.get(timeout=60)[1], Started)
    events = []
    while not mail.queue.empty():
        events.append(mail.queue.get()[1])
    assert isinstance(events[-1], Ended) or events[-1] == Failed("closed", "the server is closing.")


def test_logits_that_are_no_numbers_are_that_prompts_own_trouble() -> None:
    model = bigram_model(NEXT, letters())
    with torch.no_grad():
        model.model.embed_tokens.weight[letters().convert_tokens_to_ids("q")] = float("nan")
    mail = Mail()
    with Engine(ModelHost(LiveTextModel(model, letters()))) as engine:
        engine.submit([mail.job("a"), mail.job("q")])
        found = last(mail.until_over(2))
    assert found["a"] == Ended(0, "bcde", "length", 4)
    assert found["q"] == Failed("model", "the model's logits are no numbers, so it cannot answer this prompt.")


class _Broken(ModelHost):
    """Lane 1 cannot be loaded; lane 2 fails while it reads; routing fails for one prompt."""

    capacity = 3

    def place(self, texts: Sequence[str]) -> list[Placed]:
        if "!" in texts:
            raise CheckpointError("the encoder is gone.")
        return [Placed(({"x": 1, "y": 2}.get(text, 0),)) for text in texts]

    def writer(self, key: tuple[int, ...]) -> Writer:
        if key == (1,):
            raise CheckpointError("the expert has changed.")
        return super().writer(key)

    def row(self, writer: Writer, placed: Placed, asked: Any, **how: Any) -> Any:
        if placed.key == (2,):
            raise RuntimeError("a bug")
        return super().row(writer, placed, asked, **how)


def test_a_prompt_that_cannot_be_begun_takes_nobody_of_its_lane_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    mail = Mail()
    with Engine(ModelHost(alphabet())) as engine:
        engine.submit([mail.job("a"), mail.job("\ud800"), mail.job("b")])  # half a character: tokenizers crash on it
        found = last(mail.until_over(3))
    assert (found["a"], found["b"]) == (Ended(0, "bcde", "length", 4), Ended(0, "cdef", "length", 4))
    failed = found["\ud800"]
    assert isinstance(failed, Failed)
    assert failed.message.startswith("the model failed: TypeError")
    assert "TypeError" in capsys.readouterr().err


def test_a_lane_that_fails_takes_nobody_else_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    mail = Mail()
    with Engine(_Broken(alphabet())) as engine:
        engine.submit([mail.job("x"), mail.job("a"), mail.job("y")])
        found = last(mail.until_over(3))
        assert found["a"] == Ended(0, "bcde", "length", 4)
        assert found["x"] == Failed("model", "the expert has changed.")
        assert found["y"] == Failed("model", "the model failed: RuntimeError: a bug")
        engine.submit([mail.job("b"), mail.job("!")])
        assert last(mail.until_over(2)) == {"b": Ended(0, "cdef", "length", 4), "!": Failed("model", "the encoder is gone.")}
        engine.submit([mail.job("b")])
        assert last(mail.until_over(1))["b"] == Ended(0, "cdef", "length", 4)
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_experts_take_turns_by_the_oldest_prompt(tmp_path: Path) -> None:
    """With room for one expert, prompts that come later for the one in memory do not keep an older prompt for another waiting."""
    for name, letter in (("a", "x"), ("b", "y")):
        bigram_model(dict.fromkeys("abxy", letter), letters()).save_pretrained(tmp_path / name)
        letters().save_pretrained(tmp_path / name)
    write_mixture(tmp_path / "m", [ExpertSpec(n, tmp_path / n, (n,)) for n in "ab"], RouterSpec(), encoder=tmp_path / "a")
    loaded: list[str] = []
    mixed = Mixture.load(tmp_path / "m", "lru:1")
    load = mixed._residents._load
    mixed._residents._load = lambda reference: (loaded.append(reference), load(reference))[1]
    mail = Mail()
    engine = Engine(MixtureHost(mixed), Limits(rows=1, choices=1))
    engine.submit([mail.job(text) for text in ("a", "aa", "b", "aaa", "bb")])
    with engine:
        found = mail.until_over(5)
    assert [name for name, event in found if isinstance(event, Started)] == ["a", "aa", "b", "aaa", "bb"]
    assert loaded == ["../a", "../b", "../a", "../b"]
    assert {name: event.text for name, event in last(found).items() if isinstance(event, Ended)} == {
        "a": "xxxx", "aa": "xxxx", "b": "yyyy", "aaa": "xxxx", "bb": "yyyy",
    }  # fmt: skip


def test_trained_experts_of_two_tokenizers(tiny_zoo: Path, tmp_path: Path) -> None:
    """The committed zoo: a Llama that sorts, and a GPT-NeoX with another vocabulary that doubles; both solve what only they can."""
    experts = [
        ExpertSpec("sort", tiny_zoo / "models" / "sort", ("sort: dcba =", "sort: qwer ="), ("double: abc =",)),
        ExpertSpec("stranger", tiny_zoo / "models" / "stranger", ("double: abc =", "double: xyz ="), ("sort: dcba =",)),
    ]
    write_mixture(tmp_path / "m", experts, RouterSpec(gate_mode="auto", router_layer="auto"), encoder=tiny_zoo / "models" / "sort")
    mail, questions = Mail(), ["sort: hgfe =", "double: abc =", "sort: mnba =", "double: pqr ="]
    with Engine(MixtureHost(Mixture.load(tmp_path / "m", "lru:1", dtype="stored"))) as engine:
        engine.submit([mail.job(question, tokens=12, until=["\n"]) for question in questions])
        found = mail.until_over(4)
    who = {name: event.expert for name, event in found if isinstance(event, Started)}
    assert who == {question: "sort" if question.startswith("sort") else "stranger" for question in questions}
    texts = [event.text for event in map(last(found).get, questions) if isinstance(event, Ended)]
    assert texts == Mixture.load(tmp_path / "m").generate(questions, until=["\n"], max_new_tokens=12)
    assert texts[0].split() == ["efgh"]
    assert texts[1].split() == ["aabbcc"]


def test_mixed_probabilities_are_served_too(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        saved_model(tmp_path / name, "llama", seed=20 + seed, tokenizer=letters())
    experts = [ExpertSpec("one", tmp_path / "one", ("abc",)), ExpertSpec("two", tmp_path / "two", ("12",))]
    write_mixture(tmp_path / "m", experts, RouterSpec(top_k=2), encoder=tmp_path / "one")
    mail, texts = Mail(), ["abc", "12", "a1"]
    with Engine(MixtureHost(Mixture.load(tmp_path / "m"))) as engine:
        engine.submit([mail.job(text, tokens=6, sampling=Sampling(0.7, 1.0, 4)) for text in texts])
        found = last(mail.until_over(3))
    mixed = Mixture.load(tmp_path / "m")
    for text in texts:
        event = found[text]
        assert isinstance(event, Ended)
        assert event.text == mixed.generate_routed([text], until=[], max_new_tokens=6, sampling=Sampling(0.7, 1.0, 4))[0].text


@pytest.mark.parametrize("values", [{"queue": 0}, {"timeout": 0}, {"tokens": -1}, {"choices": 40}])
def test_limits_that_would_let_nothing_through(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"allowed is a number from 1|only 32 rows"):
        Limits(**values)
