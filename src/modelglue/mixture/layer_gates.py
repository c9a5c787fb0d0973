"""Gates of a mixture whose experts are parts of layers: one matrix for every layer, from prompts, by one pass of the encoder.

The construction is that of `gate_row`, at each layer from the residual stream that enters it (as in mergekit-moe and in Model-GLUE,
arXiv 2410.05357).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelglue.errors import UserError
from modelglue.mixture.router import POOLED, Reader, random_row, row_of
from modelglue.mixture.spec import ExpertSpec

if TYPE_CHECKING:
    import torch

#: condition numbers of a gate above this are reported: the prompts are too alike
HIGH_CONDITION = 5.0
#: what stands for the condition number of a matrix that has none
_NO_CONDITION = 1e30


def random_gates(names: Sequence[str], width: int, mode: str, layers: Sequence[int], *, seed: int = 0) -> torch.Tensor:
    """Rows by chance, float32 [layers, experts, width]: `random` (standard normal) or `uniform_random` (within 1 / sqrt(width))."""
    import torch

    return torch.stack([torch.stack([random_row(seed, f"{name}/{layer}", width, mode) for name in names]) for layer in layers])


def layer_gates(reader: Reader, experts: Sequence[ExpertSpec], mode: str, layers: Sequence[int]) -> torch.Tensor:
    """Gate rows of every expert at the given layers, from its prompts: float32 [layers, experts, d], of unit length.

    Modes: `hidden`, `hidden_avg`, `cheap_embed` (the same rows at every layer). All prompts go through the encoder together, in one
    thread, and each once; the order of experts changes no bit of a row.

    Raises UserError for an expert without positive prompts, with negative prompts that cancel them, or whose states are not finite.
    """
    import torch

    from modelglue.checkpoint.engine.workers import single_thread

    for expert in experts:
        if not expert.positive:
            raise UserError(f"expert '{expert.name}': has no positive prompts for the router. Give it some.")
    read = (0,) if mode == "cheap_embed" else tuple(layers)
    texts = sorted({prompt for expert in experts for prompt in (*expert.positive, *expert.negative)})
    with single_thread():
        pooled = reader.pooled_at(read, texts, "prompt", POOLED[mode])
        rows = torch.stack([_rows(pooled, texts, expert, mode) for expert in experts], dim=1)
    return rows.expand(len(layers), -1, -1) if mode == "cheap_embed" else rows


def conditions(gates: torch.Tensor) -> list[float]:
    """The condition number of every layer's matrix of [layers, experts, d]; 1e30 for one whose rows depend on each other."""
    import torch

    return [min(float(torch.linalg.cond(rows.double())), _NO_CONDITION) for rows in gates]


def _rows(pooled: Mapping[int, torch.Tensor], texts: Sequence[str], expert: ExpertSpec, mode: str) -> torch.Tensor:
    """One expert's rows at all layers that were read: [layers, d]."""
    import torch

    sides = [[texts.index(prompt) for prompt in side] for side in (expert.positive, expert.negative)]
    rows = []
    for states in pooled.values():
        positive, negative = (states[places] if places else None for places in sides)
        assert positive is not None
        if not bool(positive.isfinite().all()) or not (negative is None or bool(negative.isfinite().all())):
            raise UserError(
                f"expert '{expert.name}': the states of its prompts are not finite, so no gate can be made of them. "
                "Check the base model's weights."
            )
        rows.append(row_of(positive, negative, mode))
        if not float(rows[-1].norm()) > 0.5:
            raise UserError(
                f"expert '{expert.name}': its negative prompts cancel the positive ones, the gate row is zero. Change its prompts."
            )
    return torch.stack(rows)
