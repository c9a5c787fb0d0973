"""base+adapter: what every variant of a LoRA adapter does to the tensors of its base."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelglue.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.checkpoint.adapted import AdaptedCheckpoint, open_adapted
from modelglue.checkpoint.adapter import AdapterConfig, open_adapter
from modelglue.checkpoint.adapter.config import Patterns
from modelglue.errors import CheckpointError, UserError
from tests.adapters.on_disk import PREFIX, linear, update, write_adapter, write_config
from tests.checkpoint.files import randn, write_single

Q, V = "model.layers.0.q_proj", "model.layers.0.v_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def base_model(dtype: torch.dtype = torch.float32, config: Mapping[str, Any] | None = None, **more: torch.Tensor) -> TensorsCheckpoint:
    tensors = {
        f"{Q}.weight": randn(6, 5, seed=1), f"{Q}.bias": randn(6, seed=2), f"{V}.weight": randn(3, 5, seed=3),
        f"{EMBEDDING}.weight": randn(9, 5, seed=4), f"{HEAD}.weight": randn(9, 5, seed=5), "model.norm.weight": randn(5, seed=6),
    }  # fmt: skip
    tensors |= {name.replace("__", "."): values for name, values in more.items()}
    return TensorsCheckpoint({name: values.to(dtype) for name, values in tensors.items()}, config or {}, label="base")


def without(checkpoint: Checkpoint, *names: str, config: Mapping[str, Any] | None = None) -> TensorsCheckpoint:
    kept = {name: checkpoint.tensor(name) for name in checkpoint.names() if name not in names}
    return TensorsCheckpoint(kept, config or checkpoint.config, label="base")


def changed(adapted: Checkpoint, base: Checkpoint) -> list[str]:
    same = [name for name in base.names() if adapted.info(name) == base.info(name) and torch.equal(adapted.tensor(name), base.tensor(name))]
    return [name for name in adapted.names() if name not in same]


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


# -- linear layers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"alpha_pattern": {"v_proj": 100, "q_proj": 12}}, 3.0),
        ({"r": 9, "rank_pattern": {"layers.0.q_proj": 4, "q_proj": 7}, "lora_alpha": 2}, 0.5),
        ({"r": 9, "rank_pattern": {"^model.*q_proj": 4}, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"alpha_pattern": {"proj": 100}}, 1.0),  # a whole name, not the end of one
    ],
)
def test_scales(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    base, tensors = base_model(), linear(Q, 6, 5)
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, **config)], "base+a")
    near(adapted.tensor(f"{Q}.weight"), base.tensor(f"{Q}.weight") + scale * update(tensors, Q))
    assert changed(adapted, base) == [f"{Q}.weight"]
    assert (adapted.computed(f"{Q}.weight"), adapted.computed(f"{V}.weight")) == (True, False)
    (factors,) = adapted.factors(f"{Q}.weight")
    assert torch.equal(factors.A, tensors[f"{Q}.lora_A.weight"])
    assert (factors.scale, adapted.factors(f"{V}.weight")) == (scale, [])


_NAMES = st.lists(st.sampled_from(["a", "b", "layers", "1", "11", "q_proj"]), min_size=1, max_size=4).map(".".join)
_PATTERNS = _NAMES | st.sampled_from([r"q_pro.", r".*1", r"a|b", r"layers\.\d+\.q_proj", r"(?:a|layers)\.1"])


@given(patterns=st.lists(_PATTERNS, max_size=8, unique=True), module=_NAMES)
@settings(max_examples=30, deadline=None)
def test_the_first_pattern_that_fits_the_end_of_a_name_decides(patterns: list[str], module: str) -> None:
    expected = next((place for place, key in enumerate(patterns) if re.match(rf"(.*\.)?({key})$", module)), -1)
    assert Patterns({key: float(place) for place, key in enumerate(patterns)}).first(module, -1.0) == expected


@given(saved=st.lists(_NAMES, max_size=4), name=_NAMES)
@settings(max_examples=30, deadline=None)
def test_a_tensor_is_saved_with_any_module_around_it(saved: list[str], name: str) -> None:
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts))]
    expected = any(f".{module}".endswith(f".{one}") for module in around for one in saved)
    assert AdapterConfig(modules_to_save=saved).is_saved(name) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_rounding_to_the_dtype_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tensors = base_model(dtype), linear(Q, 6, 5, dtype=torch.bfloat16)
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors)], "base+a")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = tensors[f"{Q}.lora_A.weight"].to(wide), tensors[f"{Q}.lora_B.weight"].to(wide)
    assert torch.equal(adapted.tensor(f"{Q}.weight"), (base.tensor(f"{Q}.weight").to(wide) + B @ A).to(dtype))


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 6), st.integers(1, 200), st.data())
@settings(max_examples=30, deadline=None)
def test_pieces_give_the_bytes_of_the_whole(rows: int, width: int, rank: int, limit: int, data: st.DataObject) -> None:
    """Whatever ranges are read, the same bits; and pieces cover the tensor."""
    import tempfile

    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelglue.checkpoint.adapter.arithmetic.BLOCK_ELEMENTS", data.draw(st.integers(1, 300)))
        base = TensorsCheckpoint({"m.weight": randn(rows, width, dtype=torch.bfloat16)})
        adapted = open_adapted(base, [write_adapter(Path(home) / "a", linear("m", rows, width, rank), r=rank)], "base+a")
        whole = adapted.read("m.weight").clone()
        pieces = adapted.pieces("m.weight", limit)
        assert torch.equal(torch.cat([adapted.read("m.weight", *piece).clone() for piece in pieces]), whole)
        assert [start for start, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
        start, stop = sorted(data.draw(st.tuples(st.integers(0, rows * width), st.integers(0, rows * width))))
        out = torch.empty(stop - start, dtype=torch.bfloat16)
        assert adapted.read("m.weight", start, stop, out) is out
        assert torch.equal(out, whole[start:stop])
        expected = base.tensor("m.weight").double() + update(linear("m", rows, width, rank), "m")
        torch.testing.assert_close(whole.view(rows, width).double(), expected, rtol=2**-7, atol=1e-4)


@given(st.integers(1, 5), st.integers(6, 12), st.integers(6, 12))
@settings(max_examples=15, deadline=None)
def test_the_change_has_no_higher_rank_than_the_adapter(rank: int, rows: int, width: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        base = TensorsCheckpoint({"m.weight": randn(rows, width).double()})
        adapted = open_adapted(base, [write_adapter(Path(home) / "a", linear("m", rows, width, rank), r=rank)], "base+a")
        assert torch.linalg.matrix_rank(adapted.tensor("m.weight") - base.tensor("m.weight"), rtol=1e-9) <= rank


def test_zero_b_and_zero_scale_change_no_bit(tmp_path: Path) -> None:
    """Not even the sign of a zero, nor a NaN of the base."""
    special = torch.tensor([[-0.0, math.nan, math.inf, 1e-42, 0.0]]).expand(6, 5).contiguous()
    base = without(base_model(), f"{Q}.weight")
    base = TensorsCheckpoint({**{n: base.tensor(n) for n in base.names()}, f"{Q}.weight": special})
    tensors = linear(Q, 6, 5)
    zero = write_adapter(tmp_path / "zero", {**tensors, f"{Q}.lora_B.weight": torch.zeros(6, 4)})
    for adapted in (
        open_adapted(base, [zero], "base+zero"),
        open_adapted(base, [write_adapter(tmp_path / "a", tensors)], "base+a", scales=[0.0]),
    ):
        assert torch.equal(adapted.tensor(f"{Q}.weight").view(torch.int32), special.view(torch.int32))


def test_several_adapters_are_summed_in_order_with_their_scales(tmp_path: Path) -> None:
    base, first, second = base_model(), linear(Q, 6, 5), {**linear(Q, 6, 5, 2, seed=7), **linear(V, 3, 5, 2, seed=8)}
    folders = [write_adapter(tmp_path / "a", first), write_adapter(tmp_path / "b", second, r=2, lora_alpha=6)]
    adapted = open_adapted(base, folders, "base+a+b", scales=[0.5, -1.0])
    near(adapted.tensor(f"{Q}.weight"), base.tensor(f"{Q}.weight") + 0.5 * update(first, Q) - 3 * update(second, Q))
    near(adapted.tensor(f"{V}.weight"), base.tensor(f"{V}.weight") - 3 * update(second, V))
    assert [factors.scale for factors in adapted.factors(f"{Q}.weight")] == [0.5, -3.0]


def test_layers_stored_in_out_are_told_by_the_config_and_by_their_shape(tmp_path: Path) -> None:
    base = TensorsCheckpoint({"c_attn.weight": randn(5, 6), "square.weight": randn(5, 5), "head.weight": randn(6, 5)})
    tensors = {**linear("c_attn", 6, 5), **linear("square", 5, 5), **linear("head", 6, 5)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)], "base+a")
    near(adapted.tensor("c_attn.weight"), base.tensor("c_attn.weight") + update(tensors, "c_attn").T)
    near(adapted.tensor("square.weight"), base.tensor("square.weight") + update(tensors, "square").T)
    near(adapted.tensor("head.weight"), base.tensor("head.weight") + update(tensors, "head"))
    adapted = open_adapted(base, [write_adapter(tmp_path / "b", tensors)], "base+b")
    near(adapted.tensor("c_attn.weight"), base.tensor("c_attn.weight") + update(tensors, "c_attn").T)
    near(adapted.tensor("square.weight"), base.tensor("square.weight") + update(tensors, "square"))


def test_square_layers_of_a_class_that_stores_them_in_out_whatever_the_config_says(tmp_path: Path) -> None:
    """PEFT writes the setting of the last layer it has met: an adapter of a GPT-2 classifier's blocks and head says no of both."""
    attn, score = "transformer.h.0.attn.c_proj", "score"
    tensors = {**linear(attn, 5, 5), **linear(score, 5, 5), **linear("x", 4, 5)}
    base = TensorsCheckpoint({f"{attn}.weight": randn(5, 5), "score.weight": randn(5, 5), "x.weight": randn(5, 4)}, {"model_type": "gpt2"})
    for says in (False, True):
        adapted = open_adapted(base, [write_adapter(tmp_path / str(says), tensors, fan_in_fan_out=says)], "base+a")
        near(adapted.tensor(f"{attn}.weight"), base.tensor(f"{attn}.weight") + update(tensors, attn).T)
        near(adapted.tensor("score.weight"), base.tensor("score.weight") + update(tensors, score))
        assert adapted.warnings == ()
    unknown = TensorsCheckpoint({name: base.tensor(name) for name in base.names()})
    adapted = open_adapted(unknown, [tmp_path / "False"], "base+a")
    near(adapted.tensor(f"{attn}.weight"), base.tensor(f"{attn}.weight") + update(tensors, attn))
    (warning,) = adapted.warnings
    assert "'score.weight' is square" in warning
    assert "but 'x.weight' is stored the other way round. Check fan_in_fan_out" in warning


