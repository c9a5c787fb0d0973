"""The router of a mixture's file from scores: asked for, learned, held against the prompts, and written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from modelglue.checkpoint import Checkpoint
from modelglue.errors import RecipeError, UserError
from modelglue.mixture.gates import Gate
from modelglue.mixture.levels.gates import gates_for, reader_of
from modelglue.mixture.levels.recipe import MixRecipe, MixRouter
from modelglue.mixture.levels.requirements import Level
from modelglue.mixture.recorded import RecordedGates, RecordedRouter
from modelglue.mixture.router import WITHOUT_PROMPTS
from modelglue.mixture.routing import Fit, ScoredItems, learn_checked_gates, learn_router
from modelglue.mixture.spec import ExpertSpec, RouterSpec
from modelglue.mixture.trained import TrainedRouter
from modelglue.recipe import Document


class Scorer(Protocol):
    """Scores the experts on the items of `router.tasks`; mixtures know no tasks themselves."""

    def __call__(self, document: Document, router: MixRouter, experts: Mapping[str, Checkpoint], folder: Path | None) -> ScoredItems:
        """Raises RecipeError, in `router`, for tasks and a store that cannot be used."""


@dataclass(frozen=True)
class Learning:
    """A mixture's file, its experts, and who scores them."""

    document: Document
    recipe: MixRecipe
    opened: Mapping[str, Checkpoint]
    folder: Path | None
    scorer: Scorer | None

    @property
    def router(self) -> MixRouter:
        return self.recipe.router

    def complete(self, experts: Sequence[ExpertSpec], spec: RouterSpec, encoder: Path | None) -> CompleteRouter:
        """The router of complete models. RecipeError where neither scores nor prompts make one."""
        if self.router.learned is not None:
            known = {expert.name: expert.path for expert in experts}
            place = known.get(self.router.learned.encoder) or self.path(self.router.learned.encoder)
            try:
                return CompleteRouter(self.router.learned.trained(place, len(experts)), self.router, None)
            except UserError as error:
                raise self.fault("learned", str(error)) from error
        if not self.router.from_scores:
            return CompleteRouter(None, self.router.without_scores(), None)
        found = learn_router(experts, self._items(), spec, self._fit(), encoder=encoder, always=self.router.source == "scores")
        self._check(found.used and found.router is not None, found.message)
        decided = self.router.without_scores()
        if not found.used or found.router is None:
            return CompleteRouter(None, decided, found.to_json())
        names = {expert.path: expert.name for expert in experts}
        called = names.get(found.router.encoder) or str(self.router.encoder)
        decided = decided.model_copy(update={"learned": RecordedRouter.of(found.router, called)})
        return CompleteRouter(found.router, decided, found.to_json())

    def inside(
        self, level: Level, encoder: Checkpoint, experts: Sequence[ExpertSpec], layers: range, *, width: int
    ) -> tuple[Mapping[int, Gate], MixRouter, dict[str, Any] | None]:
        """(a gate for every layer that decides, the router as it was decided, what came of learning)."""
        router = self.router
        if router.layer_gates is not None:
            try:
                return router.layer_gates.gates(layers, len(experts)), router, None
            except UserError as error:
                raise self.fault("layer_gates", str(error)) from error
        decided, said = router.without_scores(), None
        if router.from_scores and level == "ffn":
            why = "at the level ffn, where scores of complete models say nothing about parts of layers"
            if router.source == "scores":
                raise self.fault("source", f"is scores, but the experts are joined {why} (level: auto). Say level: block or model.")
            said = {"used": False, "message": f"The router is from prompts {why}.", "training": None}
        elif router.from_scores:
            reader = reader_of(encoder, layers, width)
            reference = None
            if self._has_prompts:
                reference, _ = gates_for(encoder, experts, router.gate_mode, layers, width=width, seed=router.seed)
            found = learn_checked_gates(
                reader, self._items(), layers, self._fit(), reference=reference, span=router.route_span, always=router.source == "scores"
            )
            self._check(found.used and found.training is not None, found.message)
            said = found.to_json()
            if found.used and found.training is not None:
                return found.gates, decided.model_copy(update={"layer_gates": RecordedGates.of(found.gates, found.training)}), said
        gates, mode = gates_for(encoder, experts, router.gate_mode, layers, width=width, seed=router.seed)
        return gates, decided.model_copy(update={"gate_mode": mode}), said

    def path(self, reference: str) -> Path:
        """The folder of a model that the file names."""
        local = (self.folder or Path()) / reference
        return local if local.exists() else Path(reference)

    def fault(self, key: str, what: str) -> RecipeError:
        return RecipeError(self.document.fault(("router", key), what))

    @property
    def _has_prompts(self) -> bool:
        return self.router.gate_mode in WITHOUT_PROMPTS or all(one.prompts.positive for one in self.recipe.experts)

    def _fit(self) -> Fit:
        return Fit(kind=self.router.kind, objective=self.router.objective, hidden=self.router.hidden, seed=self.router.seed)

    def _items(self) -> ScoredItems:
        if self.scorer is None:
            raise self.fault("tasks", "needs the experts' scores, and nobody was given who scores. Use `modelglue mix`, or give a scorer.")
        return self.scorer(self.document, self.router, self.opened, self.folder)

    def _check(self, learned: bool, message: str) -> None:
        """Without a learned router there must be prompts, and leave to use them."""
        if learned:
            return
        if self.router.source == "scores":
            raise self.fault("source", f"is scores, but {message[0].lower()}{message[1:]} Give more tasks, or source: auto.")
        if not self._has_prompts:
            raise self.fault("tasks", f"{message} There are no prompts to make one from either: give them, or say source: scores.")


@dataclass(frozen=True)
class CompleteRouter:
    """The router of complete models."""

    trained: TrainedRouter | None
    """None: made from prompts."""
    decided: MixRouter
    said: dict[str, Any] | None
    """What came of learning; None where nothing was to be learned."""
