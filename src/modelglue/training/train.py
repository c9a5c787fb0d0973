"""A small trainer: the expanded blocks of a stack, the routers of a mixture, or a whole model, on text files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import Checkpoint, JoinedCheckpoint, RenamedCheckpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.checkpoint.output.staging import check_free
from modelglue.errors import RunError, UserError
from modelglue.mixture.routing.gradient import schedule
from modelglue.mixture.routing.texts import GatedModel, Row
from modelglue.models import load_live, load_tokenizer
from modelglue.training.chosen import Which, is_router, live_parameters, names_of, trained_tensors
from modelglue.training.settings import Training
from modelglue.training.state import RunState
from modelglue.training.texts import loss_of, rows_from, targets

if TYPE_CHECKING:
    import torch

#: a model below this many parameters is trained in one thread, so that equal inputs give equal bits on every machine
_SMALL = 2**26
#: norm of the first gradient below which it is rounding errors, of which AdamW would make steps of full size
_NO_GRADIENT = 1e-6


@dataclass(frozen=True)
class TrainReport:
    """What `train` did. `losses`: the mean loss of every step, in nats a token, the first of them before anything has changed."""

    directory: Path
    trained: tuple[str, ...]
    rows: int
    losses: tuple[float, ...]
    resumed_steps: int


def train(
    model: str | Checkpoint,
    texts: Sequence[str | Path],
    out: str | Path,
    *,
    tensors: Which = "all",
    training: Training | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainReport:
    """Train the named tensors of a model on texts and write the whole model; what is not named keeps its bytes.

    `tensors`: `new` (the layers that a stack says begin as the identity), `routers`, `all`, or names on disk. A text file is cut into
    rows of `context` tokens; lines of a `.jsonl` are {"text"} or {"prompt", "response"}, of which the response is learned. No dropout;
    batches are drawn by seed. `progress(step, steps, loss)` is called after every step.

    Killed at any moment, it continues from the last state (every `keep_every` steps) when it is called again with the same inputs; on one
    thread with the same bits as a run that was not disturbed. Other inputs start afresh. Memory: the model in float32, activations of a
    micro batch, and three times what is trained. Time: one forward and backward pass of all tokens for an epoch.

    Raises UserError for texts, names and settings that cannot be, and for an output that is there already; RunError for a loss that is
    no number (nothing is written).
    """
    training = training or Training()
    source = open_checkpoint(model) if isinstance(model, str) else model
    out = Path(out)
    check_free(out, overwrite)
    names = names_of(source, tensors)
    rows = rows_from([Path(text) for text in texts], load_tokenizer(source), training.context)
    live = load_live(source)
    lives = live_parameters(source, live, names)
    described = {"tensors": tensors if isinstance(tensors, str) else names, **training.what_decides()}
    state = RunState(out, _key(source, names, rows, training))
    small = sum(parameter.numel() for parameter in live.parameters()) < _SMALL
    with _one_thread() if small else contextlib.nullcontext():
        losses, resumed = _Loop(live, lives, rows, training, state).run(progress)
    changed = trained_tensors(source, live, lives)
    kept = RenamedCheckpoint(source, {name: name for name in source.names() if name not in changed})
    parts: list[tuple[str, Checkpoint]] = [("", kept), ("", TensorsCheckpoint(changed))]
    description = {"training": described, "texts": _digest(rows), "of": source.describe()}
    made = JoinedCheckpoint(parts, source.config, description, files=source.files, donors=[source])
    save(made, out, overwrite=overwrite)
    state.remove()
    return TrainReport(out, tuple(names), len(rows), tuple(losses), resumed)


class _Loop:
    def __init__(
        self, model: Any, lives: Mapping[str, torch.nn.Parameter], rows: Sequence[Row], training: Training, state: RunState
    ) -> None:
        import torch

        self._model = model.to(training.device)
        self._lives, self._rows, self._training, self._state = lives, rows, training, state
        self._per_epoch = math.ceil(len(rows) / training.batch)
        self._steps = training.steps if training.steps is not None else self._per_epoch * training.epochs
        self._order: tuple[int, list[int]] = (-1, [])
        self._gated = GatedModel(model) if hasattr(model, "routing") else None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in lives.values():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)  # an expert that sees no token has one, too
        matrices, vectors = ([value for value in lives.values() if (value.dim() > 1) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": training.decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=training.rate, betas=(0.9, 0.95))

    def run(self, progress: Callable[[int, int, float], None] | None) -> tuple[list[float], int]:
        """The losses of all steps, and how many of these were made before."""
        import torch

        start, losses = self._resume()
        if self._gated is not None and any(is_router(name) for name in self._lives):
            self._gated.gating(self._training.gating)
        for step in range(start, self._steps):
            for group in self._optimiser.param_groups:
                group["lr"] = self._training.rate * schedule(step, self._steps, self._training.warm_up)
            self._optimiser.zero_grad(set_to_none=False)
            losses.append(self._gradient(self._batch(step)))
            if not math.isfinite(losses[-1]):
                raise RunError(f"training: the loss of step {step + 1} is {losses[-1]}. Check the texts, or lower the rate.")
            norm = torch.nn.utils.clip_grad_norm_(list(self._lives.values()), self._training.clip)
            if step == 0 and norm < _NO_GRADIENT:
                raise UserError(
                    "training: no gradient reaches what is trained, so nothing would be learned. A router with one expert at work "
                    "(top_k 1), whose weight is always 1, has none: use gating soft, or train more than the routers."
                )
            self._optimiser.step()
            if progress is not None:
                progress(step + 1, self._steps, losses[-1])
            if (step + 1) % self._training.keep_every == 0 or step + 1 == self._steps:
                self._state.write(step + 1, losses, self._values())
        return losses, start

    def _gradient(self, rows: Sequence[Row]) -> float:
        """Leave the gradient of the batch's mean loss in the parameters; that loss."""
        import torch

        wanted, total, size = sum(map(targets, rows)), 0.0, self._training.micro_batch
        half = torch.autocast(self._training.device.partition(":")[0], torch.bfloat16, enabled=self._training.precision == "bfloat16")
        for at in range(0, len(rows), size):
            with torch.enable_grad(), half:
                loss = self._loss(rows[at : at + size]) / wanted
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _loss(self, rows: Sequence[Row]) -> torch.Tensor:
        return loss_of(self._model, rows) if self._gated is None else self._gated.loss(rows)

    def _batch(self, step: int) -> list[Row]:
        """The rows of a step: all texts once in an epoch, in an order that depends on the seed and the epoch alone."""
        import torch

        epoch, at = divmod(step, self._per_epoch)
        if self._order[0] != epoch:
            seed = hashlib.sha256(f"{self._training.seed}/{epoch}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            self._order = (epoch, torch.randperm(len(self._rows), generator=generator).tolist())
        size = self._training.batch
        return [self._rows[number] for number in self._order[1][at * size : (at + 1) * size]]

    def _values(self) -> dict[str, torch.Tensor]:
        found = {f"weight.{name}": value.detach() for name, value in self._lives.items()}
        for name, value in self._lives.items():
            found |= {f"{moment}.{name}": self._optimiser.state[value][moment] for moment in ("exp_avg", "exp_avg_sq")}
        return found

    def _resume(self) -> tuple[int, list[float]]:
        import torch

        found = self._state.read()
        if found is None:
            return 0, []
        step, losses, values = found
        with torch.no_grad():
            for name, value in self._lives.items():
                value.copy_(values[f"weight.{name}"])
                moments = {moment: values[f"{moment}.{name}"].to(value.device) for moment in ("exp_avg", "exp_avg_sq")}
                self._optimiser.state[value] = {"step": torch.tensor(float(step)), **moments}
        return step, losses


def _one_thread() -> contextlib.AbstractContextManager[None]:
    from modelglue.checkpoint.engine.workers import single_thread

    return single_thread()


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([[row.prompt, row.response] for row in rows]).encode()).hexdigest()


def _key(source: Checkpoint, names: Sequence[str], rows: Sequence[Row], training: Training) -> str:
    """What a state belongs to."""
    return hashlib.sha256(json.dumps([source.stamp, list(names), _digest(rows), training.what_decides()]).encode()).hexdigest()
