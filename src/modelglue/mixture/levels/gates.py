"""Gates of a mixture inside one model, from prompts or by chance: one for every layer that decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.checkpoint import Checkpoint
from modelglue.errors import UserError
from modelglue.mixture.gates import LinearGate
from modelglue.mixture.layer_gates import layer_gates, random_gates
from modelglue.mixture.router import WITHOUT_PROMPTS, Reader, own_share, those_that_work, worst_margin
from modelglue.mixture.spec import ExpertSpec, GateMode
from modelglue.models import has_tokenizer, load_live, load_tokenizer

if TYPE_CHECKING:
    import torch


def gates_for(
    encoder: Checkpoint, experts: Sequence[ExpertSpec], mode: GateMode, layers: Sequence[int], *, width: int, seed: int = 0
) -> tuple[dict[int, LinearGate], GateMode]:
    """(a gate for every layer, the mode that made them). `auto` keeps, of `hidden` and `hidden_avg`, what knows its prompts better.

    Time: one pass of the prompts through the encoder for every mode that is tried. Memory: the encoder in float32, gone afterwards;
    nothing for random gates. Raises UserError for an encoder without tokenizer or of another width or depth, or prompts that no gate
    can be made from.
    """
    if mode in WITHOUT_PROMPTS:
        rows = random_gates([expert.name for expert in experts], width, mode, layers, seed=seed)
        return _gates(rows, layers), mode
    reader = reader_of(encoder, layers, width)
    if mode != "auto":
        return _gates(layer_gates(reader, experts, mode, layers), layers), mode
    modes: tuple[GateMode, ...] = ("hidden", "hidden_avg")
    made = those_that_work(modes, lambda one: layer_gates(reader, experts, one, layers))
    best = max(made, key=lambda one: _knowledge(reader, experts, made[one], layers))  # of equal ones the first
    return _gates(made[best], layers), best


def reader_of(encoder: Checkpoint, layers: Sequence[int], width: int) -> Reader:
    """What reads texts for the gates of these layers. UserError for an encoder without tokenizer or of another width or depth."""
    if not has_tokenizer(encoder):
        raise UserError(
            f"{encoder!r}: has no tokenizer, so no gate can be made from texts. "
            "Give router.encoder a model with one, or use gate_mode: random."
        )
    reader = Reader(load_live(encoder), load_tokenizer(encoder), max(layers))
    if reader.width != width:
        raise UserError(f"{encoder!r}: reads texts in states of width {reader.width}, the mixture has {width}. Use another encoder.")
    return reader


def _gates(rows: torch.Tensor, layers: Sequence[int]) -> dict[int, LinearGate]:
    return {layer: LinearGate(rows[number].contiguous()) for number, layer in enumerate(layers)}


def _knowledge(reader: Reader, experts: Sequence[ExpertSpec], rows: torch.Tensor, layers: Sequence[int]) -> tuple[float, float]:
    """The share of prompts that reach their own expert, mean over layers, and the smallest lead of the own logit in any layer."""
    pooled = [reader.pooled_at(layers, expert.positive, "prompt") for expert in experts]
    logits = [[states[layer] @ rows[number].T for states in pooled] for number, layer in enumerate(layers)]
    return sum(own_share(own) for own in logits) / len(logits), min(worst_margin(own) for own in logits)
