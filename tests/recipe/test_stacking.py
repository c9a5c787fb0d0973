"""Deeper models: which layers in which order, what begins as the identity, what stands around the layers, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from modelglue.errors import CheckpointError, MergeError, UserError
from modelglue.models import load_live
from modelglue.recipe import Stack, build, canonical, dump, read_recipe, stack
from modelglue.recipe.stack_order import Placed, expanded, listed, stacked
from tests.models.tiny import random_dense, random_model
from tests.recipe.on_disk import WORDS, write_model

IDS = torch.tensor([[5, 3, 60, 17, 9, 9, 31, 2]])


def checkpoint(model: Any, seed: int = 0) -> TensorsCheckpoint:
    """A live model as a checkpoint, biases random so that none may be mistaken for zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items() if name != "lm_head.weight" or not tied(model)}
    for name, value in tensors.items():
        if name.endswith(".bias"):
            value.copy_(torch.randn(value.shape, generator=generator))
    written = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return TensorsCheckpoint(tensors, written)


def tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def tiny(name: str, seed: int = 0, depth: int = 4) -> TensorsCheckpoint:
    return checkpoint(random_model(name, seed, **{"n_layer" if name == "gpt2" else "num_hidden_layers": depth}), seed)


def bare(seed: int, depth: int, *, width: int = 6, **changes: Any) -> TensorsCheckpoint:
    """Tensors with the names of a Llama, two of them in a layer; only orders and headers matter."""
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(depth):
        names += [f"model.layers.{layer}.{part}.weight" for part in ("input_layernorm", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj")]
    shapes = {"norm": (width,), "embed": (8, width), "lm_head": (8, width)}
    tensors = {
        name: torch.randn(next((shape for key, shape in shapes.items() if key in name), (width, width)), generator=generator)
        for name in names
    }
    return TensorsCheckpoint(tensors, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": depth, **changes})


def made(members: Mapping[str, Checkpoint], models: str | None = None, **options: Any) -> Stack:
    """A stack of models by one-letter names."""
    return stack(list(models or members), resolve=members.__getitem__, **options)


def logits(model: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_live(model)(IDS).logits
    return found


def values(model: Checkpoint, name: str) -> torch.Tensor:
    return model.read(name).reshape(model.info(name).shape)


# -- orders -----------------------------------------------------------------------------------------------------------------------


def test_the_published_depths() -> None:
    """Llama-2-7b and Vicuna, 32 layers each, as in Model-GLUE; SOLAR's 48 layers; LLaMA Pro's 40."""
    assert [len(stacked([32, 32], drop)) for drop in (8, 12, 16, 20, 24)] == [48, 40, 32, 24, 16]
    solar = stacked([32, 32], 8)
    assert [layer.number for layer in solar] == [*range(24), *range(8, 32)]
    pro = expanded(32, new_layers=8)
    assert [at for at, layer in enumerate(pro) if layer.silent] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert pro == expanded(32, every=4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 9), st.booleans(), st.booleans())
def test_count_and_order_of_a_stack(depths: list[int], drop: int, interleave: bool, silent: bool) -> None:
    losses = [drop * ((at > 0) + (at < len(depths) - 1)) for at in range(len(depths))]
    if any(loss >= depth for loss, depth in zip(losses, depths, strict=True)):
        with pytest.raises(UserError, match=rf"drop {drop}: model \d has \d layers? and loses .* allowed are 0 to \d\."):
            stacked(depths, drop, interleave=interleave, silent=silent)
        return
    order = stacked(depths, drop, interleave=interleave, silent=silent)
    assert len(order) == sum(depths) - sum(losses)
    for at, depth in enumerate(depths):
        own = [layer.number for layer in order if layer.model == at]
        assert own == list(range(drop if at else 0, depth - drop if at < len(depths) - 1 else depth))
    assert [layer.silent for layer in order] == [silent and layer.model > 0 for layer in order]
    if not interleave:
        assert [layer.model for layer in order] == sorted(layer.model for layer in order)
    elif len(set(map(len, (range(d - one) for d, one in zip(depths, losses, strict=True))))) == 1:
        assert [layer.model for layer in order] == list(range(len(depths))) * (len(order) // len(depths))


def test_a_longer_model_ends_an_interleaved_stack() -> None:
    assert [(layer.model, layer.number) for layer in stacked([1, 3], 0, interleave=True)] == [(0, 0), (1, 0), (1, 1), (1, 2)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24))
def test_expansion(depth: int, new: int) -> None:
    if new > depth or depth % new:
        with pytest.raises(UserError, match=f"{new} new layers"):
            expanded(depth, new_layers=new)
    if new > depth:
        return
    order = expanded(depth, new_layers=new, spread=True)
    assert [layer.number for layer in order if not layer.silent] == list(range(depth))
    silent = [at for at, layer in enumerate(order) if layer.silent]
    assert len(silent) == new
    assert all(order[at - 1] == Placed(0, order[at].number) for at in silent)
    assert order[-1].silent
    gaps = [b.number - a.number for a, b in zip([Placed(0, -1), *(order[at] for at in silent)], [order[at] for at in silent], strict=False)]
    assert set(gaps) <= {math.floor(depth / new), math.ceil(depth / new)}


def test_lists_of_layers() -> None:
    found = listed(8, ["0:3", 2, "7", "range(1,4)", "range(2)", "1:8:3", "range(3, 0, -1)"])
    assert [layer.number for layer in found] == [0, 1, 2, 2, 7, 1, 2, 3, 0, 1, 1, 4, 7, 3, 2, 1]
    text = listed(8, "0:2, range(3, 5),[6, 6 ,0],7")
    assert [layer.number for layer in text] == [0, 1, 3, 4, 6, 6, 0, 7]


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        (["0:9"], "layers: 8: the model has the layers 0 to 7."),
        ([-1], "layers: -1: the model has the layers 0 to 7."),
        (["1:1"], "layers: none are named; a model needs one at least."),
        (["0:4:0"], "layers: '0:4:0' has a step of 0."),
        (["__import__('os')"], "is no layer; allowed are numbers"),
    ],
)
def test_lists_of_layers_that_are_refused(layers: list[int | str], fault: str) -> None:
    with pytest.raises(UserError, match=re.escape(fault)):
        listed(8, layers)


# -- values -----------------------------------------------------------------------------------------------------------------------


def test_every_tensor_of_a_stack_of_three() -> None:
    members = {"a": bare(0, 4), "b": bare(1, 5), "c": bare(2, 3)}
    found = made(members, drop=1)
    assert [(step.model, step.number) for step in stacked([4, 5, 3], 1)] == [("abc".index(m), n) for m, n in THREE]
    assert (found.depth, found.new_layers, found.new_tensors, found.warnings) == (8, (), (), ())
    assert found.checkpoint.config["num_hidden_layers"] == 8
    for at, (model, number) in enumerate(THREE):
        for part in ("input_layernorm", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
            ours = values(found.checkpoint, f"model.layers.{at}.{part}.weight")
            assert torch.equal(ours, values(members[model], f"model.layers.{number}.{part}.weight")), (at, part)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        mean = torch.stack([values(member, name).double() for member in members.values()]).mean(0)
        torch.testing.assert_close(values(found.checkpoint, name).double(), mean, rtol=1e-6, atol=1e-7)
    assert len(found.checkpoint.names()) == 3 + 8 * 4


THREE = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("c", 1), ("c", 2)]


def test_a_model_that_stands_twice_counts_twice_in_the_mean() -> None:
    members = {"a": bare(0, 2), "b": bare(1, 2)}
    name = "lm_head.weight"
    expected = (2 * values(members["a"], name).double() + values(members["b"], name).double()) / 3
    torch.testing.assert_close(values(made(members, "aba").checkpoint, name).double(), expected, rtol=1e-6, atol=1e-7)


def test_copies_are_bytes_of_the_model_whatever_its_dtype() -> None:
    source = bare(0, 4)
    half = TensorsCheckpoint({name: source.tensor(name).bfloat16() for name in source.names()}, source.config)
    found = made({"a": half}, copies=3, drop=1)
    order = stacked([4, 4, 4], 1)
    assert found.depth == 8
    for at, layer in enumerate(order):
        name = "mlp.up_proj.weight"
        assert torch.equal(values(found.checkpoint, f"model.layers.{at}.{name}"), values(half, f"model.layers.{layer.number}.{name}"))
    assert found.recipe.method == "passthrough"
    assert {found.checkpoint.info(name).dtype for name in found.checkpoint.names()} == {"BF16"}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma", "gpt_neox", "gpt2", "mixtral", "mamba"])
def test_an_expanded_model_computes_what_it_did(name: str) -> None:
    """Bit for bit: what writes into the residual stream adds zeros. GPT-NeoX adds both of its parts at once, Qwen2 has biases."""
    source = tiny(name)
    found = made({"a": source}, every=2)
    assert (found.depth, found.new_layers) == (6, (2, 5))
    copied = {"1": "2", "3": "5"}
    new = [re.sub(r"\.(\d+)\.", lambda found: f".{copied.get(found[1], '-')}.", name, count=1) for name in source.names()]
    assert found.new_tensors == tuple(sorted(name for name in new if re.search(r"\.\d+\.", name) and ".-." not in name))
    assert torch.equal(logits(found.checkpoint), logits(source))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "qwen3"])
