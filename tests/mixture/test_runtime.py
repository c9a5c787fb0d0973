"""A mixture answers as the chosen expert by itself would, whatever the question is batched with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modelglue.errors import CheckpointError, UserError
from modelglue.mixture import ExpertSpec, Mixture, Route, RouterSpec, write_mixture
from modelglue.models import load_live
from tests.mixture.making import alone, mixture, two_experts
from tests.models.tiny import bigram_model, letters

TEXTS = ["abc", "12", "what word is it?", "3 4 5 6", "letters: a", "99 abc", "x", "0", "word 12 word"]
PAIRS = [(text, continuation) for text in TEXTS for continuation in ("yes", " 12", "b\nc")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random experts and their mixture, which no test may change."""
    made = tmp_path_factory.mktemp("mixture")
    mixture(made)
    return made


def _assert_close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_every_text_is_the_chosen_experts_own(folder: Path) -> None:
    """Experts of another class, size, vocabulary and tokenizer; the unit is text."""
    mixed = Mixture.load(folder / "mixture")
    models = {name: alone(folder, name) for name in mixed.experts}
    routed = mixed.generate_routed(TEXTS, until=["\n"], max_new_tokens=8)
    assert {answer.route.name for answer in routed} == {"llama", "neox"}
    for text, answer in zip(TEXTS, routed, strict=True):
        assert answer.text == models[answer.route.name].generate([text], until=["\n"], max_new_tokens=8)[0]
        other = next(model for name, model in models.items() if name != answer.route.name)
        assert answer.text != other.generate([text], until=["\n"], max_new_tokens=8)[0]
    assert mixed.generate(TEXTS, until=["\n"], max_new_tokens=8) == [answer.text for answer in routed]
    assert [answer.route for answer in routed] == mixed.route(TEXTS)


def test_all_choices_of_one_question_use_one_expert(folder: Path) -> None:
    mixed = Mixture.load(folder / "mixture")
    models = {name: alone(folder, name) for name in mixed.experts}
    chosen = {text: route.name for text, route in zip(TEXTS, mixed.route(TEXTS), strict=True)}
    assert len({route.name for route in mixed.route([continuation for _, continuation in PAIRS])}) == 2  # they would part if asked
    expected = [models[chosen[context]].loglikelihood([(context, continuation)])[0] for context, continuation in PAIRS]
    _assert_close(mixed.loglikelihood(PAIRS), expected)


def test_routes_by_eye(tmp_path: Path) -> None:
    """An encoder whose states are unit vectors: logits are shares of letters."""
    mixed = _letters_mixture(tmp_path, temperature=0.5)
    assert mixed.route(["aab", "b", "", "ab"]) == [
        Route(0, "a", 1.0, pytest.approx((1.0, 0.5))),
        Route(1, "b", 1.0, pytest.approx((0.0, 1.0))),
        Route(0, "a", 1.0, ()),
        Route(0, "a", 1.0, pytest.approx((2 / 3, 2 / 3))),  # a tie goes to the lower number
    ]
    assert mixed.route([]) == []


def test_logits_that_are_no_numbers_choose_nobody(tmp_path: Path) -> None:
    mixed = _letters_mixture(tmp_path, temperature=1e-320)  # logits over it are infinite
    with pytest.raises(CheckpointError, match=r"the router's logits are not finite \(its temperature is 9.99989e-321\)"):
        mixed.route(["", "a"])
    assert mixed.route([""])[0].name == "a"


def _letters_mixture(folder: Path, **options: Any) -> Mixture:
    """Experts that know one thing each: `a` writes x after a letter, `b` y; the router looks for the letters a and b."""
    for name, answer in (("a", "x"), ("b", "y")):
        model = bigram_model(dict.fromkeys("abcdefgh ", answer), letters())
        model.save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    experts = [ExpertSpec(name, folder / name, (name,)) for name in ("a", "b")]
    return mixture(folder, experts, **options)


@pytest.mark.parametrize(
    ("span", "expected"),
    [("prompt", ["x", "y"]), ("first:1", ["x", "x"]), ("first:3", ["x", "y"]), ("full", ["x", "y"])],
)
def test_what_is_routed_on(span: str, expected: list[str], tmp_path: Path) -> None:
    mixed = _letters_mixture(tmp_path, route_span=span)
    assert mixed.generate(["aab", "abb"], until=[], max_new_tokens=1) == expected