def test_convolutions(tmp_path: Path) -> None:
    base = TensorsCheckpoint({"c.weight": randn(6, 4, 3, 3), "d.weight": randn(6, 4, 3)})
    tensors = {"c.lora_A.weight": randn(2, 4, 3, 3, seed=1), "c.lora_B.weight": randn(6, 2, 1, 1, seed=2)}
    tensors |= {"d.lora_A.weight": randn(2, 4, 3, seed=3), "d.lora_B.weight": randn(6, 2, 1, seed=4)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, r=2)], "base+a")
    for name in "cd":
        added = tensors[f"{name}.lora_B.weight"].flatten(1) @ tensors[f"{name}.lora_A.weight"].flatten(1)
        near(adapted.tensor(f"{name}.weight"), base.tensor(f"{name}.weight") + added.view(base.info(f"{name}.weight").shape))


def test_biases_move_with_the_scale(tmp_path: Path) -> None:
    base, tensors = base_model(), {**linear(Q, 6, 5), f"{Q}.lora_B.bias": randn(6, seed=9)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, lora_alpha=12, lora_bias=True)], "base+a")
    near(adapted.tensor(f"{Q}.bias"), base.tensor(f"{Q}.bias") + 3 * tensors[f"{Q}.lora_B.bias"])
    assert changed(adapted, base) == [f"{Q}.bias", f"{Q}.weight"]
    assert adapted.warnings == ()
    quiet = open_adapted(base, [write_adapter(tmp_path / "b", tensors, lora_alpha=12)], "base+b")
    assert torch.equal(quiet.tensor(f"{Q}.bias"), adapted.tensor(f"{Q}.bias"))
    assert "though lora_bias is not set" in quiet.warnings[0]