def test_norms_behind_the_parts_keep_zeros(kind: str) -> None:
    source = checkpoint(random_dense(kind, num_hidden_layers=4, **({"sliding_window": 4} if "gemma" in kind else {})))
    assert torch.equal(logits(made({"a": source}, every=2).checkpoint), logits(source))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt_neox"])
@pytest.mark.parametrize("interleave", [False, True])
def test_a_stack_that_begins_as_its_bottom_model(name: str, interleave: bool) -> None:
    members = {"a": tiny(name, 0), "b": tiny(name, 1, depth=3)}
    found = made(members, drop=1, identity_start=True, interleave=interleave)
    shortened = made(members, "a", layers=["0:3"])
    assert (found.depth, len(found.new_layers)) == (5, 2)
    assert torch.equal(logits(found.checkpoint), logits(shortened.checkpoint))
    assert not torch.equal(logits(found.checkpoint), logits(made(members, drop=1, interleave=interleave).checkpoint))


def test_new_layers_learn() -> None:
    """The gradient reaches what is zero, and in the next step all the rest of the layer."""
    found = made({"a": tiny("llama")}, new_layers=1)
    live = load_live(found.checkpoint)
    live(IDS, labels=IDS).loss.backward()
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        weight = live.get_parameter(f"model.layers.4.{part}.weight")
        assert not weight.any()
        assert weight.grad.abs().sum() > 0