def test_a_continuation_is_routed_on_only_where_it_must_be(tmp_path: Path) -> None:
    pairs = [("a", "xbbb"), ("", "bb"), ("", "aa"), ("", "")]
    models = {name: _letters_mixture(tmp_path) and alone(tmp_path, name) for name in ("a", "b")}
    plain = _letters_mixture(tmp_path).loglikelihood(pairs)
    _assert_close(plain, [models[name].loglikelihood([pair])[0] for name, pair in zip(["a", "b", "a", "a"], pairs, strict=True)])
    full = _letters_mixture(tmp_path, route_span="full").loglikelihood(pairs)
    _assert_close(full, [models[name].loglikelihood([pair])[0] for name, pair in zip(["b", "b", "a", "a"], pairs, strict=True)])
    assert plain[0] != full[0]


def test_copies_of_one_model_are_that_model(tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    copies = [ExpertSpec(f"copy{number}", experts[0].path, (prompt,)) for number, prompt in enumerate(("ab", "12", "q"))]
    mixed, single = mixture(tmp_path, copies), alone(tmp_path, "llama")
    assert len({route.name for route in mixed.route([*TEXTS, "qqq"])}) == 3
    assert mixed.generate(TEXTS, until=["\n"], max_new_tokens=8) == single.generate(TEXTS, until=["\n"], max_new_tokens=8)
    _assert_close(mixed.loglikelihood(PAIRS), single.loglikelihood(PAIRS))


def test_experts_in_another_order_with_their_gate_rows_change_nothing(folder: Path, tmp_path: Path) -> None:
    mixed = Mixture.load(folder / "mixture")
    for name in ("llama", "neox"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "mixture").mkdir()
    value = json.loads((folder / "mixture" / "mixture.json").read_text())
    (tmp_path / "mixture" / "mixture.json").write_text(json.dumps({**value, "experts": value["experts"][::-1]}))
    gate = load_file(folder / "mixture" / "router.safetensors")["gate"]
    save_file({"gate": gate.flip(0).contiguous()}, tmp_path / "mixture" / "router.safetensors")
    other = Mixture.load(tmp_path / "mixture")
    assert other.experts == mixed.experts[::-1]
    assert [(route.name, route.logits[::-1]) for route in other.route(TEXTS)] == [
        (route.name, route.logits) for route in mixed.route(TEXTS)
    ]
    assert other.generate(TEXTS, until=["\n"], max_new_tokens=8) == mixed.generate(TEXTS, until=["\n"], max_new_tokens=8)
    _assert_close(other.loglikelihood(PAIRS), mixed.loglikelihood(PAIRS))


@settings(max_examples=12, deadline=None)
@given(picks=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=20))
def test_what_a_text_is_batched_with_changes_no_answer(folder: Path, picks: list[int]) -> None:
    mixed = _OPEN.setdefault(folder, Mixture.load(folder / "mixture"))
    texts = [TEXTS[pick] for pick in picks]
    assert mixed.route(texts) == [mixed.route([text])[0] for text in texts]
    assert mixed.generate(texts, until=["\n"], max_new_tokens=5) == [
        mixed.generate([text], until=["\n"], max_new_tokens=5)[0] for text in texts
    ]
    pairs = [PAIRS[pick] for pick in picks]
    _assert_close(mixed.loglikelihood(pairs), [mixed.loglikelihood([pair])[0] for pair in pairs])


_OPEN: dict[Path, Mixture] = {}


def test_nothing_asked_nothing_answered(folder: Path) -> None:
    mixed = Mixture.load(folder / "mixture")
    assert mixed.loglikelihood([]) == []
    assert mixed.generate([], until=[], max_new_tokens=3) == []
    assert mixed._residents.names() == []


