"""Gates of a mixture whose experts are parts of layers: one matrix for every layer, from prompts, by one pass of the encoder.

The construction is that of `gate_row`, at each layer from the residual stream that enters it (as in mergekit-moe and in Model-GLUE,
arXiv 2410.05357).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelglue.errors import UserError
from modelglue.mixture.router import Encoded, Reader, gate_row, random_row
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

    Modes: `hidden`, `hidden_avg`, `cheap_embed` (the same rows at every layer). One pass of each side of an expert's prompts through the
    encoder, in one thread.

    Raises UserError for an expert without positive prompts, with negative prompts that cancel them, or whose states are not finite.
    """
    import torch

    from modelglue.checkpoint.engine.workers import single_thread

    with single_thread():
        return torch.stack([_rows(reader, expert, mode, layers) for expert in experts], dim=1)


def conditions(gates: torch.Tensor) -> list[float]:
    """The condition number of every layer's matrix of [layers, experts, d]; 1e30 for one whose rows depend on each other."""
    import torch

    return [min(float(torch.linalg.cond(rows.double())), _NO_CONDITION) for rows in gates]


def _rows(reader: Reader, expert: ExpertSpec, mode: str, layers: Sequence[int]) -> torch.Tensor:
    """One expert's rows: [layers, d]."""
    import torch

    if not expert.positive:
        raise UserError(f"expert '{expert.name}': has no positive prompts for the router. Give it some.")
    read = (0,) if mode == "cheap_embed" else tuple(layers)
    positive = reader.encode_each(expert.positive, read)
    negative = reader.encode_each(expert.negative, read) if expert.negative else dict.fromkeys(read)
    for encoded in (*positive.values(), *negative.values()):
        _check_finite(encoded, expert)
    rows = {layer: gate_row(positive[layer], negative[layer], mode) for layer in read}
    if not all(float(row.norm()) > 0.5 for row in rows.values()):
        raise UserError(f"expert '{expert.name}': its negative prompts cancel the positive ones, the gate row is zero. Change its prompts.")
    return torch.stack([rows[0] if mode == "cheap_embed" else rows[layer] for layer in layers])


def _check_finite(encoded: Encoded | None, expert: ExpertSpec) -> None:
    if encoded is not None and not bool(encoded.states[encoded.mask == 1].isfinite().all()):
        raise UserError(
            f"expert '{expert.name}': the states of its prompts are not finite, so no gate can be made of them. "
            "Check the base model's weights."
        )