# -- DoRA -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_dora_sets_the_norms_of_rows(tmp_path: Path, suffix: str) -> None:
    base, tensors, norms = base_model(), linear(Q, 6, 5), 1 + torch.rand(6, generator=torch.Generator().manual_seed(1))
    folder = write_adapter(tmp_path / "a", {**tensors, f"{Q}.lora_magnitude_vector{suffix}": norms}, use_dora=True, lora_alpha=8)
    adapted = open_adapted(base, [folder], "base+a")
    moved = base.tensor(f"{Q}.weight") + 2 * update(tensors, Q)
    near(adapted.tensor(f"{Q}.weight"), norms[:, None] * moved / moved.norm(dim=1, keepdim=True))
    near(adapted.tensor(f"{Q}.weight").norm(dim=1), norms)
    assert adapted.splittable(f"{Q}.weight")


def test_dora_sets_the_norms_of_columns_where_layers_are_stored_in_out(tmp_path: Path) -> None:
    base, tensors, norms = TensorsCheckpoint({"c.weight": randn(5, 6)}), linear("c", 6, 5), torch.linspace(1, 2, 6)
    folder = write_adapter(tmp_path / "a", {**tensors, "c.lora_magnitude_vector": norms}, use_dora=True, fan_in_fan_out=True)
    adapted = open_adapted(base, [folder], "base+a")
    moved = base.tensor("c.weight") + update(tensors, "c").T
    near(adapted.tensor("c.weight"), norms * moved / moved.norm(dim=0))
    near(adapted.read("c.weight", 7, 20), adapted.tensor("c.weight").flatten()[7:20])
    assert not adapted.splittable("c.weight")


def test_dora_of_embeddings_sets_the_norms_of_columns(tmp_path: Path) -> None:
    base, norms = base_model(), torch.linspace(1, 2, 5)
    A, B = randn(4, 9, seed=1), randn(5, 4, seed=2)
    tensors = {f"{EMBEDDING}.lora_embedding_A": A, f"{EMBEDDING}.lora_embedding_B": B, f"{EMBEDDING}.lora_magnitude_vector": norms}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, use_dora=True)], "base+a")
    moved = base.tensor(f"{EMBEDDING}.weight") + (B @ A).T
    near(adapted.tensor(f"{EMBEDDING}.weight"), norms * moved / moved.norm(dim=0))


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_cannot_set_the_norm_of_zero(tmp_path: Path, transposed: bool) -> None:
    tensors = {**linear("c", 5, 5), "c.lora_magnitude_vector": torch.ones(5)}
    base = TensorsCheckpoint({"c.weight": -(update(tensors, "c").T if transposed else update(tensors, "c"))})
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, use_dora=True, fan_in_fan_out=transposed)], "base+a")
    with pytest.raises(CheckpointError, match=r"(row|column) 0 of 'c\.weight' is zero, so DoRA cannot set its norm"):
        adapted.tensor("c.weight")


def test_dora_is_alone_and_not_scaled(tmp_path: Path) -> None:
    dora = write_adapter(tmp_path / "dora", {**linear(Q, 6, 5), f"{Q}.lora_magnitude_vector": torch.ones(6)}, use_dora=True)
    plain = write_adapter(tmp_path / "plain", linear(Q, 6, 5))
    with pytest.raises(CheckpointError, match=r"dora: is a DoRA adapter, which sets the norms .* Give it alone\."):
        open_adapted(base_model(), [plain, dora], "base+plain+dora")
    with pytest.raises(CheckpointError, match=r"dora: is a DoRA adapter, whose strength cannot be scaled"):
        open_adapted(base_model(), [dora], "base+dora", scales=[0.5])


