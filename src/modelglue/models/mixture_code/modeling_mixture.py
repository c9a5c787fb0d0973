"""A mixture of experts inside one causal language model: experts are feed-forward networks, or whole decoder layers.

This file stands beside the weights. It needs torch and transformers and nothing else. What a model shares between its experts
(embedding, head, norms, and at the level `ffn` attention) is transformers' own class, unchanged, and so are the experts' modules.

Router: p = softmax(W x / temperature) in float32 over all experts, the K largest (of equal ones the first), renormalised.
`token`: every position is routed by itself. `sample`: a row is routed once, by the mean over the real positions of its prompt, and
the decision is kept in the cache. Where nobody says how long the prompt is, the first 256 positions count.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_mixture import MixtureConfig, check

#: real positions that a text without a prompt is routed by
WITHOUT_PROMPT = 256
#: what versions of transformers call the cache
CACHE_NAMES = ("cache", "past_key_values")


class Router(nn.Module):
    """Logits [..., experts] of states [..., d], in float32: one matrix, or two with a ReLU between, with biases or without."""

    def __init__(self, width: int, experts: int, inner: int | None, bias: bool) -> None:
        super().__init__()
        steps = {"": (experts, width)} if inner is None else {"up_": (inner, width), "down_": (experts, inner)}
        for name, shape in steps.items():
            weight = nn.Parameter(torch.empty(shape))
            nn.init.normal_(weight, std=0.02)  # which whoever loads weights can leave out
            self.register_parameter(f"{name}weight", weight)
            self.register_parameter(f"{name}bias", nn.Parameter(torch.zeros(shape[0])) if bias else None)

    def forward(self, states: Tensor) -> Tensor:
        if "weight" in self._parameters:
            return self._step("", states.float())
        return self._step("down_", self._step("up_", states.float()).relu())

    def _step(self, name: str, states: Tensor) -> Tensor:
        weight, bias = getattr(self, f"{name}weight"), getattr(self, f"{name}bias")
        return nn.functional.linear(states, weight.float(), None if bias is None else bias.float())


class Routing:
    """How the layers of one model route, and what the forward pass at work knows of its rows."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.by_sample = settings["routing"] == "sample"
        self.once = settings["level"] == "model"  # the first mixed layer decides for all
        self.first: int = settings["merged_layers"]
        self.top_k: int = settings["top_k"]
        self.temperature: float = settings["temperature"]
        #: while training: "soft" runs all experts, "straight_through" gives the K best the gradient of p; None: as at inference
        self.train_gating: str | None = None
        self.pooled: Tensor | None = None
        self.cache: Any = None
        self.logits: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model starts without the rows of this one's last call."""
        return {**self.__dict__, "pooled": None, "cache": None, "logits": {}}

    def decide(self, layer: int, states: Tensor, router: Router | None, *, training: bool) -> Tensor:
        """Weights [B, experts] of the rows of `states` [B, T, d]: those of the prompt, where the prompt has been read before."""
        kept = None if self.cache is None else self.cache.layers[layer]
        if kept is not None and kept.weights is not None:
            self.logits[layer] = kept.logits
            decided: Tensor = kept.weights
            return decided
        if self.once and layer != self.first:
            logits = self.logits[self.first]
        else:
            assert router is not None
            logits = router(self._pool(states))
            if self.pooled is not None:  # a row of pads alone goes to expert 0
                logits = torch.where(self.pooled.any(dim=1)[:, None], logits, torch.zeros_like(logits))
        self.logits[layer] = logits
        weights = self.weights(logits, training=training)
        if kept is not None:
            kept.logits, kept.weights = logits, weights
        return weights

    def weights(self, logits: Tensor, *, training: bool) -> Tensor:
        """Float32 weights [N, experts] that sum to 1, zero for who is not chosen."""
        p = (logits.float() / self.temperature).softmax(dim=-1)
        if training and self.train_gating == "soft":
            return p
        best = p.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        chosen = torch.zeros_like(p).scatter(1, best, 1.0)
        weights = p * chosen / (p * chosen).sum(dim=-1, keepdim=True)
        if training and self.train_gating == "straight_through":
            weights = weights.detach() + (p - p.detach()) * chosen
        return weights

    def _pool(self, states: Tensor) -> Tensor:
        if self.pooled is None:
            return states.mean(dim=1)
        real = self.pooled[:, :, None]
        total = torch.where(real, states.float(), torch.zeros((), device=states.device)).sum(dim=1)
        return total / real.sum(dim=1).clamp(min=1)


