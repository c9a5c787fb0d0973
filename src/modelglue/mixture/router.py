"""The linear router from prompts: one gate row per expert, no training.

A gate row is the pooled residual stream of the expert's positive prompts minus that of its negative prompts, with unit length
(Model-GLUE, arXiv 2410.05357; the same construction as the public expert-gate tool). Everything runs in float32 and in one thread, so
that equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelglue.errors import UserError
from modelglue.mixture.spec import ExpertSpec, RouterSpec

if TYPE_CHECKING:
    import torch

#: pooled vectors shorter than this cannot be told from nothing
_NO_LENGTH = 1e-8


@dataclass(frozen=True)
class Encoded:
    """Residual streams [B, T, d] of a batch of prompts, and the mask [B, T] of its real positions."""

    states: torch.Tensor
    mask: torch.Tensor

    def last(self) -> torch.Tensor:
        """The state at every prompt's last real position: [B, d]."""
        import torch

        positions = torch.arange(self.mask.shape[1]).expand_as(self.mask)
        last = positions.masked_fill(self.mask == 0, -1).amax(dim=1)
        return self.states[torch.arange(len(last)), last]

    def mean(self) -> torch.Tensor:
        """The mean over every prompt's real positions: [B, d]."""
        weights = self.mask.to(self.states.dtype)
        return (self.states * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)

    def total(self) -> torch.Tensor:
        """The sum over all real positions of all prompts: [d]."""
        return (self.states * self.mask[..., None].to(self.states.dtype)).sum(dim=(0, 1))


class Reader:
    """The encoder: tokenizer and lower layers of one live model."""

    def __init__(self, model: Any, tokenizer: Any, layer: int) -> None:
        layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
        if layer >= max(layers, 1):
            raise UserError(f"router_layer is {layer}, the encoder has {layers} layers; allowed is 0 to {layers - 1}.")
        self._model, self._tokenizer, self._layer = model, tokenizer, layer

    def encode(self, texts: Sequence[str], span: str = "prompt") -> Encoded:
        """Residual stream entering the router's layer. Ids are the beginning-of-sequence id plus plain tokens."""
        import torch

        bos = self._tokenizer.bos_token_id
        head = [] if bos is None else [bos]
        rows = [head + self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if span.startswith("first:"):
            rows = [row[: int(span.removeprefix("first:")) + len(head)] for row in rows]
        for text, row in zip(texts, rows, strict=True):
            if len(row) <= len(head):
                raise UserError(f"the prompt {text!r} has no token in the encoder's vocabulary. Write a longer one.")
        width = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return Encoded(entering(self._model, ids, mask, self._layer), mask)

    def pooled(self, texts: Sequence[str], span: str = "prompt", batch: int = 64) -> torch.Tensor:
        """What the router reads of each text: the mean over its real positions, [B, d]. One text at a time gives the same
        to rounding, whatever it is batched with."""
        import torch

        return torch.cat([self.encode(texts[i : i + batch], span).mean() for i in range(0, len(texts), batch)])


def entering(model: Any, ids: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """Residual stream [B, T, d] entering decoder layer `layer` (0 = embedding output), in float32; later layers do not run."""
    import torch

    layers = _layers(model)
    caught: list[torch.Tensor] = []

    def catch(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(arguments[0] if arguments else named["hidden_states"])
        raise _Reached

    handle = layers[layer].register_forward_pre_hook(catch, with_kwargs=True)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0].float().clone()


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The layer that is asked for has been reached; what comes after need not run."""


def _layers(model: Any) -> Any:
    import torch

    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__}: its decoder layers were not found, so it cannot be the router's encoder. Choose another.")


def gate_row(positive: Encoded, negative: Encoded | None, mode: str) -> torch.Tensor:
    """One expert's gate row [d], of unit length. Modes `hidden`, `hidden_avg` and `cheap_embed`.

    `hidden` takes the last real position of each prompt, `hidden_avg` the mean over its real positions; both then average over the
    prompts of a side and subtract. `cheap_embed` sums over positions and prompts, and normalises each side before subtracting.
    """

    def side(encoded: Encoded) -> torch.Tensor:
        if mode == "cheap_embed":
            return _unit(encoded.total())
        return (encoded.last() if mode == "hidden" else encoded.mean()).mean(dim=0)

    query = side(positive)
    if negative is not None:
        query = query - side(negative)
    return _unit(query)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm().clamp(min=_NO_LENGTH)


def build_gate(reader: Reader, experts: Sequence[ExpertSpec], router: RouterSpec) -> tuple[torch.Tensor, str]:
    """The gate [experts, d] in float32, and the mode that made it (`auto` chooses between two).

    Raises UserError for experts without prompts, with equal prompts, or whose negative prompts cancel the positive ones.
    """
    from modelglue.checkpoint.workers import single_thread

    _check_prompts(experts, router)
    with single_thread():
        if router.gate_mode != "auto":
            return _build(reader, experts, router, router.gate_mode), router.gate_mode
        candidates = {mode: _build(reader, experts, router, mode) for mode in ("hidden", "hidden_avg")}
        best = max(candidates, key=lambda mode: worst_margin(reader, experts, candidates[mode]))
        return candidates[best], best


def _build(reader: Reader, experts: Sequence[ExpertSpec], router: RouterSpec, mode: str) -> torch.Tensor:
    import torch

    if mode in ("random", "uniform_random"):
        width = reader.encode(["a"]).states.shape[-1]
        return torch.stack([_random_row(router.seed, expert.name, width, mode) for expert in experts])
    rows = []
    for expert in experts:
        negative = reader.encode(expert.negative) if expert.negative else None
        row = gate_row(reader.encode(expert.positive), negative, mode)
        if float(row.norm()) < 0.5:
            raise UserError(
                f"expert '{expert.name}': its negative prompts cancel the positive ones, the gate row is zero. Change its prompts."
            )
        rows.append(row)
    return torch.stack(rows)


def _random_row(seed: int, name: str, width: int, mode: str) -> torch.Tensor:
    import torch

    state = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(state)
    if mode == "random":
        return torch.randn(width, generator=generator)
    return (torch.rand(width, generator=generator) * 2 - 1) * width**-0.5


def _check_prompts(experts: Sequence[ExpertSpec], router: RouterSpec) -> None:
    if router.gate_mode in ("random", "uniform_random"):
        return
    seen: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    for expert in experts:
        if not expert.positive:
            raise UserError(f"expert '{expert.name}': has no positive prompts for the router. Give it prompts: {{positive: [...]}}.")
        twin = seen.setdefault((expert.positive, expert.negative), expert.name)
        if twin != expert.name:
            raise UserError(f"experts '{twin}' and '{expert.name}' have the same prompts, so no router can tell them apart. Change one.")


def prompt_logits(reader: Reader, experts: Sequence[ExpertSpec], gate: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Router logits [prompts, experts] of every expert's own positive prompts, read as at routing time."""
    return {expert.name: reader.pooled(expert.positive) @ gate.T for expert in experts}


def worst_margin(reader: Reader, experts: Sequence[ExpertSpec], gate: torch.Tensor) -> float:
    """Smallest lead, over all positive prompts, of the own logit over the best other logit."""
    margins = []
    for number, (_, logits) in enumerate(prompt_logits(reader, experts, gate).items()):
        others = logits.clone()
        others[:, number] = -float("inf")
        margins.append(float((logits[:, number] - others.amax(dim=1)).min()))
    return min(margins)
