"""What a mixture is made of: experts with their prompts, and the settings of the router."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from modelglue.errors import UserError, did_you_mean

GateMode = Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "auto"]
MadeFrom = Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "auto", "scores"]
#: names of experts become folder names
EXPERT_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
ROUTE_SPAN = r"prompt|full|first:[1-9][0-9]*"

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


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one on every line; blank lines are passed over, blanks at both ends of a line are no part of it.

    One UserError names every faulty line (`file:line`): no UTF-8, a prompt that stands there twice; or says that the file holds none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a text file with one prompt on every line.") from error
    faults = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            faults.append(f"{path}:{number}: is no UTF-8. Save the file as UTF-8.")
            continue
        if prompt and first.setdefault(prompt, number) != number:
            faults.append(f"{path}:{number}: is the same prompt as line {first[prompt]}. Take one out.")
    if not first and not faults:
        faults.append(f"{path}: holds no prompt. Write one on every line.")
    if faults:
        raise UserError("\n".join(faults))
    return list(first)


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: a complete model folder, and the prompts that its gate row is made from.

    Raises UserError for a name that could not be a folder's.
    """

    name: str
    path: Path
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    domain: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(EXPERT_NAME, self.name):
            raise UserError(f"expert {self.name!r}: is no name; allowed are letters, digits and ._- . Give the expert another name.")


@dataclass(frozen=True)
class RouterSpec:
    """How the gate is made and used. Raises UserError for settings that no router can have."""

    gate_mode: GateMode = "hidden"
    router_layer: int | Literal["auto"] = 0
    """Layers of the encoder that run before its states are pooled; 0 reads token embeddings, auto finds the best by self-test."""
    temperature: float = 1.0
    route_span: str = "prompt"
    """What is routed on: prompt, first:N tokens of it, or full (the prompt and a continuation that is to be scored)."""
    seed: int = 0
    """For the random gates."""
    top_k: int = 1
    """Experts that answer each sample; above 1 their next-token probabilities are mixed, which needs equal tokenizers."""
    combine: Literal["probabilities", "logits"] = "probabilities"
    """What is mixed at a top_k above 1."""

    def __post_init__(self) -> None:
        modes = get_args(GateMode)
        if self.gate_mode not in modes:
            near = did_you_mean(str(self.gate_mode), modes)
            raise UserError(f"router: gate_mode is {self.gate_mode!r}; allowed are {', '.join(modes)}.{near}")
        if self.router_layer != "auto" and not (isinstance(self.router_layer, int) and self.router_layer >= 0):
            raise UserError(f"router: router_layer is {self.router_layer}; allowed is a whole number from 0, or auto.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"router: temperature is {self.temperature}; allowed is a finite number above 0.")
        if not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise UserError(f"router: top_k is {self.top_k}; allowed is a whole number from 1 to the number of experts.")
        if self.combine not in ("probabilities", "logits"):
            raise UserError(f"router: combine is {self.combine!r}; allowed are probabilities and logits.")
        if not re.fullmatch(ROUTE_SPAN, self.route_span):
            raise UserError(f"router: route_span is {self.route_span!r}; allowed are prompt, full, and first:N with N from 1.")