class MixedLayer(DynamicLayer):  # type: ignore[misc]
    """What the cache keeps of a layer that is routed by sample: the decision, and keys and values of the experts that are at work.

    An expert's part holds only the rows that it serves, so parts may differ in shape. `clock` counts positions for all of them; at the
    level `ffn`, where attention is shared, it holds the keys and values themselves.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.empty = layer
        self.clock = copy.copy(layer)
        self.is_sliding = layer.is_sliding
        self.logits: Tensor | None = None
        self.weights: Tensor | None = None
        self.parts: dict[int, tuple[Any, Tensor]] = {}

    def part(self, expert: int, rows: Tensor | None, count: int) -> Any:
        """Keys and values of the rows that this expert serves (None: all of `count`)."""
        if expert not in self.parts:
            device = None if self.logits is None else self.logits.device
            self.parts[expert] = (copy.copy(self.empty), torch.arange(count, device=device) if rows is None else rows)
        return self.parts[expert][0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.clock.update(key_states, value_states, *args, **kwargs)

    def tick(self, states: Tensor) -> None:
        """Count the positions of `states` [B, T, d]; keys and values of the experts are in the parts."""
        nothing = states.new_zeros(len(states), 1, states.shape[1], 1)
        self.clock.update(nothing, nothing)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        return self.clock.get_mask_sizes(*args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return self.clock.get_seq_length(*args, **kwargs)

    @property
    def sliding_window(self) -> int:
        return int(getattr(self.empty, "sliding_window", 2**30))

    def reset(self) -> None:
        self.clock, self.logits, self.weights, self.parts = copy.copy(self.empty), None, None, {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        for layer in (self.clock, *(layer for layer, _ in self.parts.values())):
            layer.crop(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.logits is not None:
            self.batch_select_indices(torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.logits is not None:
            place = torch.full((len(self.logits),), -1, device=self.logits.device)
            indices = indices.to(place.device)
            for expert, (layer, rows) in list(self.parts.items()):
                place.fill_(-1)[rows] = torch.arange(len(rows), device=place.device)
                wanted = place[indices]
                served = (wanted >= 0).nonzero().flatten()
                layer.batch_select_indices(wanted[served])
                if len(served):
                    self.parts[expert] = (layer, served)
                else:
                    del self.parts[expert]
            self.logits = self.logits[indices]
            self.weights = None if self.weights is None else self.weights[indices]
        self.clock.batch_select_indices(indices)

    def __copy__(self) -> MixedLayer:
        made: MixedLayer = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.clock = copy.copy(self.clock)
        made.parts = {expert: (copy.copy(layer), rows) for expert, (layer, rows) in self.parts.items()}
        return made


class MixtureFeedForward(nn.Module):
    """Stands where a decoder layer has its feed-forward network."""

    def __init__(self, experts: list[nn.Module], router: Router, routing: Routing, layer: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.routing, self.layer = routing, layer

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """States [B, T, d] -> [B, T, d]."""
        count, width = states.shape[:-1].numel(), states.shape[-1]
        if self.routing.by_sample:
            weights = self.routing.decide(self.layer, states, self.router, training=self.training)
            weights = weights.repeat_interleave(states.shape[1], dim=0)
        else:
            logits = self.routing.logits[self.layer] = self.router(states.reshape(count, width))
            weights = self.routing.weights(logits, training=self.training)
        flat = [_flat(value, states) for value in (states, *args)]
        named = {key: _flat(value, states) for key, value in kwargs.items()}
        mixed = torch.zeros_like(flat[0])
        for number, rows in _served(weights):
            given, more = (flat, named) if rows is None else (_take(flat, rows, count), _take(named, rows, count))
            answer = self.experts[number](*given, **more)
            mixed = _added(mixed, rows, answer, weights[:, number])
        return mixed.view(states.shape)


class MixtureBlock(nn.Module):
    """Stands where a model has a decoder layer. Rows are grouped by expert; every expert has its own part of the cache."""

    def __init__(self, experts: list[nn.Module], rotary: list[Any], router: Router | None, routing: Routing, layer: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.rotary = nn.ModuleDict({str(number): module for number, module in enumerate(rotary) if module is not None})
        if router is not None:
            self.router = router
        self.routing, self.layer = routing, layer

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for their kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("router", "experts"):
                raise
            return getattr(self.experts[0], name)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """States [B, T, d] -> [B, T, d] (the first of a tuple where the layers of this class answer with one)."""
        count = len(states)
        router: Any = self._modules.get("router")
        weights = self.routing.decide(self.layer, states, router, training=self.training)
        kept = None if self.routing.cache is None else self.routing.cache.layers[self.layer]
        mixed, answer = torch.zeros_like(states), None
        for number, rows in _served(weights):
            given, named = (states, *args), kwargs
            if str(number) in self.rotary:
                named = {**named, "position_embeddings": self.rotary[str(number)](states, named["position_ids"])}
            if rows is not None:
                given, named = _take(given, rows, count), {key: _of_rows(key, value, rows, count) for key, value in named.items()}
            if kept is not None:
                view = copy.copy(self.routing.cache)
                view.layers = list(view.layers)
                view.layers[self.layer] = kept.part(number, rows, count)
                given = tuple(view if isinstance(value, Cache) else value for value in given)
                named = {key: view if isinstance(value, Cache) else value for key, value in named.items()}
            answer = self.experts[number](*given, **named)
            mixed = _added(mixed, rows, answer[0] if isinstance(answer, tuple) else answer, weights[:, number])
        if kept is not None:
            kept.tick(states)
        return (mixed, *(None for _ in answer[1:])) if isinstance(answer, tuple) else mixed


def _served(weights: Tensor) -> list[tuple[int, Tensor | None]]:
    """(expert, the rows that it serves; None: all) for every expert of [N, experts] that serves any."""
    at_work = weights != 0
    counts = at_work.sum(dim=0).tolist()
    return [(n, None if found == len(weights) else at_work[:, n].nonzero().flatten()) for n, found in enumerate(counts) if found]


def _added(mixed: Tensor, rows: Tensor | None, answer: Tensor, weights: Tensor) -> Tensor:
    """`mixed` and the weighted answer of an expert for these rows."""
    answer = answer.to(mixed.dtype)
    factors = (weights if rows is None else weights[rows]).to(answer.dtype).view(-1, *[1] * (answer.dim() - 1))
    return torch.addcmul(mixed, answer, factors) if rows is None else mixed.index_add(0, rows, answer * factors)


def _flat(value: Any, states: Tensor) -> Any:
    """Positions of all rows end to end, for whatever has the shape of states."""
    return value.reshape(-1, value.shape[-1]) if isinstance(value, Tensor) and value.shape[:-1] == states.shape[:-1] else value


def _of_rows(name: str, value: Any, rows: Tensor, count: int) -> Any:
    """What a decoder layer is given under a name, for these of `count` rows."""
    if name == "alibi" and isinstance(value, Tensor):  # [B * heads, 1, S]
        return value.view(count, -1, *value.shape[1:])[rows].flatten(0, 1)
    return value if name == "position_bias" else _take(value, rows, count)  # [heads, 1, S]


def _take(value: Any, rows: Tensor, count: int) -> Any:
    """These of `count` rows, of whatever has one entry for each."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == count else value
    if isinstance(value, tuple | list):
        return type(value)(_take(one, rows, count) for one in value)
    if isinstance(value, dict):
        return {key: _take(one, rows, count) for key, one in value.items()}
    return value


