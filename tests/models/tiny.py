"""Tiny random models of several architectures, and tokenizers whose tokens are easy to reason about."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_COMMON = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}
_LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip

#: name -> (model_type, what its config needs to be tiny)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 4}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "mistral-window": ("mistral", {**_LLAMA, "sliding_window": 6}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 24}),
}  # fmt: skip


def config(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of one of CONFIGS."""
    kind, values = CONFIGS[name]
    return {"model_type": kind, **_COMMON, **values, **changes}


def random_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with random weights, in evaluation mode."""
    values = config(name, **changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32).eval()


def random_dense(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A small decoder of any class that is built like Llama; norms and biases are random too, so that none may be mistaken for another."""
    values = copy.deepcopy({**_COMMON, **_LLAMA, "tie_word_embeddings": False, **changes})  # configs write into what they are given
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def saved_model(folder: Path, name: str, seed: int = 0, *, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """A folder as transformers writes it, with a tokenizer where one is given."""
    random_model(name, seed, **changes).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789:=.,?!"


@cache
def letters() -> PreTrainedTokenizerFast:
    """One token per character, `<s>` in front: 48 tokens."""
    return _tokenizer({token: number for number, token in enumerate([*SPECIAL, *LETTERS])}, begin=True)


@cache
def pieces(*, begin: bool = True) -> PreTrainedTokenizerFast:
    """Letters, and a few longer tokens: "ab", "abc", ".x", " q", "b\\nc"; 54 tokens with the unused "<>"."""
    words = [*SPECIAL, *LETTERS, "ab", "abc", ".x", " q", "b\nc", "<>"]
    return _tokenizer({token: number for number, token in enumerate(words)}, begin=begin, pattern=r"abc|ab|\.x| q|b\nc|[\s\S]")


@cache
def bytes_() -> PreTrainedTokenizerFast:
    """One token per byte, as in GPT-2: a character may be several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate([*SPECIAL, *alphabet])}, []))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def marked() -> PreTrainedTokenizerFast:
    """Words with a mark for the blank before them, and bytes for what is no word, as in Llama 2; 12 tokens."""
    words = [*SPECIAL, "\u2581", "\u2581a", "\u2581b", "a", "b", "<0x0A>", "<0xC3>", "<0xA9>"]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(words)}, [], byte_fallback=True))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _tokenizer(vocabulary: dict[str, int], *, begin: bool, pattern: str = r"[\s\S]") -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.decoder = decoders.Fuse()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bigram_model(follows: dict[str, str], tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Any:
    """A Llama that writes `follows[t]` after token t, and its end-of-text token after any other.

    Attention and feed-forward add nothing, embeddings are unit vectors, and the head maps every one to its successor.
    """
    size = len(tokenizer) + len(tokenizer) % 2  # rotary embeddings need an even width
    shape = {"vocab_size": size, "hidden_size": size, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = random_model("llama", **{**shape, **changes})
    head = torch.zeros(size, size)
    for token, number in tokenizer.get_vocab().items():
        head[tokenizer.convert_tokens_to_ids(follows.get(token, "</s>")), number] = 1.0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(head)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model