# -- replaced tensors, embeddings, tokens --------------------------------------------------------------------------------------------


def test_embeddings_are_updated_after_the_saved_copy_of_the_base_layer(tmp_path: Path) -> None:
    base, new = base_model(config={"vocab_size": 9, "tie_word_embeddings": False}), randn(11, 5, seed=20)
    A, B = randn(4, 11, seed=21), randn(5, 4, seed=22)
    tensors = {f"{EMBEDDING}.base_layer.weight": new, f"{EMBEDDING}.lora_embedding_A": A, f"{EMBEDDING}.lora_embedding_B": B}
    tensors |= {f"{HEAD}.base_layer.weight": randn(11, 5, seed=23), **linear(HEAD, 11, 5, seed=24)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, lora_alpha=8)], "base+a")
    near(adapted.tensor(f"{EMBEDDING}.weight"), new + 2 * (B @ A).T)
    near(adapted.tensor(f"{HEAD}.weight"), tensors[f"{HEAD}.base_layer.weight"] + 2 * update(tensors, HEAD))
    assert adapted.config == {"vocab_size": 11, "tie_word_embeddings": False}


@pytest.mark.parametrize("key", ["model.norm.weight", "model.norm.modules_to_save.default.weight"])
def test_modules_to_save_replace(tmp_path: Path, key: str) -> None:
    base, new = base_model(torch.bfloat16), randn(5, seed=30)
    tensors = {key: new, "model.norm.original_module.weight": torch.zeros(5), f"{Q}.bias": randn(6, seed=31)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, modules_to_save=["norm"], bias="all")], "base+a")
    assert torch.equal(adapted.tensor("model.norm.weight"), new.bfloat16())
    assert torch.equal(adapted.tensor(f"{Q}.bias"), tensors[f"{Q}.bias"].bfloat16())
    assert changed(adapted, base) == [f"{Q}.bias", "model.norm.weight"]
    assert not adapted.computed("model.norm.weight")
    assert adapted.pieces("model.norm.weight", 2) == [(0, 2), (2, 4), (4, 5)]


