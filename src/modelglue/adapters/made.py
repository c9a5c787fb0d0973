"""A combined adapter as it grows: the factors of its modules, and what its parts replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelglue.checkpoint.adapter import Adapter
from modelglue.checkpoint.adapter.keys import PREFIX
from modelglue.errors import MergeError

if TYPE_CHECKING:
    import torch

SIDES = ("lora_A", "lora_B")


@dataclass
class Made:
    """Tensors under PEFT's keys, stored as `dtype`, and what the config and the user must be told of them."""

    dtype: torch.dtype
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    lora_bias: bool = False
    saved: list[str] = field(default_factory=list)
    tokens: dict[str, Sequence[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, module: str, A: torch.Tensor, B: torch.Tensor, rank: int, embedding: bool) -> None:
        """The factors, with zeros up to the one rank that the config gives all modules."""
        import torch

        self.modules.append(module)
        A = torch.cat([A, A.new_zeros(rank - A.shape[0], A.shape[1])]).to(self.dtype)
        B = torch.cat([B, B.new_zeros(B.shape[0], rank - B.shape[1])], 1).to(self.dtype)
        for side, values in zip(SIDES, (A, B), strict=True):
            name = f"lora_embedding_{side[-1]}" if embedding else f"{side}.weight"
            self.tensors[f"{PREFIX}{module}.{name}"] = finite(values, module).contiguous()

    def keep_replaced(self, adapters: Sequence[Adapter]) -> None:
        """What adapters replace is kept, as it is, unless two replace one thing by different values."""
        faults: list[str] = []
        for adapter in adapters:
            for name, key in adapter.replaced.items():
                embedding = adapter.updates.get(name.rpartition(".")[0])
                inside = "base_layer." if embedding is not None else ""
                module, _, parameter = name.rpartition(".")
                if embedding is None and (other := next((one for one in adapters if module in one.updates), None)) is not None:
                    faults.append(
                        f"{adapter.path}: replaces '{name}', which {other.path} updates; these cannot be combined. "
                        "Merge adapted models instead."
                    )
                    continue
                self._keep(f"{PREFIX}{module}.{inside}{parameter}", name, adapter, key, faults)
            for module, key in adapter.tokens.items():
                rows = adapter.config.tokens(module)
                if rows is None or self.tokens.setdefault(module, rows) != rows:
                    faults.append(f"{adapter.path}: trains tokens of '{module}' that another adapter does not, or does not say which.")
                    continue
                self._keep(f"{PREFIX}{module}.token_adapter.trainable_tokens_delta", f"rows of {module}", adapter, key, faults)
        if faults:
            raise MergeError("\n".join(faults))

    def _keep(self, key: str, name: str, adapter: Adapter, own_key: str, faults: list[str]) -> None:
        import torch

        values = adapter.tensor(own_key)
        if key in self.tensors and not torch.equal(self.tensors[key], values):
            faults.append(
                f"{adapter.path}: replaces '{name}', and so does another adapter, by other values; these cannot be combined. "
                "Merge adapted models instead."
            )
        elif key not in self.tensors:
            self.tensors[key] = values
            self.saved.append(f"'{name}'")


def finite(values: torch.Tensor, module: str) -> torch.Tensor:
    """`values`, if they are numbers; MergeError names the module whose update they are."""
    import torch

    if not bool(torch.isfinite(values).all()):
        raise MergeError(
            f"the combined update of '{module}' does not fit {str(values.dtype).removeprefix('torch.')}. "
            "Look at the weights and at the adapters' scales, or store float32."
        )
    return values
