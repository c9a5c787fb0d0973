"""Numbers that say whether a router is any good, on routers whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modelglue.errors import UserError
from modelglue.mixture import load_report, oracle_gap
from modelglue.mixture.diagnostics import self_test
from modelglue.mixture.router import build_gate, own_share, winner, worst_margin
from modelglue.mixture.spec import RouterSpec
from tests.mixture.making import mixture, of, unit_reader

_SETTINGS = SimpleNamespace(gate_mode="hidden", router_layer=0, route_span="prompt", encoder="there")


def test_self_test_by_eye() -> None:
    experts = [of("a", name="one"), of("bb", "ab", name="two")]
    gate, _ = build_gate(unit_reader(), experts, RouterSpec())
    found = self_test(unit_reader(), experts, gate, _SETTINGS)
    # Both rows are unit vectors (a; b). <s>a: 1/2 to 0; <s>bb: 0 to 2/3; <s>ab: a tie, which the first expert wins.
    assert found.confusion == ((1, 0), (1, 1))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.margin == pytest.approx(0.0, abs=1e-7)
    assert found.condition_number == pytest.approx(1.0)
    assert found.warnings == ("1 of 2 prompts of 'two' reach another expert.",)
    assert found.to_json() == {
        "gate_mode": "hidden",
        "router_layer": 0,
        "encoder": "there",
        "self_test": {"experts": ["one", "two"], "confusion": [[1, 0], [1, 1]], "accuracy": pytest.approx(2 / 3)},
        "condition_number": {"gate": pytest.approx(1.0)},
        "margin": pytest.approx(0.0, abs=1e-7),
        "warnings": ["1 of 2 prompts of 'two' reach another expert."],
    }


def test_prompts_that_are_too_alike_are_said_to_be() -> None:
    experts = [of("abcdefgh", name="one"), of("abcdefgi", name="two")]
    gate, _ = build_gate(unit_reader(), experts, RouterSpec(gate_mode="hidden_avg"))
    found = self_test(unit_reader(), experts, gate, _SETTINGS)
    # Cosine 8/9 between two unit rows: the singular values are sqrt(1 + 8/9) and sqrt(1 - 8/9), their ratio sqrt 17.
    assert found.condition_number == pytest.approx(17**0.5, rel=1e-5)
    assert found.warnings == ()
    longer = [of("abcdefghijklmnopqrstuvwxy", name="one"), of("abcdefghijklmnopqrstuvwxz", name="two")]
    gate, _ = build_gate(unit_reader(), longer, RouterSpec(gate_mode="hidden_avg"))
    found = self_test(unit_reader(), longer, gate, _SETTINGS)
    assert found.condition_number == pytest.approx(51**0.5, rel=1e-5)
    assert found.warnings == ("the gate's condition number is 7.1 (over 5): the prompts are too alike.",)


def test_rows_that_point_apart_are_no_trouble() -> None:
    experts = [of("a", against=("b",)), of("b", against=("a",))]
    gate, _ = build_gate(unit_reader(), experts, RouterSpec())
    found = self_test(unit_reader(), experts, gate, _SETTINGS)
    assert found.condition_number == 1e9  # infinite, in words that JSON has
    assert found.warnings == ()
    assert found.confusion == ((1, 0), (0, 1))


def test_a_router_without_prompts_cannot_be_tested(tmp_path: Path) -> None:
    experts = [of(name="one"), of(name="two")]
    gate, _ = build_gate(unit_reader(), experts, RouterSpec(gate_mode="random"))
    with pytest.raises(UserError, match="the router's self-test needs prompts"):
        self_test(unit_reader(), experts, gate, _SETTINGS)


def test_a_mixture_tests_itself(tmp_path: Path) -> None:
    found = mixture(tmp_path, gate_mode="hidden_avg").self_test()
    assert found.experts == ("llama", "neox")
    assert [sum(row) for row in found.confusion] == [3, 2]
    assert (found.gate_mode, found.router_layer, found.encoder) == ("hidden_avg", 0, "../llama")


def test_margins_and_shares() -> None:
    logits = [torch.tensor([[3.0, 1.0, 2.0], [5.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.25, -1.0]]), torch.tensor([[0.0, 0.0, 4.0]])]
    assert worst_margin(logits) == -0.25
    assert own_share(logits) == pytest.approx((1 + 0 + 1) / 3)
    assert winner([1.0, 3.0, 3.0]) == 1


class _FirstLetter:
    """Routes by the first letter of a text."""

    experts: Sequence[str] = ("a", "b", "c")

    def route(self, texts: Sequence[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=text[0]) for text in texts]


def test_load_report() -> None:
    found = load_report(_FirstLetter(), {"first": ["a1", "b1", "a2"], "second": ["c"], "none": []})
    assert found.load == {"first": {"a": 2, "b": 1, "c": 0}, "second": {"a": 0, "b": 0, "c": 1}, "none": {"a": 0, "b": 0, "c": 0}}
    assert found.warnings == ()
    assert load_report(_FirstLetter(), {"one": ["a"] * 19 + ["b"]}).warnings == ("'a' gets 95% of all samples.",)
    assert load_report(_FirstLetter(), {"one": ["a"] * 9 + ["b"]}).warnings == ()
    assert load_report(_FirstLetter(), {}).warnings == ()


def test_oracle_gap() -> None:
    experts = {"one": {"x": 0.9, "y": 0.2}, "two": {"x": 0.5, "y": 0.6}}
    assert oracle_gap(experts, {"x": 0.9, "y": 0.6}) == 0.0
    assert oracle_gap(experts, {"x": 0.5, "y": 0.6}) == pytest.approx(0.2)
    assert oracle_gap(experts, {"x": 0.95, "y": 0.6}) == pytest.approx(-0.025)  # two experts may share a task
    assert oracle_gap(experts, {"y": 0.2}) == pytest.approx(0.4)