def test_the_recipe_says_it_all() -> None:
    members = {"a": tiny("qwen2", 0), "b": tiny("qwen2", 1)}
    for options in ({"drop": 1}, {"drop": 1, "identity_start": True}, {"interleave": True}):
        found = made(members, **options)
        again = build(read_recipe(canonical(found.recipe)), resolve=members.__getitem__)
        assert again.config == found.checkpoint.config
        assert again.identity == found.checkpoint.identity
        assert all(torch.equal(again.read(name), found.checkpoint.read(name)) for name in found.checkpoint.names())


def test_the_recipe_of_an_expansion_is_short() -> None:
    expected = """format: modelglue/1
method: passthrough
slices:
- models:
  - model: a
    layers: [0, 4]
- models:
  - model: a
    layers: [3, 4]
    scale:
    - filter: down_proj
      value: 0.0
    - filter: o_proj
      value: 0.0
seed: 0
"""
    assert dump(made({"a": tiny("llama")}, new_layers=1).recipe) == expected


# -- configs ----------------------------------------------------------------------------------------------------------------------


def test_what_the_config_says_by_layer_moves_along() -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    source = bare(0, 4, layer_types=types, first_k_dense_replace=1, max_window_layers=4, mlp_only_layers=[0, 2])
    found = made({"a": source}, every=2).checkpoint.config
    assert found["layer_types"] == [types[number] for number in (0, 1, 1, 2, 3, 3)]
    assert (found["num_hidden_layers"], found["first_k_dense_replace"], found["max_window_layers"]) == (6, 1, 6)
    assert found["mlp_only_layers"] == [0, 3]


