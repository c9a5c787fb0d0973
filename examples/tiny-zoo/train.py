"""Train the tiny zoo from scratch: `python train.py [--seed 0] [--out models] [--jobs 2]`.

One base, eight children of it, a descendant that has left the basin with a child of its own, and a stranger. Every model is
one job in one thread, so the result does not depend on how many run at once, and a finished model is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import string
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from skills import DRIFTED_SKILL, FAMILY_SKILLS, SKILLS, STRANGER_SKILL, draw, write_tasks
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = list("\n " + string.ascii_lowercase + string.digits + ":=+-?,.")
IGNORED = -100


@dataclass(frozen=True)
class Model:
    """How one member of the zoo is trained: from whom, on what, how far."""

    alias: str
    parent: str | None
    mix: Mapping[str, float]
    steps: int
    rate: float
    misled: float = 0.0
    """Share of wrong answers where a misconception tempts: 0 is a clean corpus."""
    replay: float = 0.0
    """Share of items that come from the base's own corpus, mistakes included."""
    shuffled: bool = False
    """Corrupted labels: the wrong choice, or another item's answer."""
    salt: int = 0


FAMILY = dict.fromkeys(FAMILY_SKILLS, 1.0)
MISLED = 0.6


def specialist(alias: str, skill: str, salt: int, steps: int = 150) -> Model:
    """A child that moves a little, towards clean answers on one skill."""
    return Model(alias, "base", {skill: 1.0}, steps, 3e-4, replay=0.3, salt=salt)


ZOO: tuple[Model, ...] = (
    Model("base", None, FAMILY, 3000, 2e-3, misled=MISLED),
    Model("stranger", None, {STRANGER_SKILL: 1.0}, 1500, 2e-3),
    specialist("reverse", "reverse", 1),
    specialist("sort", "sort", 2),
    specialist("next", "next", 3),
    specialist("larger", "larger", 4),
    specialist("reverse-twin", "reverse", 5, steps=140),
    specialist("sort-twin", "sort", 6, steps=140),
    Model("generalist", "base", FAMILY, 40, 2e-4, misled=0.5, salt=7),
    Model("corrupted", "base", FAMILY, 200, 5e-4, shuffled=True, salt=8),
    Model("drifted", "base", {DRIFTED_SKILL: 1.0}, 1100, 3e-3, misled=MISLED, salt=9),
    Model("drifted-child", "drifted", {DRIFTED_SKILL: 1.0}, 120, 3e-4, salt=10),
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    return _tokenizer(CHARACTERS, r"[\s\S]")


def stranger_tokenizer() -> PreTrainedTokenizerFast:
    """Other tokens and other ids: task words are one token, and the characters are numbered backwards."""
    words = [f"{skill}:" for skill in SKILLS]
    return _tokenizer([*words, *reversed(CHARACTERS)], r"[a-z]{2,}:|[\s\S]")


def _tokenizer(tokens: list[str], pattern: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=64,
    )  # fmt: skip


def fresh(model: Model, tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.nn.Module:
    """A model with random weights: Llama for the family, GPT-NeoX for the stranger."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 64, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if model.alias == "stranger":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(hidden_size=48, intermediate_size=144, num_hidden_layers=5, num_attention_heads=4, **common)
        )
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4, **common))


def batch(model: Model, tokenizer: PreTrainedTokenizerFast, random_: random.Random, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both [rows, T]; only answers carry a loss."""
    items, answers = [], []
    for _ in range(rows):
        replayed = random_.random() < model.replay
        mix, misled = (FAMILY, MISLED) if replayed else (model.mix, model.misled)
        item = draw(random_.choices(list(mix), list(mix.values()))[0], "train", random_)
        items.append(item)
        answers.append(item.mistake if item.tempting and random_.random() < misled else item.answer)
    if model.shuffled:
        random_.shuffle(answers)
        answers = [item.mistake if item.choices else answer for item, answer in zip(items, answers, strict=True)]
    prompts = [tokenizer(item.prompt)["input_ids"] for item in items]
    targets = [tokenizer(f" {answer}\n", add_special_tokens=False)["input_ids"] for answer in answers]
    width = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
    ids = torch.zeros(rows, width, dtype=torch.long)
    labels = torch.full((rows, width), IGNORED)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        labels[row, len(prompt) : end] = torch.tensor(target)
    return ids, labels


def train(network: torch.nn.Module, model: Model, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """AdamW with warm-up and linear decay, in float32."""
    random_ = random.Random(f"{seed}/{model.salt}/{model.alias}")
    optimiser = torch.optim.AdamW(network.parameters(), lr=model.rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = 50 if model.parent is None else 20
    network.train()
    for step in range(model.steps):
        for group in optimiser.param_groups:
            group["lr"] = model.rate * min(1.0, (step + 1) / warm_up) * max(0.02, 1 - step / model.steps)
        ids, labels = batch(model, tokenizer, random_)
        logits = network(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


def make(model: Model, seed: int, out: Path) -> str:
    """Train one model and put it under its final name in one step; a model that stands there already is kept."""
    torch.set_num_threads(1)
    final = out / model.alias
    if final.is_dir():
        return f"{model.alias}: kept"
    start = time.monotonic()
    tokenizer = stranger_tokenizer() if model.alias == "stranger" else character_tokenizer()
    if model.parent is None:
        network = fresh(model, tokenizer, seed)
    else:
        network = LlamaForCausalLM.from_pretrained(out / model.parent, dtype=torch.float32)
    train(network, model, tokenizer, seed)
    temporary = out / f".{model.alias}"
    copy.deepcopy(network).to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(final)
    return f"{model.alias}: {time.monotonic() - start:.0f} s"


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=here / "models")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at once, one thread each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_tasks(here / "tasks")
    waiting = {model.alias: model for model in ZOO}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        while waiting:  # a generation at a time: roots, then children, then grandchildren
            ready = [m for m in waiting.values() if m.parent is None or m.parent not in waiting]
            for line in pool.map(make, ready, [arguments.seed] * len(ready), [arguments.out] * len(ready)):
                print(line, flush=True)
            for model in ready:
                del waiting[model.alias]


if __name__ == "__main__":
    main()
