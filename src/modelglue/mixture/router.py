"""The linear router from prompts: one gate row per expert, no training.

A gate row is the pooled residual stream of the expert's positive prompts minus that of its negative prompts, with unit length
(Model-GLUE, arXiv 2410.05357; the same construction as the public expert-gate tool). Everything runs in float32 and in one thread, so
that equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from modelglue.errors import UserError
from modelglue.mixture.gates import Gate, LinearGate
from modelglue.mixture.spec import ExpertSpec, RouterSpec
from modelglue.models import batches, decoder_layers, inference

if TYPE_CHECKING:
    import torch

K = TypeVar("K")
V = TypeVar("V")

#: pooled vectors shorter than this cannot be told from nothing
_NO_LENGTH = 1e-8
WITHOUT_PROMPTS = ("random", "uniform_random")


@dataclass(frozen=True)
class Encoded:
    """Residual streams [B, T, d] of a batch of prompts, and the mask [B, T] of its real positions."""

    states: torch.Tensor
    mask: torch.Tensor

    def last(self) -> torch.Tensor:
        """The state at every prompt's last real position: [B, d]."""
        import torch

        return torch.stack([states[-1] for states in self._real()])

    def mean(self) -> torch.Tensor:
        """The mean over every prompt's real positions: [B, d]. Bit for bit the same, whatever a prompt is batched with."""
        import torch

        return torch.stack([states.mean(dim=0) for states in self._real()])

    def sums(self) -> torch.Tensor:
        """The sum over every prompt's real positions: [B, d]."""
        import torch

        return torch.stack([states.sum(dim=0) for states in self._real()])

    def _real(self) -> list[torch.Tensor]:
        return [states[mask == 1] for states, mask in zip(self.states, self.mask, strict=True)]


