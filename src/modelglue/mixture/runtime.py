"""A mixture directory that runs: text in, the expert's text out.

One decision per sample, taken from the prompt alone and kept for everything that follows; rows of one expert are batched together
and scattered back. Every expert has its own tokenizer, config and cache, so any model can be one.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.diagnostics import SelfTest, self_test
from modelglue.mixture.folder import ROUTER, Manifest, read_manifest
from modelglue.mixture.gates import Gate
from modelglue.mixture.router import Reader, winner
from modelglue.models import LiveTextModel, load_live, load_tokenizer

R = TypeVar("R")


@dataclass(frozen=True)
class Route:
    """Where one sample goes: the expert's number and name, its weight (1 at top-1), and all logits."""

    expert: int
    name: str
    weight: float
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Routed:
    """A continuation, and whose it is."""

    route: Route
    text: str


class Mixture:
    """The experts of a mixture directory behind its router; a `TextModel` like any single model.

    `residency`: `lazy` (default) loads an expert when it is first needed and keeps it, `all` loads them at once, `lru:N`
    keeps the N that were used last. Memory: the resident experts, and the encoder where it is none of them.
    """

    def __init__(self, directory: Path, manifest: Manifest, gate: Gate, residency: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.gate = gate
        self.truncated = 0
        self._residency = residency
        self._limit = _limit(residency, len(manifest.experts))
        self._resident: OrderedDict[str, LiveTextModel] = OrderedDict()
        if residency == "all":
            for expert in manifest.experts:
                self._text_model(expert.reference)

    @classmethod
    def load(cls, directory: str | Path, residency: str = "lazy") -> Mixture:
        """Open a mixture directory. Checks that every expert's contents are those that the mixture was made with."""
        directory = Path(directory)
        manifest, gate = read_manifest(directory)
        experts = [(f"expert '{expert.name}'", expert.reference, expert.identity) for expert in manifest.experts]
        for what, reference, identity in [*experts, ("encoder", manifest.encoder, manifest.encoder_identity)]:
            found = open_checkpoint(reference, relative_to=directory).identity
            if found != identity:
                raise CheckpointError(
                    f"{directory}: the {what} ({reference}) has changed since the mixture was made "
                    f"({found[:12]} instead of {identity[:12]}). Restore it, or make the mixture again."
                )
        return cls(directory, manifest, gate, residency)

    @property
    def identity(self) -> str:
        """SHA-256 of all that its answers depend on: experts, gate, and how it routes."""
        value = [
            [expert.identity for expert in self.manifest.experts], self.manifest.encoder_identity,
            {name: value.tolist() for name, value in self.gate.tensors().items()},
            self.manifest.router_layer, self.manifest.route_span,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    @property
    def experts(self) -> list[str]:
        return [expert.name for expert in self.manifest.experts]

    @cached_property
    def reader(self) -> Reader:
        """The encoder, loaded when it is first needed; an expert that stays resident anyway is not loaded twice."""
        reference = self.manifest.encoder
        if self._residency in ("all", "lazy") and reference in [expert.reference for expert in self.manifest.experts]:
            expert = self._text_model(reference)
            reader = Reader(expert.model, expert.tokenizer, self.manifest.router_layer)
        else:
            checkpoint = open_checkpoint(reference, relative_to=self.directory)
            reader = Reader(load_live(checkpoint), load_tokenizer(checkpoint), self.manifest.router_layer)
        if reader.width != self.gate.width:
            raise CheckpointError(
                f"{self.directory / ROUTER}: gate rows have {self.gate.width} values, the encoder's states {reader.width}. "
                "Make the mixture again."
            )
        return reader

    def route(self, texts: Sequence[str]) -> list[Route]:
        """The decision for every text: softmax over the gate's logits of the pooled state, the largest wins, ties go to the lower number.

        A text without any token goes to expert 0.
        """
        routes = [Route(0, self.experts[0], 1.0, ())] * len(texts)
        real = [number for number, readable in enumerate(self.reader.readable(texts)) if readable]
        logits = self.reader.logits([texts[number] for number in real], self.gate, self.manifest.route_span)
        for number, row in zip(real, (logits / self.manifest.temperature).tolist(), strict=True):
            routes[number] = Route(winner(row), self.experts[winner(row)], 1.0, tuple(row))
        return routes

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log probability, is greedy) of each continuation given its context; all choices of one context use one expert.

        Where there is no context, or the mixture's route_span is `full`, the continuation is routed on as well.
        """
        full = self.manifest.route_span == "full"
        routes = self.route([context + continuation if full or not context else context for context, continuation in pairs])
        return self._by_expert(routes, pairs, lambda model, rows: model.loglikelihood(rows))

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt by its expert, cut before the first stop string."""
        return [answer.text for answer in self.generate_routed(prompts, until=until, max_new_tokens=max_new_tokens)]

    def generate_routed(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[Routed]:
        """The same, and which expert each text is from."""
        routes = self.route(prompts)
        texts = self._by_expert(routes, prompts, lambda model, rows: model.generate(rows, until=until, max_new_tokens=max_new_tokens))
        return [Routed(route, text) for route, text in zip(routes, texts, strict=True)]

    def self_test(self) -> SelfTest:
        """Does every positive prompt reach its own expert?"""
        return self_test(self.reader, self.manifest.specs(self.directory), self.gate, self.manifest)

    def _by_expert(self, routes: Sequence[Route], rows: Sequence[Any], run: Callable[[LiveTextModel, list[Any]], list[R]]) -> list[R]:
        results: dict[int, R] = {}
        for number, expert in enumerate(self.manifest.experts):
            places = [place for place, route in enumerate(routes) if route.expert == number]
            if places:
                model = self._text_model(expert.reference)
                before = model.truncated
                results.update(zip(places, run(model, [rows[place] for place in places]), strict=True))
                self.truncated += model.truncated - before
        return [results[place] for place in range(len(rows))]

    def _text_model(self, reference: str) -> LiveTextModel:
        """A resident expert; one that is not is loaded after the one that was used longest ago has gone."""
        if reference not in self._resident:
            while len(self._resident) >= self._limit:
                self._resident.popitem(last=False)
            checkpoint = open_checkpoint(reference, relative_to=self.directory)
            self._resident[reference] = LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))
        self._resident.move_to_end(reference)
        return self._resident[reference]


def _limit(residency: str, experts: int) -> int:
    if residency in ("all", "lazy"):
        return experts
    kind, _, number = residency.partition(":")
    if kind == "lru" and number.isdecimal() and int(number) >= 1:
        return int(number)
    raise UserError(f"residency is '{residency}'; allowed is all, lazy or lru:N with N from 1.")
