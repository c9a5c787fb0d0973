"""The gate from prompts: its definition on states that can be read by eye, and what it must keep to."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.mixture import (
    DOMAIN_PROMPTS,
    Encoded,
    ExpertSpec,
    Reader,
    RouterSpec,
    build_gate,
    domain_prompts,
    entering,
    gate_row,
    read_prompts,
)
from modelglue.mixture.gates import LinearGate
from modelglue.mixture.router import best_layer, knowledge
from tests.mixture.making import of, unit_reader
from tests.models.tiny import LETTERS, bigram_model, letters, pieces, random_model

PROMPTED = ["hidden", "hidden_avg", "cheap_embed"]


def _unit(*texts: str) -> torch.Tensor:
    """The sum of the unit vectors of letters ("<s>" for the beginning), with length 1."""
    vector = torch.zeros(48)
    for text in texts:
        vector[letters().convert_tokens_to_ids(text)] += 1
    return vector / vector.norm()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("hidden", _unit("b", "c")),  # the last letters of "ab" and "c"
        ("hidden_avg", torch.zeros(48)),  # worked out below
        ("cheap_embed", _unit("<s>", "<s>", "a", "b", "c")),
    ],
)
def test_gate_rows_by_eye(mode: str, expected: torch.Tensor) -> None:
    if mode == "hidden_avg":  # mean over prompts of (<s> + a + b) / 3 and (<s> + c) / 2
        for token, value in (("<s>", 1 / 3 + 1 / 2), ("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 2)):
            expected[letters().convert_tokens_to_ids(token)] = value
        expected /= expected.norm()
    gate, made = build_gate(unit_reader(), [of("ab", "c"), of("xyz")], RouterSpec(gate_mode=mode))  # type: ignore[arg-type]
    assert made == mode
    torch.testing.assert_close(gate.weight[0], expected)


def test_the_negative_side_is_subtracted() -> None:
    hidden, _ = build_gate(unit_reader(), [of("a", against=("xb", "b")), of("z")], RouterSpec())
    torch.testing.assert_close(hidden.weight[0], (_unit("a") - _unit("b")) / math.sqrt(2))
    # Each side has length 1 before it is subtracted: (<s> + a) / sqrt 2 less (2 <s> + x + 2 b) / 3.
    cheap, _ = build_gate(unit_reader(), [of("a", against=("xb", "b")), of("z")], RouterSpec(gate_mode="cheap_embed"))
    row = _unit("<s>", "a") - _unit("<s>", "<s>", "x", "b", "b")
    torch.testing.assert_close(cheap.weight[0], row / row.norm())


_PROMPTS = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=4, unique=True).map(tuple)


@settings(max_examples=30, deadline=None)
@given(_PROMPTS, _PROMPTS, st.sampled_from(PROMPTED), st.sampled_from([0, 1]))
def test_rows_have_length_1_and_swapped_prompts_the_other_sign(
    positive: tuple[str, ...], negative: tuple[str, ...], mode: str, layer: int
) -> None:
    experts = [of(*positive, against=negative, name="one"), of(*negative, against=positive, name="other")]
    try:
        gate, _ = build_gate(_READERS[layer], experts, RouterSpec(gate_mode=mode, router_layer=layer))  # type: ignore[arg-type]
    except UserError as error:
        assert "cancel" in str(error) or "same " in str(error)  # noqa: PT017 - legal for such prompts
        return
    torch.testing.assert_close(gate.weight.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(gate.weight[0], -gate.weight[1])


_READERS = [Reader(random_model("llama"), letters(), layer) for layer in (0, 1)]


@pytest.mark.parametrize("mode", PROMPTED)
def test_prompts_reach_their_own_expert(mode: str) -> None:
    experts = [of("cat", "dog"), of("12", "3"), of("qxz")]
    gate, _ = build_gate(unit_reader(), experts, RouterSpec(gate_mode=mode))  # type: ignore[arg-type]
    for own, expert in enumerate(experts):
        logits = unit_reader().logits(expert.positive, gate, "prompt")
        assert logits.argmax(dim=1).tolist() == [own] * len(expert.positive)


def test_logits_by_eye() -> None:
    gate, _ = build_gate(unit_reader(), [of("a"), of("b")], RouterSpec())
    # <s>abb: the mean of four unit vectors.
    torch.testing.assert_close(
        unit_reader().logits(["abb", "a", "zz"], gate, "prompt"), torch.tensor([[0.25, 0.5], [0.5, 0.0], [0.0, 0.0]])
    )
    torch.testing.assert_close(unit_reader().logits(["abb", "bab"], gate, "first:1"), torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    assert unit_reader().logits([], gate, "prompt").shape == (0, 2)


def test_auto_keeps_the_mode_with_the_larger_worst_margin() -> None:
    # "ab" and "cb" end alike, so their last positions say nothing.
    assert build_gate(unit_reader(), [of("ab"), of("cb")], RouterSpec(gate_mode="auto"))[1] == "hidden_avg"
    assert (
        build_gate(unit_reader(), [of("ab", against=("cb",)), of("cb", against=("ab",))], RouterSpec(gate_mode="auto"))[1] == "hidden_avg"
    )
    gate, mode = build_gate(unit_reader(), [of("a"), of("b")], RouterSpec(gate_mode="auto"))
    assert mode == "hidden"  # what all prompts begin with brings averages closer: margins 0.5 and 0.5 / sqrt 2
    torch.testing.assert_close(gate.weight, torch.stack([_unit("a"), _unit("b")]))


def test_knowledge_counts_prompts_before_leads() -> None:
    """A gate that answers everything alike leads by 0; one that errs on one prompt of four is the better one all the same."""
    experts = [of("a", "c", name="one"), of("b", "ca", name="two")]
    some, _ = build_gate(unit_reader(), experts, RouterSpec())
    # Rows (a + c) / sqrt 2 and (b + a) / sqrt 2: <s>a is a tie, which the first expert wins, and <s>ca goes to the wrong one.
    found = knowledge(unit_reader(), experts, some, "prompt")
    assert found == (pytest.approx(0.75), pytest.approx(-1 / 3 / 2**0.5))
    assert knowledge(unit_reader(), experts, LinearGate(torch.ones(2, 48)), "prompt") == (0.5, 0.0)
    assert found > (0.5, 0.0)


def test_auto_layer_finds_where_the_order_of_words_shows() -> None:
    experts = [of("ab", "cd"), of("ba", "dc")]
    model = random_model("llama", num_hidden_layers=3)
    found = best_layer(model, letters(), experts, RouterSpec(gate_mode="hidden_avg", router_layer="auto"))
    assert found > 0  # at layer 0 both are the same bag of letters
    # Where all prompts end alike, the last position says nothing at layer 0, and layer 0 is passed over.
    ending_alike = [of("ab=", against=("cd=",), name="one"), of("cd=", against=("ab=",), name="two")]
    assert best_layer(model, letters(), ending_alike, RouterSpec(router_layer="auto")) > 0
    with pytest.raises(UserError, match="has no token"):
        best_layer(model, letters(), [of("a"), of("", name="e")], RouterSpec(router_layer="auto"))
    assert best_layer(model, letters(), experts, RouterSpec(gate_mode="random", router_layer="auto")) == 0
    # Where every layer knows everything by the same margin, the lowest is read.
    same = bigram_model({}, letters(), num_hidden_layers=3)
    assert best_layer(same, letters(), [of("a"), of("b")], RouterSpec(router_layer="auto")) == 0


def test_random_gates_are_a_function_of_seed_and_name() -> None:
    reader = unit_reader()
    experts = [of(name="a"), of(name="b")]
    first, mode = build_gate(reader, experts, RouterSpec(gate_mode="random", seed=7))
    assert mode == "random"
    assert torch.equal(first.weight, build_gate(reader, experts, RouterSpec(gate_mode="random", seed=7))[0].weight)
    assert torch.equal(first.weight.flip(0), build_gate(reader, experts[::-1], RouterSpec(gate_mode="random", seed=7))[0].weight)
    assert not torch.equal(first.weight, build_gate(reader, experts, RouterSpec(gate_mode="random", seed=8))[0].weight)
    assert not torch.equal(first.weight[0], first.weight[1])
    many = build_gate(reader, [of(name=f"e{number}") for number in range(60)], RouterSpec(gate_mode="uniform_random"))[0].weight
    bound = 48**-0.5
    assert many.abs().max() <= bound
    assert many.abs().max() > 0.99 * bound
    assert float(many.mean()) == pytest.approx(0, abs=0.1 * bound)
    assert float(many.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(LETTERS, min_size=1, max_size=30), min_size=1, max_size=90), st.randoms(use_true_random=False))
def test_what_a_text_is_batched_with_changes_no_bit(texts: list[str], random_: object) -> None:
    gate, _ = build_gate(_READERS[0], [of("cat", "dog"), of("12")], RouterSpec())
    alone = torch.cat([_READERS[0].logits([text], gate, "prompt") for text in texts])
    assert torch.equal(_READERS[0].logits(texts, gate, "prompt"), alone)
    deep, _ = build_gate(_READERS[1], [of("cat", "dog"), of("12")], RouterSpec(router_layer=1))
    alone = torch.cat([_READERS[1].logits([text], deep, "prompt") for text in texts])
    torch.testing.assert_close(_READERS[1].logits(texts, deep, "prompt"), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "gemma", "mixtral"])
def test_the_stream_that_enters_a_layer(name: str) -> None:
    model = random_model(name)
    ids = torch.tensor([[1, 9, 8, 7], [1, 5, 6, 10]])
    with torch.inference_mode():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(2):
        torch.testing.assert_close(entering(model, ids, torch.ones_like(ids), layer), expected[layer])


@pytest.mark.parametrize("pad_left", [True, False])
def test_pads_are_not_read(pad_left: bool) -> None:
    model = random_model("llama")
    rows = [[1, 9, 8, 7], [1, 5]]
    padded, real = ([0, 0, 1, 5], [0, 0, 1, 1]) if pad_left else ([1, 5, 0, 0], [1, 1, 0, 0])
    mask = torch.tensor([[1, 1, 1, 1], real])
    both = Encoded(entering(model, torch.tensor([rows[0], padded]), mask, 1), mask)
    short = torch.tensor([rows[1]])
    one = Encoded(entering(model, short, torch.ones_like(short), 1), torch.ones_like(short))
    torch.testing.assert_close(both.last()[1:], one.last())
    torch.testing.assert_close(both.mean()[1:], one.mean())
    torch.testing.assert_close(Encoded(both.states[1:], both.mask[1:]).sums().sum(dim=0), one.sums().sum(dim=0))


def test_pooling_by_hand() -> None:
    states = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]], [[9.0, 9.0], [5.0, 1.0], [7.0, 3.0]]])
    encoded = Encoded(states, torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert encoded.last().tolist() == [[3.0, 2.0], [7.0, 3.0]]
    assert encoded.mean().tolist() == [[2.0, 1.0], [6.0, 2.0]]
    assert encoded.sums().sum(dim=0).tolist() == [16.0, 6.0]
    torch.testing.assert_close(gate_row(encoded, None, "hidden"), torch.tensor([10.0, 5.0]) / 125**0.5)


def test_longer_texts_than_the_encoder_can_hold_keep_their_end() -> None:
    reader = Reader(random_model("gpt2", n_positions=8), letters(), 0)
    gate, _ = build_gate(reader, [of("a"), of("b")], RouterSpec())
    long, kept = reader.logits(["lost beginning, abcdefg", "abcdefg"], gate, "prompt")
    assert torch.equal(long, kept)


def test_no_beginning_of_sequence_where_the_tokenizer_has_none() -> None:
    tokenizer = pieces(begin=False)
    assert tokenizer.bos_token_id == 1
    with_one = Reader(random_model("llama"), tokenizer, 0).encode(["xyz"])
    assert with_one.states.shape == (1, 4, 16)
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    assert Reader(random_model("llama"), without, 0).encode(["xyz"]).states.shape == (1, 3, 16)


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        ([of("a"), of(name="mute")], {}, r"expert 'mute': has no positive prompts for the router"),
        ([of("a", name="x"), of("a", name="y")], {}, r"experts 'x' and 'y' have the same prompts"),
        ([of("a", "b", against=("b", "a")), of("c")], {}, r"expert 'ab': its negative prompts cancel the positive ones"),
        ([of("a"), of("", name="e")], {}, r"the prompt '' has no token in the encoder's vocabulary"),
        ([of("a"), of("b", against=("",))], {}, r"the prompt '' has no token"),
    ],
)
def test_prompts_that_no_router_can_use(experts: list[ExpertSpec], options: dict[str, object], message: str) -> None:
    for mode in PROMPTED:
        with pytest.raises(UserError, match=message):
            build_gate(unit_reader(), experts, RouterSpec(gate_mode=mode, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_mode": "hiden"}, r"gate_mode is 'hiden'; allowed are hidden, .* Did you mean 'hidden'"),
        ({"router_layer": -1}, r"router_layer is -1; allowed is a whole number from 0, or auto"),
        ({"router_layer": "deep"}, r"router_layer is deep"),
        ({"temperature": 0.0}, r"temperature is 0.0; allowed is a finite number above 0"),
        ({"temperature": math.inf}, r"temperature is inf"),
        ({"temperature": math.nan}, r"temperature is nan"),
        ({"route_span": "first:0"}, r"route_span is 'first:0'; allowed are prompt, full, and first:N"),
        ({"route_span": "last:3"}, r"route_span is 'last:3'"),
    ],
)
def test_settings_that_no_router_can_have(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RouterSpec(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [2, 99])
def test_a_layer_that_the_encoder_does_not_have(layer: int) -> None:
    with pytest.raises(UserError, match=rf"router_layer is {layer}, the encoder has 2 layers; allowed is 0 to 1"):
        Reader(random_model("llama"), letters(), layer)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a\\b", "a b"])
def test_a_name_that_could_not_be_a_folders(name: str) -> None:
    with pytest.raises(UserError, match="is no name; allowed are letters"):
        ExpertSpec(name, unit_reader, ())  # type: ignore[arg-type]


def test_default_prompts_of_domains() -> None:
    assert sorted(DOMAIN_PROMPTS) == ["chat", "code", "math", "writing"]
    found = domain_prompts(["math", "unheard-of", "code"])
    assert found["positive"] == ["reason", "math", "mathematics", "solve", "count", "code", "python", "programming", "algorithm"]
    assert found["negative"][:5] == ["chat", "assistant", "code", "programming", "storywriting"]
    assert domain_prompts(["unheard-of"]) == {"positive": [], "negative": []}


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWrite a poem\r\n\n  zweite Zeile: größer \n".encode())
    assert read_prompts(path) == ["Write a poem", "zweite Zeile: größer"]
    path.write_bytes(b"one\ntwo\n\xff\xfe\none \n")
    with pytest.raises(UserError) as fault:
        read_prompts(path)
    assert str(fault.value).splitlines() == [
        f"{path}:3: is no UTF-8. Save the file as UTF-8.", f"{path}:4: is the same prompt as line 1. Take one out."
    ]  # fmt: skip
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"prompts.txt: holds no prompt"):
        read_prompts(path)
    with pytest.raises(UserError, match=r"nowhere.txt: cannot be read \(No such file"):
        read_prompts(tmp_path / "nowhere.txt")
