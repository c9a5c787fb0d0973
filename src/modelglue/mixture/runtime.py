"""A mixture directory that runs: text in, the expert's text out.

One decision per sample, taken from the prompt alone and kept for everything that follows; rows of one expert are batched together
and scattered back. Every expert has its own tokenizer, config and cache, so any model can be one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.blend import BlendedTextModel, BlendWriter, check_same_tokens
from modelglue.mixture.diagnostics import SelfTest, self_test
from modelglue.mixture.encoder import slim_reader
from modelglue.mixture.folder import ROUTER, Manifest, read_manifest
from modelglue.mixture.gates import Gate
from modelglue.mixture.residency import Residents, resident_limit
from modelglue.mixture.router import Reader
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from modelglue.models.mapped import load_mapped
from modelglue.models.sampling import Sampling
from modelglue.models.writer import Writer

R = TypeVar("R")

#: what is routed on where a text has no prompt and nothing else is said
_WITHOUT_PROMPT = "first:256"
Precision = Literal["float32", "stored"]


@dataclass(frozen=True)
class Route:
    """Where one sample goes: the expert's number and name, its weight (1 at top-1), and all logits."""

    expert: int
    name: str
    weight: float
    logits: tuple[float, ...]
    also: tuple[tuple[int, float], ...] = ()
    """(number, weight) of the other experts whose probabilities are mixed in, at a top_k above 1."""

    @property
    def key(self) -> tuple[int, ...]:
        """The numbers of all experts that answer, in their order; samples with equal keys may be batched together."""
        return tuple(sorted([self.expert, *(number for number, _ in self.also)]))

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the experts in `key`."""
        known = {self.expert: self.weight, **dict(self.also)}
        return tuple(known[number] for number in self.key)

    @property
    def margin(self) -> float | None:
        """Lead of the largest logit over the next one: how sure the router is. None where there was nothing to read."""
        if not self.logits:
            return None
        first, second = sorted(self.logits, reverse=True)[:2]
        return first - second


@dataclass(frozen=True)
class Routed:
    """A continuation, and whose it is."""

    route: Route
    text: str


class Mixture:
    """The experts of a mixture directory behind its router; a `TextModel` like any single model.

    `residency`: `lazy` (default) loads an expert when it is first needed and keeps it, `all` loads them at once, `lru:N`
    keeps the N that were used last. `dtype`: `float32` (default), or `stored`, in which weights stay in their files and are mapped.
    Memory: the resident experts, and of the encoder the layers below the router's in float32.
    """

    def __init__(self, directory: Path, manifest: Manifest, gate: Gate, residency: str, dtype: Precision = "float32") -> None:
        self.directory = directory
        self.manifest = manifest
        self.gate = gate
        self.truncated = 0
        self._dtype = dtype
        self._residents = Residents(self._load, resident_limit(residency, len(manifest.experts)))
        if manifest.top_k > self._residents.limit:
            raise UserError(
                f"residency is '{residency}', but this mixture asks {manifest.top_k} experts at once (top_k). Use lru:{manifest.top_k}."
            )
        if residency == "all":
            self._residents.get([expert.reference for expert in manifest.experts])

    @classmethod
    def load(cls, directory: str | Path, residency: str = "lazy", *, dtype: Precision = "float32") -> Mixture:
        """Open a mixture directory. Checks that every expert's contents are those that the mixture was made with."""
        directory = Path(directory)
        manifest, gate = read_manifest(directory)
        experts = [(f"expert '{expert.name}'", expert.reference, expert.identity) for expert in manifest.experts]
        for what, reference, identity in [*experts, ("encoder", manifest.encoder, manifest.encoder_identity)]:
            try:
                found = open_checkpoint(reference, relative_to=directory).identity
            except UserError as error:
                raise CheckpointError(f"{directory}: the {what} ({reference}) cannot be opened. {error}") from error
            if found != identity:
                raise CheckpointError(
                    f"{directory}: the {what} ({reference}) has changed since the mixture was made "
                    f"({found[:12]} instead of {identity[:12]}). Restore it, or make the mixture again."
                )
        if manifest.top_k > 1:
            check_same_tokens({one.name: open_checkpoint(one.reference, relative_to=directory) for one in manifest.experts})
        return cls(directory, manifest, gate, residency, dtype)

    @property
    def identity(self) -> str:
        """SHA-256 of all that its answers depend on: experts, gate, and how it routes."""
        value = [
            [expert.identity for expert in self.manifest.experts], self.manifest.encoder_identity,
            {name: value.tolist() for name, value in self.gate.tensors().items()},
            self.manifest.router_layer, self.manifest.route_span,
        ]  # fmt: skip
        if self.manifest.top_k > 1:  # else weights are 1, whatever the temperature
            value += [self.manifest.top_k, self.manifest.combine, self.manifest.temperature]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    @property
    def experts(self) -> list[str]:
        return [expert.name for expert in self.manifest.experts]

    @property
    def resident_limit(self) -> int:
        """Experts that may be in memory at once."""
        return self._residents.limit

    @cached_property
    def reader(self) -> Reader:
        """The encoder, loaded when it is first needed."""
        reader = slim_reader(open_checkpoint(self.manifest.encoder, relative_to=self.directory), self.manifest.router_layer)
        if reader.width != self.gate.width:
            raise CheckpointError(
                f"{self.directory / ROUTER}: gate rows have {self.gate.width} values, the encoder's states {reader.width}. "
                "Make the mixture again."
            )
        return reader

    def route(self, texts: Sequence[str]) -> list[Route]:
        """The decision for every text: softmax over the gate's logits of the pooled state, the `top_k` largest win and share a weight of 1.

        Of equal logits the lower number wins. A text without any token goes to expert 0.
        """
        return self._route(texts, [self.manifest.route_span] * len(texts))

    def _route(self, texts: Sequence[str], spans: Sequence[str]) -> list[Route]:
        routes = [Route(0, self.experts[0], 1.0, ())] * len(texts)
        readable = self.reader.readable(texts)
        for span in dict.fromkeys(spans):
            real = [number for number, own in enumerate(spans) if own == span and readable[number]]
            logits = self.reader.logits([texts[number] for number in real], self.gate, span) / self.manifest.temperature
            if not bool(logits.isfinite().all()):
                raise CheckpointError(
                    f"{self.directory}: the router's logits are not finite (its temperature is {self.manifest.temperature:g}), so none can "
                    "be chosen. Check the encoder's weights, or make the mixture again."
                )
            for number, row in zip(real, logits.tolist(), strict=True):
                routes[number] = self._decide(row)
        return routes

    def _decide(self, logits: Sequence[float]) -> Route:
        """Softmax, then top-K, then renormalised: the same as a softmax over the K largest logits."""
        order = sorted(range(len(logits)), key=lambda number: (-logits[number], number))[: self.manifest.top_k]
        shares = [math.exp(logits[number] - logits[order[0]]) for number in order]
        (first, weight), *also = [(number, share / sum(shares)) for number, share in zip(order, shares, strict=True)]
        return Route(first, self.experts[first], weight, tuple(logits), tuple(also))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log probability, is greedy) of each continuation given its context; all choices of one context use one expert.

        Where there is no context, the beginning of the continuation is routed on: its first 256 tokens, or what the mixture's
        route_span says. Where that is `full`, context and continuation are, and early tokens are scored with knowledge of later ones.
        """
        span = self.manifest.route_span
        spans = [_WITHOUT_PROMPT if span == "prompt" and not context else span for context, _ in pairs]
        full = span == "full"
        routes = self._route([context + continuation if full or not context else context for context, continuation in pairs], spans)
        return self._by_expert(routes, pairs, lambda model, rows: model.loglikelihood(rows))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        until: Sequence[str],
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy continuation of each prompt by its expert, cut before the first stop string."""
        return [answer.text for answer in self.generate_routed(prompts, until=until, max_new_tokens=max_new_tokens)]

    def generate_routed(
        self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int, sampling: Sampling | None = None, beams: int = 1
    ) -> list[Routed]:
        """The same, and which expert each text is from; drawn where there is a `sampling`, searched for with several `beams`."""
        routes = self.route(prompts)

        def run(model: LiveTextModel, rows: list[str]) -> list[str]:
            if beams == 1 and (sampling is None or sampling.greedy):
                return model.generate(rows, until=until, max_new_tokens=max_new_tokens)
            reader = model.blend if isinstance(model, BlendedTextModel) else None
            return Writer(model, reader).write(rows, until=until, max_new_tokens=max_new_tokens, sampling=sampling, beams=beams)

        texts = self._by_expert(routes, prompts, run)
        return [Routed(route, text) for route, text in zip(routes, texts, strict=True)]

    def writer(self, key: tuple[int, ...]) -> Writer:
        """What writes the texts of samples whose route has this key, a `BlendWriter` where it names several experts.

        Loads what is not resident, after what was used longest ago has gone; who holds on to a writer holds on to its experts.
        """
        models = self._models(key)
        return Writer(models[0]) if len(models) == 1 else BlendWriter(models, self.manifest.combine)

    def self_test(self) -> SelfTest:
        """Does every positive prompt reach its own expert?"""
        return self_test(self.reader, self.manifest.specs(self.directory), self.gate, self.manifest)

    def _by_expert(self, routes: Sequence[Route], rows: Sequence[Any], run: Callable[[LiveTextModel, list[Any]], list[R]]) -> list[R]:
        """Rows of one expert together, in the order of the experts; rows of several experts together where their weights are equal."""
        groups: dict[tuple[tuple[int, ...], tuple[float, ...]], list[int]] = {}
        for place, route in enumerate(routes):
            groups.setdefault((route.key, route.weights), []).append(place)
        results: dict[int, R] = {}
        for key, weights in sorted(groups):
            places = groups[key, weights]
            models = self._models(key)
            model = models[0] if len(models) == 1 else BlendedTextModel(models, weights, self.manifest.combine)
            before = model.truncated
            results.update(zip(places, run(model, [rows[place] for place in places]), strict=True))
            self.truncated += model.truncated - before
            del models, model  # the next expert may need their memory
        return [results[place] for place in range(len(rows))]

    def _models(self, key: Sequence[int]) -> list[LiveTextModel]:
        return self._residents.get([self.manifest.experts[number].reference for number in key])

    def _load(self, reference: str) -> LiveTextModel:
        checkpoint = open_checkpoint(reference, relative_to=self.directory)
        model = load_mapped(checkpoint) if self._dtype == "stored" else load_live(checkpoint)
        return LiveTextModel(model, load_tokenizer(checkpoint))
