"""Candidates of a search, built in memory and scored: nothing is written but the scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import ENGINE_VERSION, Checkpoint, file_bytes
from modelglue.evaluation.scoring import BatchListener, score_text_model
from modelglue.evaluation.store import ScoreStore
from modelglue.evaluation.tasks import TaskSet
from modelglue.models import LiveTextModel, load_into, load_live, load_tokenizer
from modelglue.recipe import Candidate, Scores, build, read_recipe

if TYPE_CHECKING:
    from modelglue.models import TextModel


class ResidentModel:
    """One live model that checkpoints pass through: equal shapes are loaded in place, others take its room.

    Memory: one model in float32 and its inputs' mapped pages, however many candidates are scored.
    """

    def __init__(self) -> None:
        self._shape: str | None = None
        self._content: str | None = None
        self._model: LiveTextModel | None = None

    def holding(self, checkpoint: Checkpoint, content: str) -> LiveTextModel:
        """The live model with the weights of `checkpoint`; `content` names them, so that the same ones are not loaded twice."""
        if self._model is None or self._content != content:
            shape = _shape(checkpoint)
            self._content = None  # should loading fail half-way, nothing is held
            if self._model is None or shape != self._shape:
                self._model = None  # the old one goes before the new one comes
                self._model = LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))
                self._shape = shape
            else:
                load_into(checkpoint, self._model.model)
            self._content = content
        return self._model


class CandidateEvaluator:
    """Scores candidates over the members `checkpoints` on one task set; an `Evaluator` for every search.

    `store_dtype` is what merges are stored in (default: as the first member is stored); a candidate is scored with the rounding that its
    saved form would have. Evaluators of several task sets may share one `resident` model.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        tasks: TaskSet,
        store: ScoreStore,
        *,
        store_dtype: str | None = None,
        resident: ResidentModel | None = None,
        on_batch: BatchListener | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._task_set = tasks
        self._store = store
        self._store_dtype = store_dtype
        self._resident = resident or ResidentModel()
        self._on_batch = on_batch

    @property
    def tasks(self) -> Sequence[str]:
        """The skills, in order."""
        return list(self._task_set.skills)

    def evaluate(self, candidate: Candidate) -> Scores:
        """Per-item scores; computes only what the store does not have."""
        identity = self.identity(candidate)
        scores = score_text_model(
            self._live(candidate, identity), identity, self._task_set, self._store, description=candidate.key, on_batch=self._on_batch
        )
        return replace(scores, warnings=tuple(f"{candidate.describe()}: {warning}" for warning in scores.warnings))

    def identity(self, candidate: Candidate) -> str:
        """SHA-256 (hex) that changes with any member's content, any coefficient (at 1e-6), the method, or the stored dtype.

        A member by itself has the identity of its checkpoint, so its scores are shared with every other use of the model.
        """
        contents = {alias: self._checkpoints[alias].identity for alias in candidate.aliases}
        if candidate.alone is not None:
            return contents[candidate.alone]
        recipe = [ENGINE_VERSION, candidate.key_over(contents), self._store_dtype]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def _live(self, candidate: Candidate, identity: str) -> Callable[[], TextModel]:
        return lambda: self._resident.holding(self._expression(candidate), identity)

    def _expression(self, candidate: Candidate) -> Checkpoint:
        if candidate.alone is not None:
            return self._checkpoints[candidate.alone]
        recipe = dict(candidate.recipe)
        if self._store_dtype is not None:
            recipe["dtype"] = {"store": self._store_dtype}
        return build(read_recipe(recipe), resolve=self._checkpoints.__getitem__)


def _shape(checkpoint: Checkpoint) -> str:
    """All that a live model is built from besides the weights: config, tensor shapes, tokenizer."""
    shapes: list[Any] = [[name, list(checkpoint.info(name).shape)] for name in checkpoint.names()]
    files = {name: hashlib.sha256(file_bytes(file)).hexdigest() for name, file in sorted(checkpoint.files.items())}
    config = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "torch_dtype")}
    return hashlib.sha256(json.dumps([shapes, files, config], sort_keys=True).encode()).hexdigest()
