"""Tiny random models of many classes: what each needs to be built, and something to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

_IDS = torch.tensor([[1, 7, 9, 33, 12, 5], [1, 60, 21, 52, 43, 4]])
_VOCABULARY: Mapping[str, Any] = {
    "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
_SIZES: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_DECODER: Mapping[str, Any] = {**_VOCABULARY, **_SIZES, "num_key_value_heads": 2}
_BERT: Mapping[str, Any] = {"vocab_size": 64, "initializer_range": 0.3, **_SIZES}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, the config that makes it tiny, and arguments for one forward pass."""

    kind: str
    model_type: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=lambda: {"input_ids": _IDS})

    def random(self, seed: int, dtype: torch.dtype = torch.float32) -> Any:
        """A model of this class with random weights; biases and norms are random too, which initialisation leaves at 0 and 1."""
        model = getattr(transformers, self.kind)(AutoConfig.for_model(self.model_type, **self.config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.2 * torch.randn(value.shape, generator=generator)
        return model.to(dtype).eval()

    def saved(self, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
        """The folder as transformers writes it."""
        self.random(seed, dtype).save_pretrained(folder)
        return folder

    def loaded(self, folder: Path) -> Any:
        """The model as transformers loads it; nothing missing, nothing left over, no shape changed."""
        kind = getattr(transformers, self.kind)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        assert not any(report.values()), report
        return model.eval()

    def logits(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(**self.inputs).logits
        return logits


def _pictures(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count * 3 * 8 * 8).view(count, 3, 8, 8).sin()


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", _DECODER),
    "llama-tied": Architecture("LlamaForCausalLM", "llama", {**_DECODER, "tie_word_embeddings": True}),
    "llama-biased": Architecture("LlamaForCausalLM", "llama", {**_DECODER, "attention_bias": True, "mlp_bias": True}),
    "mistral": Architecture("MistralForCausalLM", "mistral", {**_DECODER, "sliding_window": 6}),
    "mixtral": Architecture("MixtralForCausalLM", "mixtral", {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", {**_DECODER, "head_dim": 4}),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            **_DECODER, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1,
        },
    ),
    "gemma": Architecture("GemmaForCausalLM", "gemma", {**_DECODER, "head_dim": 4}),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", {**_DECODER, "head_dim": 4, "sliding_window": 6}),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", "gpt_neox", {**_VOCABULARY, **_SIZES}),
    "gpt2": Architecture("GPT2LMHeadModel", "gpt2", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _DECODER),
    "mamba": Architecture("MambaForCausalLM", "mamba", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "t5",
        {
            "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        },
        {"input_ids": _IDS, "decoder_input_ids": _IDS[:, :4]},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "whisper",
        {
            "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 16,
            "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32), "decoder_input_ids": _IDS},
    ),
    "bert": Architecture("BertForMaskedLM", "bert", _BERT),
    "bert-classifier": Architecture("BertForSequenceClassification", "bert", _BERT),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 16,
            },
            "image_token_id": 63, "vision_feature_layer": -1,
        },
        {"input_ids": torch.tensor([[1, 63, 63, 63, 63, 9, 5]]), "pixel_values": _pictures(1)},
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": {**_DECODER, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
            "vision_config": {
                "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "image_token_id": 63, "vision_start_token_id": 60, "vision_end_token_id": 61, "video_token_id": 62,
        },
    ),
}  # fmt: skip
