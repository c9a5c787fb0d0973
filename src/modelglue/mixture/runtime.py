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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.diagnostics import SelfTest, self_test
from modelglue.mixture.folder import Manifest, read_manifest
from modelglue.mixture.router import Reader
from modelglue.models import LiveTextModel, load_live, load_tokenizer

if TYPE_CHECKING:
    import torch

R = TypeVar("R")


@dataclass(frozen=True)
class Route:
    """Where one sample goes: the expert's number and name, its weight (1 at top-1), and all logits."""

    expert: int
    name: str
    weight: float
    logits: tuple[float, ...]


class Mixture:
    """The experts of a mixture directory behind its router; a `TextModel` like any single model.

    `residency`: `lazy` (default) loads an expert when it is first needed and keeps it, `all` loads them at once, `lru:N`
    keeps the N that were used last. Memory: the resident experts and the encoder.
    """

    def __init__(self, directory: Path, manifest: Manifest, gate: torch.Tensor, residency: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.gate = gate
        self._limit = _limit(residency, len(manifest.experts))
        self._resident: OrderedDict[str, LiveTextModel] = OrderedDict()
        self._reader: Reader | None = None
        if residency == "all":
            for expert in manifest.experts:
                self._text_model(expert.reference)

    @classmethod
    def load(cls, directory: str | Path, residency: str = "lazy") -> Mixture:
        """Open a mixture directory. Checks that every expert's contents are those that the mixture was made with."""
        directory = Path(directory)
        manifest, gate = read_manifest(directory)
        for reference, identity in manifest.identities().items():
            found = open_checkpoint(reference, relative_to=directory).identity
            if found != identity:
                raise CheckpointError(
                    f"{directory}: the expert {reference} has changed since the mixture was made "
                    f"({found[:12]} instead of {identity[:12]}). "
                    "Restore it, or make the mixture again."
                )
        return cls(directory, manifest, gate, residency)

    @property
    def identity(self) -> str:
        """SHA-256 of all that its answers depend on: experts, gate, and how it routes."""
        value = [
            [expert.identity for expert in self.manifest.experts], self.manifest.encoder_identity, self.gate.tolist(),
            self.manifest.router_layer, self.manifest.route_span,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    @property
    def experts(self) -> list[str]:
        return [expert.name for expert in self.manifest.experts]

    @property
    def reader(self) -> Reader:
        """The encoder, loaded when it is first needed."""
        if self._reader is None:
            checkpoint = open_checkpoint(self.manifest.encoder, relative_to=self.directory)
            self._reader = Reader(load_live(checkpoint), load_tokenizer(checkpoint), self.manifest.router_layer)
        return self._reader

    def route(self, texts: Sequence[str]) -> list[Route]:
        """The decision for every text: softmax over gate * pooled state, the largest wins, ties go to the lower number.

        A text without any token goes to expert 0.
        """
        routes = [Route(0, self.experts[0], 1.0, ())] * len(texts)
        real = [number for number, text in enumerate(texts) if text.strip()]
        if real:
            features = self.reader.pooled([texts[number] for number in real], self.manifest.route_span)
            logits = features @ self.gate.T / self.manifest.temperature
            for number, row in zip(real, logits.tolist(), strict=True):
                expert = max(range(len(row)), key=lambda i: (row[i], -i))
                routes[number] = Route(expert, self.experts[expert], 1.0, tuple(row))
        return routes

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log probability, is greedy) of each continuation given its context; all choices of one context use one expert."""
        routes = self.route([context or continuation for context, continuation in pairs])
        return self._by_expert(routes, pairs, lambda model, rows: model.loglikelihood(rows))

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt by its expert, cut at the first stop string."""
        routes = self.route(prompts)
        return self._by_expert(routes, prompts, lambda model, rows: model.generate(rows, until=until, max_new_tokens=max_new_tokens))

    def self_test(self) -> SelfTest:
        """Does every positive prompt reach its own expert?"""
        return self_test(self.reader, self.manifest.specs(self.directory), self.gate, self.manifest)

    def _by_expert(self, routes: Sequence[Route], rows: Sequence[Any], run: Callable[[LiveTextModel, list[Any]], list[R]]) -> list[R]:
        results: dict[int, R] = {}
        for number, expert in enumerate(self.manifest.experts):
            places = [place for place, route in enumerate(routes) if route.expert == number]
            if places:
                answers = run(self._text_model(expert.reference), [rows[place] for place in places])
                results.update(zip(places, answers, strict=True))
        return [results[place] for place in range(len(rows))]

    def _text_model(self, reference: str) -> LiveTextModel:
        if reference not in self._resident:
            checkpoint = open_checkpoint(reference, relative_to=self.directory)
            self._resident[reference] = LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))
            while len(self._resident) > self._limit:
                self._resident.popitem(last=False)
        self._resident.move_to_end(reference)
        return self._resident[reference]


def _limit(residency: str, experts: int) -> int:
    if residency in ("all", "lazy"):
        return experts
    kind, _, number = residency.partition(":")
    if kind == "lru" and number.isdigit() and int(number) >= 1:
        return int(number)
    raise UserError(f"residency is '{residency}'; allowed is all, lazy or lru:N.")
