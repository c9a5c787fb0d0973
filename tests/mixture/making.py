"""Small mixtures: a random Llama and a random GPT-NeoX with different tokenizers, and models whose states can be read by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelglue.checkpoint import open_checkpoint
from modelglue.mixture import ExpertSpec, Mixture, Reader, RouterSpec, write_mixture
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from tests.models.tiny import bigram_model, letters, pieces, saved_model


def two_experts(folder: Path) -> list[ExpertSpec]:
    """`llama` knows letters, `neox` (another class, size and tokenizer) digits; both weights are random."""
    if not (folder / "llama").is_dir():
        saved_model(folder / "llama", "llama", seed=5, tokenizer=letters())
        saved_model(folder / "neox", "gpt_neox", seed=6, tokenizer=pieces())
    return [
        ExpertSpec("llama", folder / "llama", ("abc", "word", "letters"), ("12", "345"), ("words",)),
        ExpertSpec("neox", folder / "neox", ("12", "345"), ("abc", "word"), ("numbers",)),
    ]


def mixture(folder: Path, experts: list[ExpertSpec] | None = None, *, residency: str = "lazy", **router: Any) -> Mixture:
    """Written to `folder`/mixture (replaced, if there is one) and opened; the first expert is the encoder."""
    experts = two_experts(folder) if experts is None else experts
    write_mixture(folder / "mixture", experts, RouterSpec(**router), encoder=experts[0].path, overwrite=True)
    return Mixture.load(folder / "mixture", residency)


def alone(folder: Path, name: str) -> LiveTextModel:
    """An expert by itself."""
    checkpoint = open_checkpoint(folder / name)
    return LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))


def unit_reader(layer: int = 0) -> Reader:
    """An encoder in which the state at a letter is the unit vector of that letter's id, at every layer."""
    return Reader(bigram_model({}, letters()), letters(), layer)


def of(*prompts: str, against: tuple[str, ...] = (), name: str = "") -> ExpertSpec:
    """An expert of which only the prompts matter."""
    return ExpertSpec(name or "".join(prompts).replace(" ", "_"), Path("nowhere"), prompts, against)