def test_heads_that_the_base_does_not_have_appear(tmp_path: Path) -> None:
    base, new = base_model(), {"score.weight": randn(3, 5), "score.dense.bias": randn(3)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", {**new, **linear(Q, 6, 5)}, modules_to_save=["score"])], "base+a")
    assert set(adapted.names()) == {*base.names(), *new}
    assert torch.equal(adapted.tensor("score.weight"), new["score.weight"])
    assert any("brings 'score.weight', which the base does not have" in warning for warning in adapted.warnings)
    with pytest.raises(CheckpointError, match="adapts 'score', which the base does not have"):
        open_adapted(base, [write_adapter(tmp_path / "b", {**new, **linear(Q, 6, 5)}, modules_to_save=["scores", "score.dense"])], "base+b")


@pytest.mark.parametrize("indices", [[3, 7], {"embed_tokens": [3, 7], "lm_head": [0]}])
def test_trained_tokens_replace_rows(tmp_path: Path, indices: Any) -> None:
    base, rows = base_model(), randn(2, 5, seed=40)
    key = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
    tensors = {key: rows, f"{EMBEDDING}.lora_embedding_A": randn(4, 9, seed=1), f"{EMBEDDING}.lora_embedding_B": randn(5, 4, seed=2)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", {key: rows}, trainable_token_indices=indices)], "base+a")
    expected = base.tensor(f"{EMBEDDING}.weight").clone()
    expected[[3, 7]] = rows
    assert torch.equal(adapted.tensor(f"{EMBEDDING}.weight"), expected)
    both = open_adapted(base, [write_adapter(tmp_path / "b", tensors, trainable_token_indices=indices)], "base+b")
    found = both.tensor(f"{EMBEDDING}.weight")
    assert torch.equal(found[[3, 7]], rows)
    near(
        found[0],
        base.tensor(f"{EMBEDDING}.weight")[0] + (tensors[f"{EMBEDDING}.lora_embedding_B"] @ tensors[f"{EMBEDDING}.lora_embedding_A"])[:, 0],
    )


def test_what_two_adapters_replace_must_be_equal(tmp_path: Path) -> None:
    new = randn(5, seed=30)
    folders = [write_adapter(tmp_path / name, {"model.norm.weight": new + (name == "c")}, modules_to_save=["norm"]) for name in "abc"]
    assert torch.equal(open_adapted(base_model(), folders[:2], "base+a+b").tensor("model.norm.weight"), new)
    with pytest.raises(CheckpointError, match=r"c and .*a: both replace 'model\.norm\.weight', by different values"):
        open_adapted(base_model(), folders, "base+a+b+c")


# -- tied heads -------------------------------------------------------------------------------------------------------------------


def embedding_update(seed: int) -> dict[str, torch.Tensor]:
    return {f"{EMBEDDING}.lora_embedding_A": randn(4, 9, seed=seed), f"{EMBEDDING}.lora_embedding_B": randn(5, 4, seed=seed + 1)}


def test_one_of_a_tied_pair_changes_both(tmp_path: Path) -> None:
    tied = without(base_model(), f"{HEAD}.weight", config={"tie_word_embeddings": True, "vocab_size": 9})
    tensors = embedding_update(1)
    added = (tensors[f"{EMBEDDING}.lora_embedding_B"] @ tensors[f"{EMBEDDING}.lora_embedding_A"]).T
    adapted = open_adapted(tied, [write_adapter(tmp_path / "a", tensors)], "base+a")
    assert adapted.names() == tied.names()
    near(adapted.tensor(f"{EMBEDDING}.weight"), tied.tensor(f"{EMBEDDING}.weight") + added)
    assert adapted.warnings == (
        f"'{EMBEDDING}.weight' is adapted and tied to '{HEAD}.weight', which changes with it; "
        f"PEFT leaves '{HEAD}.weight' as it was while it runs the adapter.",
    )
    head = linear(HEAD, 9, 5)
    adapted = open_adapted(tied, [write_adapter(tmp_path / "b", head)], "base+b")
    assert adapted.names() == tied.names()
    near(adapted.tensor(f"{EMBEDDING}.weight"), tied.tensor(f"{EMBEDDING}.weight") + update(head, HEAD))
    assert adapted.config["tie_word_embeddings"] is True
    # the head is on the disk as well
    twice = TensorsCheckpoint(
        {**{n: tied.tensor(n) for n in tied.names()}, f"{HEAD}.weight": tied.tensor(f"{EMBEDDING}.weight")}, tied.config
    )
    adapted = open_adapted(twice, [tmp_path / "a"], "base+a")
    assert torch.equal(adapted.tensor(f"{HEAD}.weight"), adapted.tensor(f"{EMBEDDING}.weight"))
    assert changed(adapted, twice) == [f"{HEAD}.weight", f"{EMBEDDING}.weight"]


def test_a_tied_pair_that_is_trained_apart_is_untied(tmp_path: Path) -> None:
    tied = without(base_model(), f"{HEAD}.weight", config={"text_config": {"tie_word_embeddings": True}, "vocab_size": 9})
    head = linear(HEAD, 9, 5)
    adapted = open_adapted(tied, [write_adapter(tmp_path / "a", {**embedding_update(1), **head})], "base+a")
    assert set(adapted.names()) == {*tied.names(), f"{HEAD}.weight"}
    near(adapted.tensor(f"{HEAD}.weight"), tied.tensor(f"{EMBEDDING}.weight") + update(head, HEAD))
    assert adapted.config == {"text_config": {"tie_word_embeddings": False}, "vocab_size": 9, "tie_word_embeddings": False}
    assert any("are tied and adapted differently: the output has both, untied" in warning for warning in adapted.warnings)


def test_a_tied_pair_that_is_trained_alike_stays_tied(tmp_path: Path) -> None:
    tied = without(base_model(), f"{HEAD}.weight", config={"tie_word_embeddings": True, "vocab_size": 9})
    same = embedding_update(1)
    same |= {
        f"{HEAD}.lora_A.weight": same[f"{EMBEDDING}.lora_embedding_B"].T,
        f"{HEAD}.lora_B.weight": same[f"{EMBEDDING}.lora_embedding_A"].T,
    }
    adapted = open_adapted(tied, [write_adapter(tmp_path / "a", same)], "base+a")
    assert (adapted.names(), adapted.config, adapted.warnings) == (tied.names(), tied.config, ())
    new = randn(11, 5, seed=3)
    saved = {f"{EMBEDDING}.weight": new, f"{HEAD}.weight": new.clone()}
    adapted = open_adapted(tied, [write_adapter(tmp_path / "b", saved, modules_to_save=["embed_tokens", "lm_head"])], "base+b")
    assert (adapted.names(), adapted.config["vocab_size"]) == (tied.names(), 11)
    assert torch.equal(adapted.tensor(f"{EMBEDDING}.weight"), new)


def test_head_and_embedding_must_go_on_having_equally_many_rows(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {f"{EMBEDDING}.weight": randn(11, 5)}, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"gives 'model\.embed_tokens\.weight' 11 rows and 'lm_head\.weight' 9"):
        open_adapted(base_model(config={"tie_word_embeddings": False}), [folder], "base+a")


# -- stacks of experts --------------------------------------------------------------------------------------------------------------

EXPERTS = "mlp.experts"


def expert_update(A: torch.Tensor, B: torch.Tensor, experts: int) -> torch.Tensor:
    """(experts, out, in), term by term."""
    rank = A.shape[0] // experts
    terms = [
        [torch.outer(B[:, component * experts + expert], A[expert * rank + component]) for component in range(rank)]
        for expert in range(experts)
    ]
    return torch.stack([torch.stack(found).sum(0) for found in terms])


@pytest.mark.parametrize("transposed", [False, True])
def test_several_parameters_of_one_module_are_nested(tmp_path: Path, transposed: bool) -> None:
    """The innermost belongs to the parameter that is registered first; ranks and alphas are looked up by parameter."""
    up, down = randn(3, 10, 8, seed=1), randn(3, 8, 5, seed=2)
    base = TensorsCheckpoint(
        {f"{EXPERTS}.gate_up_proj": up.mT if transposed else up, f"{EXPERTS}.down_proj": down.mT if transposed else down}
    )
    inner = {"A": randn(6, 8, seed=3), "B": randn(10, 6, seed=4)}
    outer = {"A": randn(9, 5, seed=5), "B": randn(8, 9, seed=6)}
    tensors = {f"{EXPERTS}.base_layer.lora_{side}.weight": values for side, values in inner.items()}
    tensors |= {f"{EXPERTS}.lora_{side}.weight": values for side, values in outer.items()}
    config: dict[str, Any] = {"r": 2, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"gate_up_proj": 6}, "lora_alpha": 3}
    targets = [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, target_parameters=targets, **config)], "base+a")
    added = 3 * expert_update(inner["A"], inner["B"], 3)
    near(adapted.tensor(f"{EXPERTS}.gate_up_proj"), base.tensor(f"{EXPERTS}.gate_up_proj") + (added.mT if transposed else added))
    added = expert_update(outer["A"], outer["B"], 3)
    near(adapted.tensor(f"{EXPERTS}.down_proj"), base.tensor(f"{EXPERTS}.down_proj") + (added.mT if transposed else added))
    assert [factors.scale for factors in adapted.factors(f"{EXPERTS}.gate_up_proj")] == [3.0]
    alone = open_adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match="updates one of several parameters, and only a base tells which"):
        alone.factors(EXPERTS)


