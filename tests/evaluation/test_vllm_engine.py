"""Candidates through vLLM: here a module that has its interface and does what a transformers model does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import UserError
from modelglue.evaluation import CandidateEvaluator, ScoreStore, TaskSet, VllmResident
from modelglue.models import load_live, load_tokenizer
from modelglue.recipe import Candidate
from tests.small_zoo import TINY_ZOO, write_tasks

NAMES = ("reverse", "larger", "stranger")


class SamplingParams(SimpleNamespace):
    """Every option that is not one of vLLM's would be refused by it."""

    def __init__(self, **options: Any) -> None:
        assert set(options) <= {"temperature", "max_tokens", "prompt_logprobs", "stop", "logprobs"}
        super().__init__(**{"stop": None, "prompt_logprobs": None, "logprobs": None, **options})


class LLM:
    """The part of `vllm.LLM` that is used, on a transformers model."""

    started: ClassVar[list[LLM]] = []
    nan = False

    def __init__(self, model: str, **options: Any) -> None:
        self.options, self.resets, self.updates = options, 0, 0
        checkpoint = open_checkpoint(model)
        self._model, self._tokenizer = load_live(checkpoint), load_tokenizer(checkpoint)
        size, positions = self._model.config.vocab_size, self._model.config.max_position_embeddings
        config = SimpleNamespace(max_model_len=positions, get_vocab_size=lambda: size)
        self.llm_engine = SimpleNamespace(model_config=config)
        LLM.started.append(self)

    def apply_model(self, function: Callable[[Any], Any]) -> None:
        self.updates += 1
        function(SimpleNamespace(load_weights=self._load))

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        places = self._model.state_dict()
        for name, value in weights:
            places[name].copy_(value)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Mapping[str, Any]], settings: SamplingParams, use_tqdm: bool) -> list[SimpleNamespace]:
        assert settings.temperature == 0
        assert not use_tqdm
        return [self._answer(list(prompt["prompt_token_ids"]), settings) for prompt in prompts]

    def _answer(self, ids: list[int], settings: SamplingParams) -> SimpleNamespace:
        assert len(ids) + settings.max_tokens <= self.llm_engine.model_config.max_model_len
        logprobs = self._logprobs(ids)
        seen: list[dict[int, Any] | None] = [None]
        for place in range(1, len(ids)):
            row = logprobs[place - 1]
            seen.append({token: self._entry(row, token) for token in {ids[place], int(row.argmax())}})
        written: list[int] = []
        steps: list[dict[int, Any]] = []
        text = ""
        while len(written) < settings.max_tokens:
            row = self._logprobs([*ids, *written])[-1]
            token = int(row.argmax())
            steps.append({token: self._entry(row, token)})
            if token == self._tokenizer.eos_token_id:
                break
            written.append(token)
            text = self._tokenizer.decode(written, skip_special_tokens=True)
            if found := [stop for stop in settings.stop or () if stop in text]:
                text = text[: min(text.index(stop) for stop in found)]
                break
        output = SimpleNamespace(text=text, token_ids=written, logprobs=steps if settings.logprobs is not None else None)
        return SimpleNamespace(prompt_logprobs=seen if settings.prompt_logprobs is not None else None, outputs=[output])

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return logits

    def _entry(self, row: torch.Tensor, token: int) -> SimpleNamespace:
        value = float("nan") if LLM.nan else float(row[token])
        return SimpleNamespace(logprob=value, rank=1 + int((row > row[token]).sum()))


class Rigid(LLM):
    """An older version: its weights are what it was started with."""

    apply_model = property()  # type: ignore[assignment]


@pytest.fixture(params=[LLM, Rigid])
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=request.param, SamplingParams=SamplingParams))  # type: ignore[arg-type]
    monkeypatch.setattr(LLM, "started", [])
    monkeypatch.setattr(LLM, "nan", False)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_INSECURE_SERIALIZATION"):
        monkeypatch.setenv(name, "")
    kind: type[LLM] = request.param
    return kind


@pytest.fixture(scope="module")
def models() -> Mapping[str, Checkpoint]:
    return {name: open_checkpoint(TINY_ZOO / "models" / name) for name in NAMES}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    return TaskSet.load(["reverse_proxy", "larger_proxy"], write_tasks(tmp_path_factory.mktemp("tasks"), items=6))


CANDIDATES = [Candidate.single("reverse"), Candidate.linear({"reverse": 1, "larger": 1}), Candidate.single("stranger")]


def test_scores_are_those_of_transformers(models: Mapping[str, Checkpoint], tasks: TaskSet, vllm: type[LLM]) -> None:
    """Values, losses and tokens; the second candidate goes into the running engine, where that is allowed, and the third needs another."""
    with ScoreStore(":memory:") as store:
        resident = VllmResident({"gpu_memory_utilization": 0.5})
        evaluator = CandidateEvaluator(models, tasks, store, resident=resident)
        found = [evaluator.evaluate(candidate) for candidate in CANDIDATES]
        again = evaluator.evaluate(CANDIDATES[0])
    with ScoreStore(":memory:") as store:
        plain = CandidateEvaluator(models, tasks, store)
        for scores, candidate in zip(found, CANDIDATES, strict=True):
            expected = plain.evaluate(candidate)
            assert scores.items == expected.items
            assert scores.losses["larger"] == pytest.approx(expected.losses["larger"], abs=1e-4)
            assert scores.cost.tokens == expected.cost.tokens
    assert again == found[0]
    engines = LLM.started
    assert [(engine.updates, engine.resets) for engine in engines] == ([(1, 1), (0, 0)] if vllm is LLM else [(0, 0)] * 3)
    assert all(engine.options == {"dtype": "auto", "gpu_memory_utilization": 0.5} for engine in engines)


def test_numbers_that_are_none(models: Mapping[str, Checkpoint], tasks: TaskSet, vllm: type[LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "nan", True)
    with ScoreStore(":memory:") as store:
        scores = CandidateEvaluator(models, tasks, store, resident=VllmResident()).evaluate(CANDIDATES[0])
    assert (scores.status, scores.mean) == ("invalid", 0.0)
    assert len(scores.warnings) == 2


def test_saved_candidates_do_not_pile_up(
    models: Mapping[str, Checkpoint], vllm: type[LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelglue.evaluation.vllm_engine.tempfile.tempdir", str(tmp_path))
    resident = VllmResident()
    for name in NAMES:
        resident.holding(models[name], name)
        assert len(list(tmp_path.iterdir())) == 1


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_INSECURE_SERIALIZATION"):
        monkeypatch.setenv(name, "")
    with pytest.raises(UserError, match=r'scoring with vLLM needs the extra "vllm": pip install "modelglue\[vllm\]" \('):
        VllmResident()
