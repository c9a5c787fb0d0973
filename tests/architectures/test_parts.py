"""Parts of models, stacks inside modules and adapters: what is written loads, and computes what the same done to live models does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelglue
from modelglue.checkpoint import save
from tests.adapters.on_disk import linear, update, write_adapter
from tests.architectures.tiny import ARCHITECTURES, Architecture

LLAMA, QWEN2 = (
    ARCHITECTURES["llama"],
    replace(ARCHITECTURES["qwen2"], config={**ARCHITECTURES["qwen2"].config, "tie_word_embeddings": False}),
)


def written(recipe: Mapping[str, Any], architecture: Architecture, out: Path) -> Any:
    """The merge, saved and loaded by transformers."""
    save(modelglue.merge(recipe), out)
    return architecture.loaded(out)


def same(found: Any, expected: Any, architecture: Architecture, *others: Any) -> None:
    """Equal logits, which the `others` do not have."""
    logits = architecture.logits(expected)
    torch.testing.assert_close(architecture.logits(found), logits, rtol=1e-4, atol=1e-4)
    for other in others:
        assert float((architecture.logits(other) - logits).abs().max()) > 0.05


def mix(places: nn.Module, modules: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """Give a module the weighted sum of the parameters of others."""
    found = [dict(module.named_parameters()) for module in modules]
    with torch.no_grad():
        for name, place in places.named_parameters():
            place.copy_(sum(weight * parameters[name] for weight, parameters in zip(weights, found, strict=True)))


@pytest.mark.parametrize(
    ("name", "plain", "part"),
    [("llava", LLAMA, "language_model"), ("qwen2_vl", QWEN2, {"model": "model", "lm_head": "lm_head"})],
    ids=["llava", "qwen2_vl"],
)
def test_a_language_tower_and_a_language_model(name: str, plain: Architecture, part: Any, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    vlm, llm = architecture.saved(tmp_path / "vlm", 1), plain.saved(tmp_path / "llm", 2)
    whole, language = architecture.loaded(vlm), plain.loaded(llm)
    models = [{"model": str(vlm), "part": part, "weight": 0.7}, {"model": str(llm), "weight": 0.3}]
    recipe = {"method": "linear", "base": str(llm), "models": models}
    hand, hand_alone = architecture.loaded(vlm), plain.loaded(llm)
    for model, body in ((hand, hand.model.language_model), (hand_alone, hand_alone.model)):
        mix(body, [whole.model.language_model, language.model], (0.7, 0.3))
        mix(model.lm_head, [whole.lm_head, language.lm_head], (0.7, 0.3))

    same(written(recipe, plain, tmp_path / "alone"), hand_alone, plain, language)
    into = {"model": str(vlm), "part": part}
    same(written({**recipe, "into": into}, architecture, tmp_path / "out"), hand, architecture, whole)


def test_stacks_in_the_modules_of_t5(tmp_path: Path) -> None:
    """Encoder: layer 0 of one, layer 1 of the other, layer 1 of the one; decoder: two layers merged, one of the other alone."""
    architecture = ARCHITECTURES["t5"]
    folders = [str(architecture.saved(tmp_path / f"parent{seed}", seed)) for seed in (1, 2)]
    one, two = (architecture.loaded(Path(folder)) for folder in folders)

    def slice_(*entries: tuple[int, list[int], float]) -> dict[str, Any]:
        return {"models": [{"model": folders[model], "layers": layers, "weight": weight} for model, layers, weight in entries]}

    encoder = [slice_((0, [0, 1], 1)), slice_((1, [1, 2], 1)), slice_((0, [1, 2], 1))]
    decoder = [slice_((0, [0, 2], 0.25), (1, [0, 2], 0.75)), slice_((1, [2, 3], 1))]
    recipe = {"method": "linear", "modules": {"encoder": {"slices": encoder}, "decoder": {"slices": decoder}}}
    hand = replace(architecture, config={**architecture.config, "num_layers": 3}).random(99)
    mix(hand.shared, [one.shared], [1])
    for place, source in zip(hand.encoder.block, (one.encoder.block[0], two.encoder.block[1], one.encoder.block[1]), strict=True):
        mix(place, [source], [1])
    mix(hand.encoder.final_layer_norm, [one.encoder.final_layer_norm], [1])
    for number in range(2):
        mix(hand.decoder.block[number], [one.decoder.block[number], two.decoder.block[number]], (0.25, 0.75))
    mix(hand.decoder.block[2], [two.decoder.block[2]], [1])
    mix(hand.decoder.final_layer_norm, [two.decoder.final_layer_norm], [1])
    same(written(recipe, architecture, tmp_path / "out"), hand, architecture, one, two)


def test_a_stack_in_one_module_of_whisper(tmp_path: Path) -> None:
    """The decoder doubles its last layer at half strength; the encoder is merged whole."""
    architecture = ARCHITECTURES["whisper"]
    folders = [str(architecture.saved(tmp_path / f"parent{seed}", seed)) for seed in (1, 2)]
    one, two = (architecture.loaded(Path(folder)).model for folder in folders)
    quiet = [{"filter": "out_proj", "value": 0.5}, {"filter": "fc2", "value": 0.5}, {"value": 1}]
    last = {"models": [{"model": folders[0], "layers": [1, 2], "weight": quiet}], "parameters": {"normalize": False}}
    decoder = [{"models": [{"model": folders[0], "layers": [0, 2], "weight": 1}]}, last]
    encoder = [{"model": folders[0], "weight": 0.5}, {"model": folders[1], "weight": 0.5}]
    recipe = {"method": "linear", "modules": {"encoder": {"models": encoder}, "decoder": {"slices": decoder}}}
    hand = replace(architecture, config={**architecture.config, "decoder_layers": 3}).random(99)
    mix(hand.model.encoder, [one.encoder, two.encoder], (0.5, 0.5))
    for name in ("embed_tokens", "embed_positions", "layer_norm"):
        mix(getattr(hand.model.decoder, name), [getattr(one.decoder, name)], [1])
    for number, source in enumerate((0, 1, 1)):
        mix(hand.model.decoder.layers[number], [one.decoder.layers[source]], [1])
    with torch.no_grad():
        for name, parameter in hand.model.decoder.layers[2].named_parameters():
            if "out_proj" in name or "fc2" in name:
                parameter *= 0.5
    same(written(recipe, architecture, tmp_path / "out"), hand, architecture, architecture.loaded(Path(folders[0])))


@pytest.mark.parametrize(
    ("name", "module", "shape", "turned"),
    [("llama", "model.layers.1.self_attn.v_proj", (8, 16), False), ("gpt2", "transformer.h.1.attn.c_attn", (48, 16), True)],
)
def test_an_adapted_model_is_merged(name: str, module: str, shape: tuple[int, int], turned: bool, tmp_path: Path) -> None:
    """GPT-2 keeps its matrices as [in, out]; the adapter's product is [out, in] all the same."""
    architecture = ARCHITECTURES[name]
    base, other = (architecture.saved(tmp_path / f"parent{seed}", seed) for seed in (1, 2))
    factors = linear(module, *shape, rank=2, seed=5)
    write_adapter(tmp_path / "adapter", factors, r=2, lora_alpha=6, target_modules=[module.rsplit(".", 1)[1]], fan_in_fan_out=turned)
    models = [{"model": f"{base}+{tmp_path / 'adapter'}", "weight": 0.6}, {"model": str(other), "weight": 0.4}]
    found = written({"method": "linear", "models": models}, architecture, tmp_path / "out")

    adapted = architecture.loaded(base)
    delta = 3 * update(factors, module)
    with torch.no_grad():
        adapted.get_submodule(module).weight += (delta.T if turned else delta).float()
    hand = architecture.random(99)
    mix(hand, [adapted, architecture.loaded(other)], (0.6, 0.4))
    plain = architecture.random(98)
    mix(plain, [architecture.loaded(base), architecture.loaded(other)], (0.6, 0.4))
    same(found, hand, architecture, plain)