class Mixture:
    """In front of a causal language model of transformers: its layers from `merged_layers` on get experts."""

    config: Any
    routing: Routing
    backbone: Any
    stock_signature: Any
    forward: Any
    training: bool
    generation_config: Any
    _can_compile_fullgraph = False  # which experts are at work depends on the data

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = next(base for base in cls.__mro__[1:] if "forward" in vars(base) and not issubclass(base, Mixture))
        cls.backbone, cls.stock_signature = stock, inspect.signature(stock.forward)
        kept = getattr(stock, "_keep_in_fp32_modules_strict", None) or ()
        cls._keep_in_fp32_modules_strict = {*kept, "router"}  # type: ignore[attr-defined]
        names = list(cls.stock_signature.parameters.values())
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("prompt_length", "output_router_logits")
        ]
        at = len(names) - (names[-1].kind is inspect.Parameter.VAR_KEYWORD)

        def mixed(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._mixed_forward(args, kwargs)

        forward: Any = mixed
        forward.__doc__ = stock.forward.__doc__
        forward.__signature__ = cls.stock_signature.replace(parameters=[*names[:at], *extra, *names[at:]])
        cls.forward = forward

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check(config.mixture, config.get_text_config().num_hidden_layers)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        settings = config.mixture
        self.routing = Routing(settings)
        layers = self.get_submodule(settings["layers"])  # type: ignore[attr-defined]
        mixed = range(settings["merged_layers"], len(layers))
        path = settings["feed_forward"] if settings["level"] == "ffn" else None
        self._expert_configs, experts, rotary = [], [], []
        for number in range(len(settings["experts"])):
            own = config.of_expert(number)
            donor = self.backbone(own)
            blocks = donor.get_submodule(settings["layers"])
            experts.append({layer: blocks[layer] if path is None else blocks[layer].get_submodule(path) for layer in mixed})
            beside = donor.get_submodule(settings["layers"].rpartition(".")[0])
            rotary.append(beside.rotary_emb if settings["experts"][number].get("own_positions") else None)
            self._expert_configs += [own] if own is not config else []
        for layer in mixed:
            chosen = [own[layer] for own in experts]
            router = None
            if settings["level"] != "model" or layer == settings["merged_layers"]:
                router = Router(config.get_text_config().hidden_size, len(experts), settings["router_width"], settings["router_bias"])
            if path is None:
                layers[layer] = MixtureBlock(chosen, rotary, router, self.routing, layer)
            else:
                assert router is not None
                parent, _, name = path.rpartition(".")
                setattr(layers[layer].get_submodule(parent), name, MixtureFeedForward(chosen, router, self.routing, layer))
        self.post_init()  # type: ignore[attr-defined]

    @property
    def routes_prompts(self) -> bool:
        """Whether who calls should say how long the prompt is, and read it in one piece."""
        return bool(self.routing.by_sample)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, told where the prompt ends."""
        if self.routing.by_sample and self.config.mixture["compat"] == "official":
            kwargs["use_cache"] = False
        elif self.routing.by_sample:
            ids = next((kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None), inputs)
            chunked = kwargs.get("prefill_chunk_size") or getattr(kwargs.get("generation_config"), "prefill_chunk_size", None)
            if chunked or self.generation_config.prefill_chunk_size:
                raise ValueError("this mixture routes by the whole prompt: leave prefill_chunk_size out.")
            if ids is not None:
                kwargs.setdefault("prompt_length", ids.shape[1])
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _mixed_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stock = self.backbone.forward
        bound = self.stock_signature.bind_partial(self, *args).arguments
        bound.pop("self", None)
        kwargs = {**bound, **kwargs}
        prompt, wants_logits = kwargs.pop("prompt_length", None), kwargs.pop("output_router_logits", None)
        settings, official = self.config.mixture, self.config.mixture["compat"] == "official"
        if settings["level"] != "ffn" and kwargs.get("output_hidden_states"):
            raise ValueError("hidden states are not recorded where decoder layers are experts: leave output_hidden_states out.")
        for own in self._expert_configs:
            own._attn_implementation = self.config._attn_implementation
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        mask: Any = kwargs.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.dim() == 2
        real = mask[:, -tokens.shape[1] :].bool() if plain else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if plain and not official and kwargs.get("position_ids") is None and "position_ids" in self.stock_signature.parameters:
            kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        self.routing.logits = {}
        if self.routing.by_sample:
            self.routing.pooled = None if official else self._pooled(real, prompt, has_loss=kwargs.get("labels") is not None)
            self.routing.cache = self._routed_cache(kwargs, official=official)
        try:
            output = stock(self, **kwargs)
        finally:
            self.routing.cache = None  # whoever called has it now
        if wants_logits and not isinstance(output, tuple):
            output["router_logits"] = self._all_logits(tokens.shape[1])
        return output

    def _pooled(self, real: Tensor, prompt: int | None, *, has_loss: bool) -> Tensor:
        """[B, T]: the positions that a row is routed by."""
        span = self.config.mixture["route_span"]
        if prompt is not None:
            real = real & (torch.arange(real.shape[1], device=real.device) < prompt)
        if span == "full":
            if has_loss:
                warnings.warn("route_span is full: early positions of this loss depend on later text.", stacklevel=4)
            return real
        if span == "prompt" and prompt is not None:
            return real
        most = WITHOUT_PROMPT if span == "prompt" else int(span.removeprefix("first:"))
        return real & (real.cumsum(dim=1) <= most)

    def _routed_cache(self, kwargs: dict[str, Any], *, official: bool) -> Any:
        """The cache of this call (None without one), with a place for the decision in every mixed layer."""
        name = next(name for name in CACHE_NAMES if name in self.stock_signature.parameters)
        for other in CACHE_NAMES:
            if other != name and other in kwargs:
                kwargs[name] = kwargs.pop(other)
        if official:
            if kwargs.get(name) is not None and kwargs[name].get_seq_length():
                raise ValueError("compat: official routes every call anew and has no cache: use use_cache=False.")
            kwargs[name], kwargs["use_cache"] = None, False
            return None
        cache, wanted = kwargs.get(name), kwargs.get("use_cache")
        if cache is None:
            if wanted is False or (wanted is None and not self.config.use_cache) or self.training:
                kwargs["use_cache"] = False
                return None
            cache = kwargs[name] = DynamicCache(config=self.config)
        count = self.config.get_text_config().num_hidden_layers
        while len(cache.layers) < count:
            cache.layers.append(DynamicLayer())
        for layer in range(self.routing.first, count):
            found = cache.layers[layer]
            if isinstance(found, MixedLayer):
                continue
            if not isinstance(found, DynamicLayer) or found.get_seq_length():
                raise ValueError(
                    f"this mixture needs a DynamicCache that it has filled itself, layer {layer} holds {type(found).__name__}."
                )
            cache.layers[layer] = MixedLayer(found)
        return cache

    def _all_logits(self, length: int) -> tuple[Tensor, ...]:
        """Of every layer that decides: [B*T, experts] at the level ffn, else [B, experts]."""
        repeat = length if self.routing.by_sample and self.config.mixture["level"] == "ffn" else 1
        return tuple(
            logits.repeat_interleave(repeat, dim=0)
            for layer, logits in sorted(self.routing.logits.items())
            if layer == self.routing.first or not self.routing.once
        )


class MixtureForCausalLM(Mixture, LlamaForCausalLM):  # type: ignore[misc]
    config_class = MixtureConfig