def test_blocks_respect_the_borders_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.adapter.arithmetic.BLOCK_ELEMENTS", 25)
    base = TensorsCheckpoint({f"{EXPERTS}.up": randn(3, 7, 8)})
    A, B = randn(6, 8, seed=3), randn(7, 6, seed=4)
    tensors = {f"{EXPERTS}.lora_A.weight": A, f"{EXPERTS}.lora_B.weight": B}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, r=2, lora_alpha=2, target_parameters=["experts.up"])], "base+a")
    near(adapted.tensor(f"{EXPERTS}.up"), base.tensor(f"{EXPERTS}.up") + expert_update(A, B, 3))
    assert adapted.pieces(f"{EXPERTS}.up", 24) == [(s * 56 + a, s * 56 + b) for s in range(3) for a, b in ((0, 24), (24, 48), (48, 56))]
    assert adapted.pieces(f"{EXPERTS}.up", 60) == [(0, 56), (56, 112), (112, 168)]
    near(adapted.read(f"{EXPERTS}.up", 50, 130), adapted.tensor(f"{EXPERTS}.up").flatten()[50:130])


def test_square_experts_need_a_word(tmp_path: Path) -> None:
    base = TensorsCheckpoint({f"{EXPERTS}.up": randn(3, 8, 8)})
    A, B = randn(6, 8, seed=3), randn(8, 6, seed=4)
    tensors = {f"{EXPERTS}.lora_A.weight": A, f"{EXPERTS}.lora_B.weight": B}
    config: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.up"]}
    folder = write_adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=r'stack of square matrices.*"modelglue_expert_layout": "out_in" or "in_out"'):
        open_adapted(base, [folder], "base+a")
    for layout, added in (("out_in", expert_update(A, B, 3)), ("in_out", expert_update(A, B, 3).mT)):
        write_config(folder, **config, modelglue_expert_layout=layout)
        adapted = open_adapted(base, [folder], "base+a")
        near(adapted.tensor(f"{EXPERTS}.up"), base.tensor(f"{EXPERTS}.up") + added)
        assert f"is taken as stored {layout.replace('_', ', ')}" in adapted.warnings[0]


def test_a_flat_parameter_is_a_linear_layer(tmp_path: Path) -> None:
    base, tensors = TensorsCheckpoint({"m.in_proj": randn(6, 5), "m.bias": randn(3)}), linear("m", 6, 5)
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, target_parameters=["m.in_proj"])], "base+a")
    near(adapted.tensor("m.in_proj"), base.tensor("m.in_proj") + update(tensors, "m"))


# -- names ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q", "layers.0.q"),
        ("h.0.q", "transformer.h.0.q"),
        ("model.layers.0.q", "model.language_model.layers.0.q"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
    ],
)
def test_another_prefix_is_found_and_reported(tmp_path: Path, theirs: str, ours: str) -> None:
    base, tensors = TensorsCheckpoint({f"{ours}.weight": randn(6, 5), "other.weight": randn(2)}), linear(theirs, 6, 5)
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors)], "base+a")
    near(adapted.tensor(f"{ours}.weight"), base.tensor(f"{ours}.weight") + update(tensors, theirs))
    assert adapted.warnings == (f"{tmp_path}/a: its modules are called otherwise in the base: '{theirs}' is taken for '{ours}'.",)


def test_every_tower_may_have_a_prefix_of_its_own(tmp_path: Path) -> None:
    """Live models of several towers call their modules otherwise than their files, each tower in its own way; heads as well."""
    q, fc, head = "layers.0.q", "encoder.fc", "lm_head"
    shapes = {f"language_model.model.{q}": (6, 5), f"vision_tower.{fc}": (3, 2), f"language_model.{head}": (9, 6)}
    base = TensorsCheckpoint({f"{module}.weight": randn(*shape) for module, shape in shapes.items()})
    text, image, new = linear(f"model.language_model.{q}", 6, 5), linear(f"model.vision_tower.{fc}", 3, 2), randn(9, 6, seed=9)
    saved = {f"{head}.weight": new, "score.weight": randn(2, 6)}
    for number, tensors in enumerate(({**text, **image, **saved}, {**text, **saved})):
        adapter = write_adapter(tmp_path / str(number), tensors, modules_to_save=[head, "score"])
        adapted = open_adapted(base, [adapter], "base+a")
        near(
            adapted.tensor(f"language_model.model.{q}.weight"),
            base.tensor(f"language_model.model.{q}.weight") + update(text, f"model.language_model.{q}"),
        )
        expected = base.tensor(f"vision_tower.{fc}.weight") + (update(image, f"model.vision_tower.{fc}") if number == 0 else 0)
        near(adapted.tensor(f"vision_tower.{fc}.weight"), expected)
        assert torch.equal(adapted.tensor(f"language_model.{head}.weight"), new)
        assert set(adapted.names()) == {*base.names(), "score.weight"}