@pytest.mark.parametrize(
    ("residency", "expected"),
    [
        # The encoder is a: no more of it is read than the router needs, so it does not count.
        ("lazy", ["b", "a"]),
        ("all", ["a", "b"]),
        ("lru:2", ["b", "a"]),
        ("lru:1", ["b", "a", "b"]),
    ],
)
def test_how_often_experts_are_loaded(residency: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _letters_mixture(tmp_path)
    loaded: list[str] = []

    def noting(checkpoint: Any) -> Any:
        loaded.append(checkpoint.path.name)
        return load_live(checkpoint)

    monkeypatch.setattr("modelglue.mixture.runtime.load_live", noting)
    mixed = Mixture.load(tmp_path / "mixture", residency)
    assert loaded == (["a", "b"] if residency == "all" else [])
    for text in ("b", "a", "bb"):
        mixed.generate([text], until=[], max_new_tokens=1)
    assert loaded == expected
    assert len(mixed._residents.names()) == mixed.resident_limit == (1 if residency == "lru:1" else 2)


def test_the_expert_that_was_used_longest_ago_goes(tmp_path: Path) -> None:
    _letters_mixture(tmp_path)
    experts = [ExpertSpec(name, tmp_path / path, (name,)) for name, path in (("a", "a"), ("b", "b"), ("c", "c"))]
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    mixed = mixture(tmp_path, experts, residency="lru:2")
    for text in ("a", "b", "a", "c"):
        mixed.generate([text], until=[], max_new_tokens=1)
    assert mixed._residents.names() == ["../a", "../c"]


@pytest.mark.parametrize("residency", ["lru:0", "lru:", "lru:-1", "lru:x", "some", "", "lru"])
def test_no_such_residency(residency: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"allowed is all, lazy or lru:N with N from 1"):
        Mixture.load(folder / "mixture", residency)


def test_cut_prompts_are_counted_whichever_expert_cut_them(tmp_path: Path) -> None:
    mixed = _letters_mixture(tmp_path, residency="lru:1")
    mixed.generate(["a" * 90, "b" * 90, "a", "b"], until=[], max_new_tokens=2)
    assert mixed.truncated == 2
    mixed.loglikelihood([("b" * 90, "x")])
    assert mixed.truncated == 3


def test_identity_changes_with_every_answer_that_could(folder: Path, tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    base = mixture(tmp_path).identity
    assert mixture(tmp_path).identity == base
    assert mixture(tmp_path, temperature=3.0).identity == base  # scales every logit alike
    others = [
        mixture(tmp_path, gate_mode="hidden_avg").identity,
        mixture(tmp_path, router_layer=1).identity,
        mixture(tmp_path, route_span="first:2").identity,
        mixture(tmp_path, experts[::-1]).identity,
    ]
    write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=experts[1].path, overwrite=True)
    others.append(Mixture.load(tmp_path / "mixture").identity)
    tensors = load_file(tmp_path / "neox" / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "neox" / "model.safetensors")
    others.append(mixture(tmp_path).identity)
    assert len({base, *others}) == 7
    write_mixture(tmp_path / "packed", experts, RouterSpec(), encoder=experts[0].path, pack=True)
    assert Mixture.load(tmp_path / "packed").identity == others[-1]  # where the files stand does not matter


def test_trained_experts(tiny_zoo: Path, tmp_path: Path) -> None:
    """The committed zoo: a Llama and a GPT-NeoX with another vocabulary, on questions of both."""
    models = tiny_zoo / "models"
    experts = [
        ExpertSpec("sort", models / "sort", ("sort: dcba =", "sort: qwer ="), ("double: abc =",)),
        ExpertSpec("stranger", models / "stranger", ("double: abc =", "double: xyz ="), ("sort: dcba =",)),
    ]
    write_mixture(tmp_path / "mixture", experts, RouterSpec(gate_mode="auto", router_layer="auto"), encoder=models / "sort")
    mixed = Mixture.load(tmp_path / "mixture")
    assert mixed.self_test().accuracy == 1.0
    questions = ["sort: hgfe =", "double: abc =", "sort: mnba =", "double: pqr ="]
    for question, answer in zip(questions, mixed.generate_routed(questions, until=["\n"], max_new_tokens=10), strict=True):
        assert answer.text == alone(models, answer.route.name).generate([question], until=["\n"], max_new_tokens=10)[0]
        assert answer.text.strip().isalpha()


def test_experts_stay_float32_and_unchanged(folder: Path) -> None:
    mixed = Mixture.load(folder / "mixture", "all")
    before = {name: value.clone() for name, value in mixed._models([1])[0].model.state_dict().items()}
    mixed.generate(TEXTS, until=[], max_new_tokens=3)
    after = mixed._models([1])[0].model.state_dict()
    assert all(torch.equal(after[name], value) and value.dtype == torch.float32 for name, value in before.items())