class Reader:
    """The encoder: tokenizer and lower layers of one live model. Raises UserError for a layer that it does not have."""

    def __init__(self, model: Any, tokenizer: Any, layer: int) -> None:
        layers = len(decoder_layers(model)[1])
        if not 0 <= layer < layers:
            raise UserError(f"router_layer is {layer}, the encoder has {layers} layers; allowed is 0 to {layers - 1}.")
        self._model, self._tokenizer, self._layer = model, tokenizer, layer
        self._limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30)
        self._head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]

    @property
    def width(self) -> int:
        """Length d of what is pooled."""
        return int(self._model.config.get_text_config().hidden_size)

    def readable(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text has any token in the encoder's vocabulary."""
        return [bool(row) for row in self._tokens(texts)]

    def encode(self, prompts: Sequence[str], layer: int | None = None) -> Encoded:
        """Residual stream entering the router's layer (or another). Ids are the beginning-of-sequence id plus plain tokens.

        Raises UserError for a prompt without tokens.
        """
        layer = self._layer if layer is None else layer
        return self._encode(self._ids(prompts, "prompt"), [layer])[layer]

    def logits(self, texts: Sequence[str], gate: Gate, span: str) -> torch.Tensor:
        """What the router thinks of each text: the gate on the mean over the text's real positions, [texts, experts].

        At layer 0 a text's logits are bit for bit the same, whatever it is batched with; above to rounding.
        """
        return gate.logits(self.pooled(texts, span))

    def pooled(self, texts: Sequence[str], span: str) -> torch.Tensor:
        """What the router reads of each text: the mean state over its real positions, [texts, d] in float32."""
        return self.pooled_at([self._layer], texts, span)[self._layer]

    def pooled_at(
        self, layers: Sequence[int], texts: Sequence[str], span: str, pool: Callable[[Encoded], torch.Tensor] = Encoded.mean
    ) -> dict[int, torch.Tensor]:
        """The same at several layers, each [texts, d], by one pass through the encoder up to the last of them; or pooled otherwise."""
        import torch

        rows = self._ids(texts, span)
        found = {layer: torch.empty(len(rows), self.width) for layer in layers}
        for places in batches([len(row) for row in rows]):
            for layer, encoded in self._encode([rows[place] for place in places], layers).items():
                found[layer][places] = pool(encoded)
        return found

    def _ids(self, texts: Sequence[str], span: str) -> list[list[int]]:
        rows = self._tokens(texts)
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise UserError(f"the prompt {text!r} has no token in the encoder's vocabulary. Write a longer one.")
        if span.startswith("first:"):
            rows = [row[: int(span.removeprefix("first:"))] for row in rows]
        return [self._head + row[-(self._limit - len(self._head)) :] for row in rows]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _encode(self, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Encoded]:
        import torch

        width = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {layer: Encoded(states, mask) for layer, states in entering_each(self._model, ids, mask, layers).items()}


def entering(model: Any, ids: torch.Tensor, mask: torch.Tensor, layer: int) -> torch.Tensor:
    """Residual stream [B, T, d] entering decoder layer `layer` (0 = embedding output), in float32; later layers do not run. One
    thread: what it decides is written down, and must not depend on the number of cores."""
    return entering_each(model, ids, mask, [layer])[layer]


def entering_each(model: Any, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """The streams entering several layers, by one pass that ends at the last of them."""
    from modelglue.checkpoint.engine.workers import single_thread

    _, blocks = decoder_layers(model)
    caught: dict[int, torch.Tensor] = {}

    def catch(layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught[layer] = (arguments[0] if arguments else named["hidden_states"]).float().clone()
            if layer == max(layers):
                raise _Reached

        return hook

    handles = [blocks[layer].register_forward_pre_hook(catch(layer), with_kwargs=True) for layer in dict.fromkeys(layers)]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    try:
        with single_thread(), inference(model):
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """The layer that is asked for has been reached; what comes after need not run."""


#: how the states of a prompt are pooled, by mode
POOLED: Mapping[str, Callable[[Encoded], torch.Tensor]] = {"hidden": Encoded.last, "hidden_avg": Encoded.mean, "cheap_embed": Encoded.sums}


def gate_row(positive: Encoded, negative: Encoded | None, mode: str) -> torch.Tensor:
    """One expert's gate row [d], of unit length. Modes `hidden`, `hidden_avg` and `cheap_embed`.

    `hidden` takes the last real position of each prompt, `hidden_avg` the mean over its real positions; both then average over the
    prompts of a side and subtract. `cheap_embed` sums over positions and prompts, and normalises each side before subtracting; it is
    meant for token embeddings, whatever layer the router reads.
    """
    pool = POOLED[mode]
    return row_of(pool(positive), None if negative is None else pool(negative), mode)


def row_of(positive: torch.Tensor, negative: torch.Tensor | None, mode: str) -> torch.Tensor:
    """The same from what each prompt was pooled to: [prompts, d] a side."""

    def side(pooled: torch.Tensor) -> torch.Tensor:
        return _unit(pooled.sum(dim=0)) if mode == "cheap_embed" else pooled.mean(dim=0)

    query = side(positive)
    if negative is not None:
        query = query - side(negative)
    return _unit(query)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = vector / vector.norm().clamp(min=_NO_LENGTH)
    return unit


def build_gate(reader: Reader, experts: Sequence[ExpertSpec], router: RouterSpec) -> tuple[LinearGate, str]:
    """The gate, without a bias, and the mode that made it (`auto` chooses between two, of those that give one).

    Raises UserError for experts without prompts, with equal prompts, or whose negative prompts cancel the positive ones.
    """
    from modelglue.checkpoint.engine.workers import single_thread

    _check_prompts(experts, router)
    with single_thread():
        if router.gate_mode != "auto":
            return _build(reader, experts, router, router.gate_mode), router.gate_mode
        candidates = those_that_work(("hidden", "hidden_avg"), lambda mode: _build(reader, experts, router, mode))
        best = max(candidates, key=lambda mode: knowledge(reader, experts, candidates[mode], router.route_span))
        return candidates[best], best


def knowledge(reader: Reader, experts: Sequence[ExpertSpec], gate: Gate, span: str) -> tuple[float, float]:
    """How well a gate knows the prompts that it was made from; what every `auto` maximises.

    The share of prompts that reach their own expert (the mean over experts) comes first, and then the smallest lead of the own logit: by
    the lead alone a gate that answers all prompts alike, with a lead of 0, would beat one that errs on a single prompt.
    """
    logits = prompt_logits(reader, experts, gate, span)
    return own_share(logits), worst_margin(logits)


def those_that_work(choices: Iterable[K], make: Callable[[K], V]) -> dict[K, V]:
    """What `make` makes of each choice, without those that it refuses; when it refuses all, the last UserError."""
    made: dict[K, V] = {}
    refusal: UserError | None = None
    for choice in choices:
        try:
            made[choice] = make(choice)
        except UserError as error:
            refusal = error
    if refusal is not None and not made:
        raise refusal
    return made


def best_layer(model: Any, tokenizer: Any, experts: Sequence[ExpertSpec], router: RouterSpec) -> int:
    """The layer of the encoder at which the router knows its prompts best: what `router_layer: auto` means.

    At every layer a gate is built, where its prompts allow one, and the one with the largest `knowledge` counts, of equal ones the lower.
    Random gates have nothing to test: 0. Cost: about layers / 2 passes of all prompts through the encoder.
    """
    from modelglue.checkpoint.engine.workers import single_thread

    if router.gate_mode in WITHOUT_PROMPTS:
        return 0

    def known(layer: int) -> tuple[float, float, int]:
        reader = Reader(model, tokenizer, layer)
        gate, _ = build_gate(reader, experts, replace(router, router_layer=layer))
        return *knowledge(reader, experts, gate, router.route_span), -layer

    with single_thread():
        found = those_that_work(range(len(decoder_layers(model)[1])), known)
    return max(found, key=found.__getitem__)


def _build(reader: Reader, experts: Sequence[ExpertSpec], router: RouterSpec, mode: str) -> LinearGate:
    import torch

    if mode in WITHOUT_PROMPTS:
        return LinearGate(torch.stack([random_row(router.seed, expert.name, reader.width, mode) for expert in experts]))
    layer = 0 if mode == "cheap_embed" else None
    rows = []
    for expert in experts:
        negative = reader.encode(expert.negative, layer) if expert.negative else None
        row = gate_row(reader.encode(expert.positive, layer), negative, mode)
        if not float(row.norm()) > 0.5:
            raise UserError(
                f"expert '{expert.name}': its negative prompts cancel the positive ones, the gate row is zero. Change its prompts."
            )
        rows.append(row)
    return LinearGate(torch.stack(rows))


def random_row(seed: int, name: str, width: int, mode: str) -> torch.Tensor:
    """A row of `random` or `uniform_random`: float32 [width], a function of seed and name."""
    import torch

    state = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(state)
    if mode == "random":
        return torch.randn(width, generator=generator)
    uniform: torch.Tensor = (torch.rand(width, generator=generator) * 2 - 1) * width**-0.5
    return uniform


def _check_prompts(experts: Sequence[ExpertSpec], router: RouterSpec) -> None:
    if router.gate_mode in WITHOUT_PROMPTS:
        return
    seen: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    for expert in experts:
        if not expert.positive:
            raise UserError(f"expert '{expert.name}': has no positive prompts for the router. Give it prompts: {{positive: [...]}}.")
        twin = seen.setdefault((expert.positive, expert.negative), expert.name)
        if twin != expert.name:
            raise UserError(f"experts '{twin}' and '{expert.name}' have the same prompts, so no router can tell them apart. Change one.")


def prompt_logits(reader: Reader, experts: Sequence[ExpertSpec], gate: Gate, span: str) -> list[torch.Tensor]:
    """Router logits [prompts, experts] of every expert's own positive prompts, read as at routing time."""
    return [reader.logits(expert.positive, gate, span) for expert in experts]


def own_share(logits: Sequence[torch.Tensor]) -> float:
    """Share of the prompts of `prompt_logits` that reach their own expert: the mean over experts."""
    shares = [sum(winner(row) == number for row in own.tolist()) / len(own) for number, own in enumerate(logits)]
    return sum(shares) / len(shares)


def winner(logits: Sequence[float]) -> int:
    """The expert with the largest logit; of equal ones the first."""
    return max(range(len(logits)), key=lambda number: (logits[number], -number))


def worst_margin(logits: Sequence[torch.Tensor]) -> float:
    """Smallest lead, over all prompts of `prompt_logits`, of the own logit over the best other logit."""
    return min(
        float(row[number] - max(value for other, value in enumerate(row) if other != number))
        for number, own in enumerate(logits)
        for row in own.tolist()
    )
