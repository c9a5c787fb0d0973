"""What a sparse model is made of, and what must agree before any export can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelglue.errors import MergeError
from modelglue.mixture.exports.dense import Dense

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parts:
    """Experts beside each other in every layer from `dense_layers` on; everything else is the shared model's.

    Token routing: softmax over all experts, the `top_k` largest, renormalised.
    """

    shared: Dense
    experts: tuple[Dense, ...]
    top_k: int
    dtype: str
    """What the weights are stored in ("BF16")."""
    always: Dense | None = None
    """An expert that every position goes through, beside the chosen ones."""
    gated: bool = False
    """Whether that expert is multiplied by the sigmoid of a gate of its own."""
    dense_layers: int = 0
    """So many of the lowest layers keep the shared model's feed-forward network."""
    gate_dtype: str = "F32"

    @property
    def sparse_layers(self) -> range:
        return range(self.dense_layers, self.shared.layers)


@dataclass(frozen=True)
class Gates:
    """Router weights: [layers, experts, d] in float32 for all layers that are sparse, and [layers, d] for an expert that is always on."""

    routed: torch.Tensor
    always: torch.Tensor | None = None


def check(parts: Parts) -> None:
    """Raise one MergeError with everything that keeps these models from being one sparse model, whatever its class."""
    shared, faults = parts.shared, []
    if not parts.experts:
        faults.append("no experts are given.")
    if not 1 <= parts.top_k <= max(1, len(parts.experts)):
        faults.append(f"experts_per_token is {parts.top_k}; allowed is 1 to {len(parts.experts)}, the number of experts.")
    if not 0 <= parts.dense_layers < shared.layers:
        faults.append(f"{parts.dense_layers} merged layers leave none of {shared.layers} for experts.")
    others = [*parts.experts, *([parts.always] if parts.always else [])]
    first = parts.experts[0] if parts.experts else shared
    for expert in others:
        faults += _differences(expert, shared, first if expert is not parts.always else expert)
    if faults:
        raise MergeError("\n".join(faults))


def _differences(expert: Dense, shared: Dense, first: Dense) -> list[str]:
    facts = {
        "family of model types": (expert.family, shared.family, shared.label),
        "layers": (expert.layers, shared.layers, shared.label),
        "width": (expert.width, shared.width, shared.label),
        "width of the feed-forward networks": (expert.inner, first.inner, first.label),
    }
    return [
        f"{expert.label}: its {what} is {found}, that of {whose} is {wanted}; experts of one sparse model must agree in it. "
        "A mixture at the level model takes experts of any shape."
        for what, (found, wanted, whose) in facts.items()
        if found != wanted
    ]


def warnings(parts: Parts, tokens: Sequence[tuple[Dense, frozenset[str]]] = ()) -> list[str]:
    """What is odd and no error: settings of an expert's own attention that are lost, and tokens that only an expert knows."""
    found = []
    shared = parts.shared
    for expert in {one.label: one for one in (*parts.experts, *([parts.always] if parts.always else []))}.values():
        if expert.facts.get("rms_norm_eps") != shared.facts.get("rms_norm_eps"):
            found.append(
                f"{expert.label}: its rms_norm_eps is {expert.facts.get('rms_norm_eps')}, the mixture uses "
                f"{shared.facts.get('rms_norm_eps')} of {shared.label}."
            )
        if expert.rope != shared.rope:
            found.append(f"{expert.label}: was trained with other rotary positions ({expert.rope}) than {shared.label} ({shared.rope}).")
        if expert.vocabulary != shared.vocabulary:
            found.append(
                f"{expert.label}: has {expert.vocabulary} token embeddings, {shared.label} has {shared.vocabulary}; the mixture reads and "
                "writes the latter's tokens only."
            )
    for expert, extra in tokens:
        if extra:
            shown = ", ".join(repr(token) for token in sorted(extra)[:4]) + (" ..." if len(extra) > 4 else "")
            found.append(
                f"{expert.label}: knows {len(extra)} tokens that {shared.label} does not ({shown}); the mixture reads them as other tokens."
            )
    return list(dict.fromkeys(found))