def test_a_broken_pattern_is_refused_unless_allowed() -> None:
    source = bare(0, 4, sliding_window_pattern=2)
    with pytest.raises(UserError, match="a: the config says 'sliding_window_pattern: 2', a rule by layer number"):
        made({"a": source}, every=1)
    found = made({"a": source}, every=1, allow_pattern_break=True)
    assert ["sliding_window_pattern" in text for text in found.warnings] == [True]
    assert made({"a": source}, copies=2).warnings == ()


def test_gemma2_keeps_the_kind_of_every_layer_where_its_config_does_not_list_them() -> None:
    source = checkpoint(random_dense("gemma2", num_hidden_layers=4, sliding_window=2))
    plain = TensorsCheckpoint(
        {name: source.tensor(name) for name in source.names()}, {k: v for k, v in source.config.items() if k != "layer_types"}
    )
    found = made({"a": plain}, every=1)
    assert torch.equal(logits(found.checkpoint), logits(plain))
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert found.checkpoint.config["layer_types"] == kinds * 2


# -- refused ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "options", "fault"),
    [
        ("", {}, "no model is named"),
        ("a", {}, "one model is no stack. Name a second one, or say copies, layers, every or new layers."),
        ("ab", {"copies": 2}, "copies are of one model."),
        ("a", {"copies": 1}, "copies 1: allowed are 2 and more."),
        ("ab", {"every": 2}, "layers and new layers are those of one model."),
        ("a", {"every": 2, "layers": [1]}, "exclude each other"),
        ("a", {"every": 2, "drop": 1}, "drop, interleave and identity start are for stacks"),
        ("a", {"every": 2, "spread": True}, "spread is for a number of new layers"),
        ("a", {"every": 5}, "every 5: the model has 4 layers; allowed are 1 to 4."),
        ("a", {"new_layers": 3}, "3 new layers do not divide the 4 of the model; allowed are 1, 2, 4, and any number up to that"),
        ("a", {"new_layers": 5}, "5 new layers: the model has 4; allowed are 1 to 4."),
        ("ab", {"drop": 4}, "drop 4: model 1 has 4 layers and loses so many at the top; allowed are 0 to 3."),
        ("aba", {"drop": 2}, "drop 2: model 2 has 4 layers and loses so many at either end; allowed are 0 to 1."),
    ],
)
def test_numbers_that_do_not_fit(models: str, options: dict[str, Any], fault: str) -> None:
    members = {"a": bare(0, 4), "b": bare(1, 4)}
    with pytest.raises(UserError, match=re.escape(fault)):
        stack(list(models), resolve=members.__getitem__, **options)


def test_all_wrong_combinations_are_said_together() -> None:
    with pytest.raises(UserError) as error:
        stack(["a", "b"], copies=1, every=2, drop=3, resolve={}.__getitem__)
    assert len(str(error.value).split("\n")) == 4


def test_models_that_do_not_go_together() -> None:
    members = {"a": bare(0, 2), "wide": bare(1, 2, width=8), "neox": tiny("gpt_neox", depth=2)}
    with pytest.raises(
        MergeError, match=r"wide: its layers do not fit those of a: 'model\.layers\.\*\.input_layernorm\.weight' has \[8\], in a \[6\]"
    ):
        stack(["a", "wide"], resolve=members.__getitem__)
    with pytest.raises(MergeError, match="is a GPTNeoXForCausalLM and"):
        stack(["a", "neox"], resolve=members.__getitem__)


