"""What holds for every mixture inside one model, whatever its architecture, level, routing and top_k."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.mixture.gates import LinearGate, MlpGate
from modelglue.mixture.levels import LevelSpec, deciding_layers
from modelglue.models import LiveTextModel
from modelglue.models.writer import Writer
from tests.mixture.levels_making import ARCHITECTURES, LEVELS, left_pads, logits, mixture, model, some_ids
from tests.models.tiny import letters

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def llamas() -> list[Any]:
    return [model("llama", seed) for seed in range(3)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equal_experts_are_the_expert_and_caches_change_nothing(kind: str) -> None:
    models = [model(kind, seed) for seed in range(3)]
    ids = some_ids()
    mask = left_pads(ids, [4, 0, 1])
    for level, routing in LEVELS if kind == "llama" else LEVELS[:3]:
        spec = LevelSpec(level, routing, top_k=2)  # type: ignore[arg-type]
        same = mixture([models[0]] * 3, spec)
        torch.testing.assert_close(logits(same, ids), logits(models[0], ids), rtol=1e-4, atol=1e-4)
        mixed = mixture(models, spec)
        cached = mixed.generate(ids, attention_mask=mask, use_cache=True, **GREEDY)
        assert torch.equal(cached, mixed.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)), level
        alone = mixed.generate(ids[:1, 4:], **GREEDY)
        assert torch.equal(alone[0, -6:], cached[0, -6:]), level


@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**20), level=st.sampled_from(LEVELS), top_k=st.integers(1, 3), merged=st.integers(0, 1))
def test_neighbours_pads_and_order_of_experts_change_nothing(
    data: st.DataObject, seed: int, level: tuple[Any, Any], top_k: int, merged: int, llamas: list[Any]
) -> None:
    spec = LevelSpec(*level, top_k=top_k, merged_layers=merged)
    ids = some_ids(seed=seed)
    pads = [data.draw(st.integers(0, 5)) for _ in ids]
    mixed = mixture(llamas, spec, seed)
    together = logits(mixed, ids, attention_mask=left_pads(ids, pads), prompt_length=ids.shape[1])
    for row, count in enumerate(pads):
        alone = logits(mixed, ids[row : row + 1, count:], prompt_length=ids.shape[1] - count)
        torch.testing.assert_close(together[row, count:], alone[0], rtol=1e-4, atol=1e-4)
    order = data.draw(st.permutations(range(3)))
    rows = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed))
    layers = deciding_layers(spec, 2)
    plain = mixture(llamas, spec, shared=llamas[0], gate={layer: LinearGate(rows[layer]) for layer in layers})
    turned = mixture(
        [llamas[i] for i in order], spec, shared=llamas[0], gate={layer: LinearGate(rows[layer][list(order)]) for layer in layers}
    )
    torch.testing.assert_close(logits(plain, ids), logits(turned, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("level", "routing"), LEVELS)
@pytest.mark.parametrize("merged_layers", [0, 1])
def test_a_gate_that_always_says_one_gives_that_expert(level: Any, routing: Any, merged_layers: int, llamas: list[Any]) -> None:
    spec = LevelSpec(level, routing, merged_layers=merged_layers)
    always = LinearGate(torch.zeros(3, 16), torch.tensor([0.0, 0.0, 9.0]))
    merged = model("llama", 9)
    mixed = mixture(llamas, spec, shared=llamas[0], merged=merged, gate=dict.fromkeys(deciding_layers(spec, 2), always))
    wanted = model("llama", 0)
    parts = {layer: llamas[2].model.layers[layer] for layer in range(merged_layers, 2)}
    for layer in range(merged_layers):
        wanted.model.layers[layer].load_state_dict(merged.model.layers[layer].state_dict())
    for layer, expert in parts.items():
        own = wanted.model.layers[layer]
        (own.mlp if level == "ffn" else own).load_state_dict((expert.mlp if level == "ffn" else expert).state_dict())
    assert torch.equal(logits(mixed, some_ids()), logits(wanted, some_ids()))


def test_all_experts_at_once_are_the_softmax_mixture(llamas: list[Any]) -> None:
    spec = LevelSpec("ffn", "token", top_k=3, temperature=2.0)
    layer = mixture(llamas, spec).model.layers[1].mlp
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    weights = ((states @ layer.router.weight.T) / 2.0).softmax(dim=-1)
    wanted = sum(weights[..., number, None] * expert(states) for number, expert in enumerate(layer.experts))
    torch.testing.assert_close(layer(states), wanted, rtol=1e-5, atol=1e-5)
    layer.router.weight.data.zero_()
    torch.testing.assert_close(layer(states), sum(expert(states) for expert in layer.experts) / 3, rtol=1e-5, atol=1e-5)


def test_equal_logits_choose_the_first_experts(llamas: list[Any]) -> None:
    mixed = mixture(llamas, LevelSpec("ffn", "token", top_k=2))
    assert mixed.routing.weights(torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 3.0]]), training=False).tolist() == [
        [0.5, 0.5, 0],
        [0, 0.5, 0.5],
    ]


def test_an_mlp_router_is_two_matrices_with_a_relu(llamas: list[Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(5, 16, generator=generator), torch.randn(3, 5, generator=generator)
    spec = LevelSpec("ffn", "token", top_k=2)
    mixed = mixture(llamas, spec, gate=dict.fromkeys(range(2), MlpGate(first, second, torch.ones(5), torch.ones(3))))
    states = torch.randn(4, 16, generator=generator)
    torch.testing.assert_close(mixed.model.layers[0].mlp.router(states), (states @ first.T + 1).relu() @ second.T + 1)


@pytest.mark.parametrize(("level", "routing"), LEVELS[1:])
@pytest.mark.parametrize("kind", ["llama", "mistral-window"])
def test_beams_with_a_cache_are_those_without(kind: str, level: Any, routing: Any) -> None:
    mixed = mixture([model(kind, seed) for seed in range(3)], LevelSpec(level, routing, top_k=2))
    ids = some_ids(4)
    mask = left_pads(ids, [0, 3, 1, 0])
    options = {**GREEDY, "num_beams": 3, "attention_mask": mask}
    assert torch.equal(mixed.generate(ids, use_cache=True, **options), mixed.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize(("level", "routing"), LEVELS[1:])
def test_the_prompt_decides_once(level: Any, routing: Any, llamas: list[Any]) -> None:
    """What follows changes no route: neither in one call that knows where the prompt ends, nor over a cache."""
    mixed = mixture(llamas, LevelSpec(level, routing))
    ids = some_ids(1, 9)
    with torch.no_grad():
        prompt = mixed(ids[:, :4], prompt_length=4, use_cache=True, output_router_logits=True)
        whole = mixed(ids, prompt_length=4, output_router_logits=True)
        rest = mixed(ids[:, 4:], past_key_values=prompt.cache, use_cache=True, output_router_logits=True)
        other = mixed(ids, prompt_length=9, output_router_logits=True)
    for a, b, c, d in zip(prompt.router_logits, whole.router_logits, rest.router_logits, other.router_logits, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[0], c[0])
        assert not torch.equal(a[0], d[0])
    torch.testing.assert_close(whole.logits[:, 4:], rest.logits, rtol=1e-4, atol=1e-4)


def test_spans_choose_the_positions_that_decide(llamas: list[Any]) -> None:
    ids = some_ids(1, 9)
    found = {}
    for span in ("prompt", "full", "first:4"):
        mixed = mixture(llamas, LevelSpec("block", "sample", route_span=span))
        with torch.no_grad():
            found[span] = [mixed(ids, prompt_length=length, output_router_logits=True).router_logits[0] for length in (None, 4)]
    assert torch.equal(found["prompt"][0], found["full"][0])  # 9 positions are less than those that count without a prompt
    assert torch.equal(found["full"][0], found["full"][0])
    assert torch.equal(found["first:4"][0], found["prompt"][1])
    assert not torch.equal(found["full"][0], found["first:4"][0])


def test_experts_of_other_shapes_have_caches_of_their_own() -> None:
    """Width of the feed-forward network, heads and rotary positions may differ between blocks."""
    changes = {"intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    models = [
        model("llama", 0),
        model("llama", 1, **changes),
        model("llama", 2, rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
    ]
    spec = LevelSpec("block", "sample", top_k=2)
    mixed, ids = mixture(models, spec), some_ids(6)
    mask = left_pads(ids, [0, 3, 1, 0, 2, 5])
    cached = mixed.generate(ids, attention_mask=mask, use_cache=True, **GREEDY)
    assert torch.equal(cached, mixed.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    for number, one in enumerate(models):  # each of them alone, with embedding and head of the first
        always = LinearGate(torch.zeros(3, 16), torch.nn.functional.one_hot(torch.tensor(number), 3) * 9.0)
        single = mixture(models, LevelSpec("block", "sample"), shared=models[0], gate=dict.fromkeys(range(2), always))
        one.model.embed_tokens, one.model.norm, one.lm_head = models[0].model.embed_tokens, models[0].model.norm, models[0].lm_head
        assert torch.equal(logits(single, ids), logits(one, ids)), number


@pytest.mark.parametrize(("gating", "learns"), [(None, False), ("soft", True), ("straight_through", True)])
def test_with_one_expert_only_training_gates_reach_the_router(gating: str | None, learns: bool, llamas: list[Any]) -> None:
    mixed = mixture(llamas, LevelSpec("block", "sample")).train()
    mixed.routing.train_gating = gating
    ids = some_ids()
    before = logits(mixture(llamas, LevelSpec("block", "sample")), ids)
    output = mixed(ids, labels=ids)
    output.loss.backward()
    assert bool(mixed.model.layers[0].router.weight.grad.abs().sum() > 1e-6) == learns
    if gating == "straight_through":
        torch.testing.assert_close(output.logits, before, rtol=1e-4, atol=1e-4)


def test_rows_of_pads_alone_go_to_the_first_expert(llamas: list[Any]) -> None:
    mixed = mixture(llamas, LevelSpec("block", "sample"))
    ids = some_ids(2)
    with torch.no_grad():
        output = mixed(ids, attention_mask=left_pads(ids, [7, 0]), output_router_logits=True)
    assert output.router_logits[0][0].tolist() == [0.0, 0.0, 0.0]
    assert bool(output.logits[1].isfinite().all())


@pytest.mark.parametrize(("level", "routing"), LEVELS)
def test_as_a_text_model_choices_share_their_prompts_expert(level: Any, routing: Any, llamas: list[Any]) -> None:
    text = LiveTextModel(mixture(llamas, LevelSpec(level, routing)), letters())
    prompts = ["abc", "hello world", "x", "what is"]
    assert text.generate(prompts, until=[], max_new_tokens=4) == [text.generate([p], until=[], max_new_tokens=4)[0] for p in prompts]
    pairs = [(prompt, choice) for prompt in prompts for choice in (" yes", " no", "z")] + [("", "plain text"), ("", "q")]
    for (prompt, choice), (value, _) in zip(pairs, text.loglikelihood(pairs), strict=True):
        ids, start = letters()(prompt + choice)["input_ids"], len(letters()(prompt)["input_ids"])
        scored = logits(text.model, torch.tensor([ids[:-1]]), prompt_length=start if prompt else None)[0].log_softmax(dim=-1)
        wanted = sum(float(scored[place - 1, ids[place]]) for place in range(start, len(ids)))
        assert value == pytest.approx(wanted, abs=1e-4)


def test_beams_of_a_writer_are_those_of_transformers(llamas: list[Any]) -> None:
    text = LiveTextModel(mixture(llamas, LevelSpec("block", "sample", top_k=2)), letters())
    (found,) = Writer(text).write(["what is"], until=[], max_new_tokens=5, beams=3)
    ids = torch.tensor([letters()("what is")["input_ids"]])
    wanted = text.model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False, early_stopping=False)[0, ids.shape[1] :]
    assert found == letters().decode(wanted, skip_special_tokens=True)


def test_a_copy_is_a_mixture_of_its_own(llamas: list[Any]) -> None:
    mixed, ids = mixture(llamas, LevelSpec("block", "sample")), some_ids()
    mixed(ids)
    copied = copy.deepcopy(mixed)
    assert copied.routing is copied.model.layers[1].routing is not mixed.routing
    assert torch.equal(logits(copied, ids), logits(mixed, ids))


def test_what_a_mixture_cannot_do_is_said(llamas: list[Any]) -> None:
    from transformers import StaticCache

    mixed, ids = mixture(llamas, LevelSpec("block", "sample")), some_ids()
    with pytest.raises(ValueError, match="hidden states are not recorded"):
        mixed(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="needs a DynamicCache that it has filled itself, layer 0 holds StaticLayer"):
        mixed(ids, past_key_values=StaticCache(config=mixed.config, max_cache_len=16))
    with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        mixed.generate(ids, prefill_chunk_size=2, max_new_tokens=2)
    foreign = llamas[0](ids, use_cache=True).cache
    with pytest.raises(ValueError, match="that it has filled itself"):
        mixed(ids, past_key_values=foreign)
    with pytest.warns(UserWarning, match="early positions of this loss depend on later text"):
        mixture(llamas, LevelSpec("block", "sample", route_span="full"))(ids, labels=ids)


def test_the_research_codes_way_has_no_cache(llamas: list[Any]) -> None:
    mixed, ids = mixture(llamas, LevelSpec("block", "sample", route_span="full", compat="official")), some_ids()
    text = mixed.generate(ids, **GREEDY)
    step = ids
    for _ in range(6):
        step = torch.cat([step, logits(mixed, step)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(text, step)
