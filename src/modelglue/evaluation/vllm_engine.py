"""Candidates through vLLM, where it is installed: an engine instead of a module, and the same questions.

The engine is started once, with the first candidate saved to a temporary folder. The next candidates' weights are written into the running
engine where this version of vLLM allows it (`LLM.apply_model`), else each is saved and the engine is started anew.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import Checkpoint, save
from modelglue.errors import UserError
from modelglue.evaluation.resident import shape_of
from modelglue.models import TextEncoder, Unanswered, load_tokenizer

if TYPE_CHECKING:
    import torch


class VllmTextModel:
    """A running engine as a `TextModel`: contexts are encoded as everywhere here, answers are greedy."""

    def __init__(self, vllm: ModuleType, engine: Any, tokenizer: Any, limit: int, vocabulary: int) -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self._vllm = vllm
        self._encoder = TextEncoder(tokenizer, limit, vocabulary)

    @property
    def truncated(self) -> int:
        """Contexts that were cut so far."""
        return self._encoder.truncated

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(natural log probability, is it the greedy continuation), from the log probabilities of the prompt's tokens."""
        windows = self._encoder.rows(pairs)
        rows = [row for part in windows for row in part]
        self.tokens = [sum(len(row.ids) for row in part) for part in windows]
        scored = iter(self._ask([row.ids for row in rows], max_tokens=1, prompt_logprobs=1))
        found = []
        for part in windows:
            total, greedy = 0.0, True
            for row in part:
                logprobs = next(scored).prompt_logprobs
                for place in range(row.start, len(row.ids)):
                    entry = logprobs[place][row.ids[place]]
                    total += float(entry.logprob)
                    greedy &= entry.rank == 1
            found.append((total, greedy))
        return found

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, cut before the first stop string."""
        rows, steps = self._encoder.prompts(prompts, max_new_tokens)
        self.tokens = [0] * len(prompts)
        texts = [""] * len(prompts)
        places = [place for place, count in enumerate(steps) if count > 0]
        for count in sorted({steps[place] for place in places}):
            group = [place for place in places if steps[place] == count]
            answers = self._ask(
                [rows[place] for place in group], max_tokens=count, stop=[stop for stop in until if stop] or None, logprobs=0
            )
            for place, answer in zip(group, answers, strict=True):
                (output,) = answer.outputs
                sound = all(math.isfinite(entry.logprob) for step in output.logprobs or () for entry in step.values())
                texts[place] = str(output.text) if sound else Unanswered()
                self.tokens[place] = len(rows[place]) + len(output.token_ids)
        return texts

    def _ask(self, rows: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        settings = self._vllm.SamplingParams(temperature=0.0, **options)
        prompts = [{"prompt_token_ids": list(ids)} for ids in rows]
        answers: list[Any] = self.engine.generate(prompts, settings, use_tqdm=False)
        return answers


class VllmResident:
    """An engine that candidates pass through; a `resident` for `CandidateEvaluator`.

    `options` go to `vllm.LLM` (dtype, tensor_parallel_size, gpu_memory_utilization, ...). UserError where vLLM is not installed.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        # The engine must live in this process for its weights to be written, and what is written is a function of ours.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                f'scoring with vLLM needs the extra "vllm": pip install "modelglue[vllm]" ({error}). '
                "Without it candidates are scored by transformers."
            ) from error
        self._options = {"dtype": "auto", **(options or {})}
        self._shape: str | None = None
        self._content: str | None = None
        self._model: VllmTextModel | None = None
        self._discard: weakref.finalize[..., Any] | None = None  # the folder that the engine was started from

    def holding(self, checkpoint: Checkpoint, content: str) -> VllmTextModel:
        """The engine with the weights of `checkpoint`; `content` names them, so that the same ones are not loaded twice."""
        if self._model is None or self._content != content:
            shape = shape_of(checkpoint)
            self._content = None
            if self._model is None or shape != self._shape or not self._written(checkpoint):
                self._start(checkpoint)
                self._shape = shape
            self._content = content
        assert self._model is not None
        return self._model

    def _written(self, checkpoint: Checkpoint) -> bool:
        """Write the weights into the running engine; whether it lets us."""
        assert self._model is not None
        engine = self._model.engine
        if not hasattr(engine, "apply_model"):
            return False
        engine.apply_model(lambda model: model.load_weights(_weights(checkpoint)))
        engine.reset_prefix_cache()  # what it has read with the weights before
        return True

    def _start(self, checkpoint: Checkpoint) -> None:
        self._model = None  # the old engine goes before the new one comes
        gc.collect()
        if self._discard is not None:
            self._discard()
        folder = tempfile.mkdtemp(prefix="modelglue-vllm-")
        self._discard = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        save(checkpoint, Path(folder) / "model")
        engine = self._vllm.LLM(model=str(Path(folder) / "model"), **self._options)
        config = engine.llm_engine.model_config
        limit, vocabulary = int(config.max_model_len) - 1, int(config.get_vocab_size())  # it writes a token even where none is asked for
        self._model = VllmTextModel(self._vllm, engine, load_tokenizer(checkpoint), limit, vocabulary)


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, checkpoint.tensor(name)) for name in checkpoint.names())
