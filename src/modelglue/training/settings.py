"""How a model is trained further; the defaults are those with which stacked models were trained (Model-GLUE, arXiv 2410.05357)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from modelglue.errors import UserError
from modelglue.mixture.routing.gradient import Gating

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Training:
    """AdamW (0.9, 0.95) with a cosine to 0 after a linear rise. UserError names all values that cannot be."""

    rate: float = 3e-5
    context: int = 1024
    """Tokens of a row; longer texts are several rows."""
    batch: int = 8
    """Rows of one step."""
    micro_batch: int = 1
    """Rows that are in memory at once; gradients of a batch are added up."""
    epochs: int = 1
    steps: int | None = None
    """Stop after so many steps, wherever in the texts that is. The schedule is that of so many steps."""
    warm_up: float = 0.1
    """Share of the steps in which the rate rises."""
    decay: float = 0.1
    """Weight decay of matrices; vectors have none."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    seed: int = 0
    precision: Precision = "float32"
    """bfloat16: products in bfloat16, weights and optimiser in float32."""
    gating: Gating = "soft"
    """While routers of a mixture of modelglue's own are trained: all experts (`soft`), or those that would work (`topk`,
    `straight_through`)."""
    device: str = "cpu"
    keep_every: int = 100
    """Steps after which the state is written, from which a killed run continues."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}; allowed is a whole number from {least}"
            for name, least in (("batch", 1), ("micro_batch", 1), ("epochs", 1), ("keep_every", 1), ("context", 2), ("seed", 0))
            if not getattr(self, name) >= least
        ]
        if self.steps is not None and not self.steps >= 1:
            faults.append(f"steps is {self.steps}; allowed is a whole number from 1")
        faults += [
            f"{name} is {getattr(self, name)}; allowed is a number above 0" for name in ("rate", "clip") if not getattr(self, name) > 0
        ]
        if not self.decay >= 0:
            faults.append(f"decay is {self.decay}; allowed is a number from 0")
        if not 0 <= self.warm_up < 1:
            faults.append(f"warm_up is {self.warm_up}; allowed is a share from 0 to below 1")
        if self.precision not in get_args(Precision):
            faults.append(f"precision is {self.precision!r}; allowed are {', '.join(get_args(Precision))}")
        if self.gating not in get_args(Gating):
            faults.append(f"gating is {self.gating!r}; allowed are {', '.join(get_args(Gating))}")
        if faults:
            raise UserError(f"training: {'; '.join(faults)}.")

    def what_decides(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {key: value for key, value in asdict(self).items() if key != "keep_every"}
