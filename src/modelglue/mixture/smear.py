"""SMEAR: experts are averaged, not chosen (arXiv 2306.03745). One forward pass of one expert, whatever the number of experts.

    p = softmax(LN(mean of x over its positions) R (+ b)), each column of R layer-normalised over its length unless told otherwise
    y = expert(x; sum_i p_i Theta_i), for every sample its own p

Everything is differentiable, the router included. For causal models take p from the prompt, and pass it to every later call. Experts
may be any modules whose parameters have equal names and shapes; residual connections are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modelglue.errors import UserError


class SmearRouter(nn.Module):
    """One probability per expert and sample from the mean of the real positions. `weight` is [d, experts]."""

    def __init__(
        self, width: int, experts: int, *, normalize_weights: bool = True, bias: bool = False, init_scale: float = 0.01, eps: float = 1e-5
    ) -> None:
        """`init_scale`: the first gain of the columns' norm, or the deviation of the columns where they have none."""
        super().__init__()
        self.input_norm = nn.LayerNorm(width, eps=eps)
        self.weight = nn.Parameter(torch.randn(width, experts) * (1.0 if normalize_weights else init_scale))
        self.weight_norm = nn.LayerNorm(width, eps=eps) if normalize_weights else None
        if self.weight_norm is not None:
            nn.init.constant_(self.weight_norm.weight, init_scale)
        self.bias = nn.Parameter(torch.zeros(experts)) if bias else None

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, experts] of states [B, S, d]; `mask` [B, S] is 0 at pads. A sample of pads alone has the mean 0."""
        if mask is None:
            mean = states.mean(dim=1)
        else:
            real = mask.to(states.dtype)[:, :, None]
            mean = (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        weight = self.weight if self.weight_norm is None else self.weight_norm(self.weight.T).T
        logits: Tensor = self.input_norm(mean) @ weight
        return logits if self.bias is None else logits + self.bias


class Smear(nn.Module):
    """Experts behind a SMEAR router. UserError for experts whose parameters or buffers differ in name or shape.

    Memory: one merged expert per sample. With `dropout`, experts drop out of a sample with this probability while training, and the
    others are renormalised; a sample that would lose all keeps all.
    """

    def __init__(self, experts: Sequence[nn.Module], router: SmearRouter, *, dropout: float = 0.0) -> None:
        super().__init__()
        shapes = [{name: tuple(value.shape) for name, value in expert.state_dict().items()} for expert in experts]
        for number, own in enumerate(shapes):
            if own != shapes[0]:
                raise UserError(
                    f"expert {number} has the parameters {own}, expert 0 {shapes[0]}; only experts of equal shapes can be averaged. "
                    "Use a mixture that routes."
                )
        if router.weight.shape[1] != len(experts):
            raise UserError(f"the router has {router.weight.shape[1]} outputs for {len(experts)} experts. Give it one for each.")
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.dropout = dropout

    def probabilities(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, experts], each row with the sum 1."""
        p = torch.softmax(self.router(states, mask), dim=-1)
        if self.training and self.dropout:
            kept = (torch.rand_like(p) >= self.dropout).to(p.dtype)
            kept = torch.where(kept.sum(dim=-1, keepdim=True) == 0, torch.ones_like(kept), kept)
            p = p * kept / (p * kept).sum(dim=-1, keepdim=True)
        return p

    def merged(self, p: Tensor) -> dict[str, Tensor]:
        """The averaged parameters and buffers of every sample: name -> [B, ...]."""
        states: Sequence[Mapping[str, Tensor]] = [dict([*one.named_parameters(), *one.named_buffers()]) for one in self.experts]
        return {name: torch.einsum("be,e...->b...", p, torch.stack([state[name] for state in states])) for name in states[0]}

    def forward(self, states: Tensor, mask: Tensor | None = None, p: Tensor | None = None) -> Tensor:
        """States [B, S, d] -> what the merged experts make of them; `p` [B, experts] from an earlier call is used as it is."""
        merged = self.merged(self.probabilities(states, mask) if p is None else p)

        def one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(self.experts[0], parameters, (row,))
            return found

        answer: Tensor = torch.func.vmap(one, randomness="different")(merged, states)
        return answer


class Adapter(nn.Module):
    """A bottleneck without its residual: activation(x down + bias) up (+ bias), matrices stored [in, out]."""

    def __init__(
        self, down: Tensor, up: Tensor, down_bias: Tensor | None = None, up_bias: Tensor | None = None, activation: str = "silu"
    ) -> None:
        """UserError for an activation that torch does not have."""
        super().__init__()
        found = getattr(nn.functional, {"swish": "silu", "gelu_new": "gelu"}.get(activation, activation), None)
        if found is None:
            raise UserError(f"activation is {activation!r}; allowed are the functions of torch.nn.functional, such as silu, gelu and relu.")
        self._activation = found
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.down_bias = None if down_bias is None else nn.Parameter(down_bias)
        self.up_bias = None if up_bias is None else nn.Parameter(up_bias)

    def forward(self, states: Tensor) -> Tensor:
        """[S, d] -> [S, d]."""
        inner = states @ self.down
        inner = self._activation(inner if self.down_bias is None else inner + self.down_bias)
        found: Tensor = inner @ self.up
        return found if self.up_bias is None else found + self.up_bias
