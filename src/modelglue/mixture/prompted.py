"""The router from prompts with everything that was left open decided: encoder, layer and mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint import open_checkpoint
from modelglue.mixture.gates import LinearGate
from modelglue.mixture.router import WITHOUT_PROMPTS, Reader, best_layer, build_gate, knowledge, those_that_work
from modelglue.mixture.spec import ExpertSpec, RouterSpec
from modelglue.models import load_live, load_tokenizer


@dataclass(frozen=True)
class PromptRouter:
    """A gate and the settings that it was made with."""

    encoder: Path
    layer: int
    mode: str
    gate: LinearGate
    known: tuple[float, float]
    """How well it knows its own prompts; see `knowledge`."""


def prompt_router(experts: Sequence[ExpertSpec], router: RouterSpec, encoder: Path | None) -> PromptRouter:
    """The gate from the experts' prompts through `encoder`; None: the expert that knows them best, of equal ones the first.

    Raises UserError for prompts that no router can use. Time: a few dozen short prompts through every encoder. Memory: one encoder.
    """
    candidates = [encoder] if encoder is not None else [expert.path for expert in experts]
    built = those_that_work(candidates, lambda path: _through(path, experts, router))
    return max(built.values(), key=lambda made: made.known)


def _through(encoder: Path, experts: Sequence[ExpertSpec], router: RouterSpec) -> PromptRouter:
    """Through one encoder, which is let go of afterwards."""
    read = open_checkpoint(encoder)
    model, tokenizer = load_live(read), load_tokenizer(read)
    layer = best_layer(model, tokenizer, experts, router) if router.router_layer == "auto" else router.router_layer
    reader = Reader(model, tokenizer, layer)
    gate, mode = build_gate(reader, experts, router)
    known = (0.0, 0.0) if mode in WITHOUT_PROMPTS else knowledge(reader, experts, gate, router.route_span)
    return PromptRouter(encoder, layer, mode, gate, known)