@pytest.mark.parametrize("how", ["updated", "saved"])
@pytest.mark.parametrize(("live", "file"), [("lm_head", "embed_out"), ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate")])
def test_modules_that_the_files_of_a_class_call_otherwise(tmp_path: Path, live: str, file: str, how: str) -> None:
    base = TensorsCheckpoint({f"{file}.weight": randn(6, 5), "model.norm.weight": randn(5)})
    tensors = linear(live, 6, 5) if how == "updated" else {f"{live}.weight": randn(6, 5, seed=3)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, modules_to_save=[live] if how == "saved" else None)], "base+a")
    expected = base.tensor(f"{file}.weight") + update(tensors, live) if how == "updated" else tensors[f"{live}.weight"]
    near(adapted.tensor(f"{file}.weight"), expected)
    assert (adapted.names(), adapted.warnings) == (base.names(), ())


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("WhisperForConditionalGeneration", "proj_out"), ("BertForMaskedLM", "cls.predictions.decoder"),
        ("RobertaForMaskedLM", "lm_head.decoder"), ("LlamaForCausalLM", "lm_head"),
    ],
)  # fmt: skip
def test_tied_heads_have_the_names_of_their_class(tmp_path: Path, kind: str, head: str) -> None:
    tied = without(base_model(), f"{HEAD}.weight", config={"architectures": [kind], "tie_word_embeddings": True, "vocab_size": 9})
    tensors = linear(head, 9, 5)
    adapted = open_adapted(tied, [write_adapter(tmp_path / "a", tensors)], "base+a")
    assert changed(adapted, tied) == [f"{EMBEDDING}.weight"]
    near(adapted.tensor(f"{EMBEDDING}.weight"), tied.tensor(f"{EMBEDDING}.weight") + update(tensors, head))


def test_a_classifier_has_no_head_that_is_tied(tmp_path: Path) -> None:
    config = {"architectures": ["BertForSequenceClassification"], "vocab_size": 9}
    classifier = without(base_model(), f"{HEAD}.weight", config=config)
    adapted = open_adapted(classifier, [write_adapter(tmp_path / "a", embedding_update(1))], "base+a")
    assert (adapted.warnings, changed(adapted, classifier)) == ((), [f"{EMBEDDING}.weight"])


def test_two_possible_prefixes_are_refused(tmp_path: Path) -> None:
    base = TensorsCheckpoint({"text.layers.0.q.weight": randn(6, 5), "image.layers.0.q.weight": randn(6, 5)})
    with pytest.raises(CheckpointError, match=r"it could be 'image\.layers\.0\.q' or 'text\.layers\.0\.q'"):
        open_adapted(base, [write_adapter(tmp_path / "a", linear("layers.0.q", 6, 5))], "base+a")


