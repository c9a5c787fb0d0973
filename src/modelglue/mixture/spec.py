"""What a mixture is made of: experts with their prompts, and the settings of the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GateMode = Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "auto"]

#: default prompts per domain tag (positive, negative), the released configuration of Model-GLUE, arXiv 2410.05357
DOMAIN_PROMPTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("chat", "assistant", "tell me", "explain"), ("storywriting", "mathematics", "reasoning", "code", "programming")),
    "code": (("code", "python", "programming", "algorithm"), ("chat", "assistant", "storywriting", "mathematics", "reasoning")),
    "writing": (
        ("storywriting", "write", "scene", "story", "character"),
        ("chat", "assistant", "code", "programming", "mathematics", "reasoning"),
    ),
    "math": (("reason", "math", "mathematics", "solve", "count"), ("chat", "assistant", "code", "programming", "storywriting")),
}  # fmt: skip


def domain_prompts(domain: Sequence[str]) -> dict[str, list[str]]:
    """The default prompts of these tags; empty lists for tags that have none."""
    found = [DOMAIN_PROMPTS[tag] for tag in domain if tag in DOMAIN_PROMPTS]
    return {
        "positive": [prompt for positive, _ in found for prompt in positive],
        "negative": [prompt for _, negative in found for prompt in negative],
    }


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: a complete model folder, and the prompts that its gate row is made from."""

    name: str
    path: Path
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    domain: tuple[str, ...] = ()


@dataclass(frozen=True)
class RouterSpec:
    """How the gate is made and used."""

    gate_mode: GateMode = "hidden"
    router_layer: int = 0
    """Layers of the encoder that run before its states are pooled; 0 reads token embeddings."""
    temperature: float = 1.0
    route_span: str = "prompt"
    """prompt, full, or first:N tokens of what is routed on."""
    seed: int = 0
    """For the random gates."""