def test_models_with_other_layers_than_one_stack() -> None:
    tensors = {"weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="a: has no layers: no tensors' names are numbered"):
        stack(["a"], every=1, resolve={"a": TensorsCheckpoint(tensors, {})}.__getitem__)
    towers = {f"{side}.block.0.x.weight": torch.ones(2) for side in ("encoder", "decoder")}
    with pytest.raises(CheckpointError, match=r"a: has several parts with layers of their own \(decoder, encoder\)|\(encoder, decoder\)"):
        stack(["a"], every=1, resolve={"a": TensorsCheckpoint(towers, {"is_encoder_decoder": True})}.__getitem__)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"input_layernorm": "strange_norm"}, "a, layer 1: is not known to be a block that adds to its input (its norms: strange_norm)"),
        ({"self_attn.o_proj": "self_attn.last"}, "a, layer 1: has a part 'self_attn' whose output projection is not known"),
        ({"mlp.up_proj": "altup.up_proj"}, "a, layer 1: has a part 'altup' whose output projection is not known"),
    ],
)
def test_blocks_that_cannot_begin_as_the_identity(change: dict[str, str], fault: str) -> None:
    [(old, new)] = change.items()
    source = bare(0, 2)
    other = TensorsCheckpoint({name.replace(old, new): source.tensor(name) for name in source.names()}, source.config)
    with pytest.raises(CheckpointError, match=re.escape(fault)):
        made({"a": other}, new_layers=1)
    assert made({"a": other}, copies=2).depth == 4  # nothing need be known of layers that are copied as they are


def test_a_norm_with_a_bias_behind_the_parts_is_no_identity() -> None:
    source = tiny("llama")
    names = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight", "post_feedforward_layernorm.bias")
    extra = {f"model.layers.{layer}.{name}": torch.ones(16) for layer in range(4) for name in names}
    other = TensorsCheckpoint({**{name: source.tensor(name) for name in source.names()}, **extra}, source.config)
    with pytest.raises(CheckpointError, match=r"layer 3: 'post_feedforward_layernorm\.bias' is added behind the output projections"):
        made({"a": other}, new_layers=1)


def test_blocks_with_the_norm_on_the_sum_are_no_identity() -> None:
    """OPT-350m normalises the sum itself: no projection can make its block the identity."""
    source = bare(0, 2, do_layer_norm_before=False)
    with pytest.raises(CheckpointError, match="is not known to be a block that adds to its input"):
        made({"a": source}, new_layers=1)


# -- vocabularies -----------------------------------------------------------------------------------------------------------------


def test_vocabularies_that_differ(tmp_path: Any) -> None:
    """Rows that only one model has are that one's, rows that both have are the mean; the tokenizer is the first one's or the union."""
    ours = write_model(tmp_path / "a", 0)
    theirs = write_model(tmp_path / "b", 1, words=[*WORDS[:-1], "z"])
    with pytest.raises(MergeError, match="A stack takes `vocabulary` for that: first or union"):
        stack([str(ours), str(theirs)])
    members = {name: stack([str(tmp_path / name)], layers=["0:2"]).checkpoint for name in "ab"}
    first, both = (stack([str(ours), str(theirs)], vocabulary=kind).checkpoint for kind in ("first", "union"))  # type: ignore[arg-type]
    name = "model.embed_tokens.weight"
    a, b = (values(members[one], name) for one in "ab")
    assert (first.info(name).shape, both.info(name).shape) == ((8, 6), (9, 6))
    mean = (a[:7] + b[:7]) / 2
    torch.testing.assert_close(values(first, name), torch.cat([mean, a[7:]]))
    torch.testing.assert_close(values(both, name), torch.cat([mean, a[7:], b[7:]]))
    assert both.config["vocab_size"] == 9


def test_models_that_compute_otherwise_are_named() -> None:
    members = {"a": bare(0, 2, rope_theta=1e4), "b": bare(1, 2, rope_theta=1e6)}
    assert [text for text in made(members).warnings if "rope_theta" in text] == [
        "b has rope_theta = 1000000.0, a has 10000.0; the output takes the first one's."
    ]