def test_keys_of_raw_state_dicts(tmp_path: Path) -> None:
    """With the adapter's name inside, and without PEFT's prefix."""
    base, tensors = base_model(), linear(Q, 6, 5)
    raw = {name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): values for name, values in tensors.items()}
    raw |= {f"{EMBEDDING}.lora_embedding_A.default": randn(4, 9), f"{EMBEDDING}.lora_embedding_B.default": randn(5, 4)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", raw, prefix="")], "base+a")
    near(adapted.tensor(f"{Q}.weight"), base.tensor(f"{Q}.weight") + update(tensors, Q))
    assert changed(adapted, base) == [f"{EMBEDDING}.weight", f"{Q}.weight"]
    raw[f"{V}.lora_A.other.weight"], raw[f"{V}.lora_B.other.weight"] = randn(4, 5), randn(3, 4)
    with pytest.raises(CheckpointError, match="holds several adapters: 'default', 'other'"):
        open_adapter(write_adapter(tmp_path / "b", raw))


# -- as a checkpoint --------------------------------------------------------------------------------------------------------------


def test_shards_and_pickles_are_read_as_one_file_is(tmp_path: Path) -> None:
    base, tensors = base_model(), {**linear(Q, 6, 5), **linear(V, 3, 5, seed=3)}
    expected = open_adapted(base, [write_adapter(tmp_path / "one", tensors)], "base+one")
    keys = sorted(tensors)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    files = {key: f"adapter_model-0000{1 + (number > 1)}-of-00002.safetensors" for number, key in enumerate(keys)}
    for file in set(files.values()):
        save_file({PREFIX + key: tensors[key] for key in keys if files[key] == file}, sharded / file)
    index = {"weight_map": {PREFIX + key: file for key, file in files.items()}}
    (sharded / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    write_config(sharded)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({PREFIX + key: values for key, values in tensors.items()}, pickled / "adapter_model.bin")
    write_config(pickled)
    for folder in (sharded, pickled):
        adapted = open_adapted(base, [folder], "base+a")
        for name in (f"{Q}.weight", f"{V}.weight"):
            assert torch.equal(adapted.tensor(name), expected.tensor(name)), folder
        assert adapted.identity == expected.identity


def test_identity_and_stamp_follow_base_adapters_config_and_scales(tmp_path: Path) -> None:
    tensors = linear(Q, 6, 5)
    a = write_adapter(tmp_path / "a", tensors)
    b = write_adapter(tmp_path / "b", {**tensors, f"{Q}.lora_B.weight": randn(6, 4, seed=77)})
    c = write_adapter(tmp_path / "c", tensors, lora_alpha=5)
    base = base_model()
    expressions = [
        base,
        open_adapted(base_model(torch.bfloat16), [a], "x"),
        *(open_adapted(base, folders, "x") for folders in ([a], [b], [c], [a, b], [b, a])),
    ]
    expressions.append(open_adapted(base, [a], "x", scales=[2.0]))
    for attribute in ("identity", "stamp"):
        assert len({getattr(one, attribute) for one in expressions}) == len(expressions)
        assert getattr(open_adapted(base, [a], "y"), attribute) == getattr(expressions[2], attribute)
    copy = write_adapter(tmp_path / "copy", tensors)
    assert open_adapted(base, [copy], "x").identity == expressions[2].identity
    assert open_adapted(base, [copy], "x").stamp != expressions[2].stamp


def test_it_is_opened_by_reference_and_saved_like_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model(torch.bfloat16, config={"vocab_size": 9})
    write_single(tmp_path / "base", {name: base.tensor(name) for name in base.names()}, config={"vocab_size": 9})
    tensors = {**linear(Q, 6, 5), f"{HEAD}.weight": randn(9, 5, seed=3), **linear(V, 3, 5)}
    write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"])
    monkeypatch.chdir(tmp_path)
    adapted = open_checkpoint("base+a")
    assert isinstance(adapted, AdaptedCheckpoint)
    assert adapted.describe() == {"model": "base+a"}
    assert [place.resolve() for place in adapted.places] == [tmp_path / "base", tmp_path / "a"]
    expected = {name: adapted.tensor(name).clone() for name in adapted.names()}
    for workers in (1, 2):
        save(pickle.loads(pickle.dumps(adapted)), f"out/{workers}", workers=workers, chunk=7)
        found = SafetensorsCheckpoint(tmp_path / "out" / str(workers))
        assert {name: found.tensor(name).tolist() for name in found.names()} == {name: values.tolist() for name, values in expected.items()}
    assert "model: ../../base+../../a" in (tmp_path / "out" / "1" / "modelglue_recipe.yaml").read_text()
    for target in ("a", "a/inside"):
        with pytest.raises(UserError, match=r"the model 'base\+a'"):
            save(adapted, target, overwrite=True)


def test_the_tokenizer_is_the_adapters_if_it_has_one(tmp_path: Path) -> None:
    base = base_model()
    write_single(tmp_path / "base", {name: base.tensor(name) for name in base.names()})
    for name in ("tokenizer.json", "vocab.json", "generation_config.json", "LICENSE"):
        (tmp_path / "base" / name).write_text("base")
    opened = SafetensorsCheckpoint(tmp_path / "base")
    folder = write_adapter(tmp_path / "a", linear(Q, 6, 5))
    (folder / "chat_template.jinja").write_text("adapter")
    assert open_adapted(opened, [folder], "base+a").files == opened.files
    (folder / "tokenizer.json").write_text("adapter")
    found = open_adapted(opened, [folder], "base+a").files
    places = {"chat_template.jinja": "a", "tokenizer.json": "a", "generation_config.json": "base", "LICENSE": "base"}
    assert found == {name: tmp_path / place / name for name, place in places.items()}


@pytest.mark.parametrize(("home", "parts"), [("mlp", ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2"))])
def test_stacks_whose_experts_stand_one_by_one_on_the_disk(tmp_path: Path, home: str, parts: tuple[str, str, str]) -> None:
    """Live models hold gate and up of all experts in one parameter; files do not, and some call the module otherwise."""
    gate, up, down = parts
    shapes = {gate: (5, 8), up: (5, 8), down: (8, 5)}
    base = TensorsCheckpoint(
        {f"l.{home}.experts.{expert}.{part}.weight": randn(*shapes[part], seed=expert) for expert in range(3) for part in parts}
    )
    inner, outer = {"A": randn(6, 8, seed=3), "B": randn(10, 6, seed=4)}, {"A": randn(6, 5, seed=5), "B": randn(8, 6, seed=6)}
    tensors = {f"l.mlp.experts.base_layer.lora_{side}.weight": values for side, values in inner.items()}
    tensors |= {f"l.mlp.experts.lora_{side}.weight": values for side, values in outer.items()}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors, r=2, lora_alpha=4, target_parameters=targets)], "base+a")
    assert changed(adapted, base) == list(base.names())
    fused, lower = 2 * expert_update(inner["A"], inner["B"], 3), 2 * expert_update(outer["A"], outer["B"], 3)
    for expert in range(3):
        for part, added in ((gate, fused[expert, :5]), (up, fused[expert, 5:]), (down, lower[expert])):
            name = f"l.{home}.experts.{expert}.{part}.weight"
            near(adapted.tensor(name), base.tensor(name) + added)
