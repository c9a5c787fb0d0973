"""A model becomes a base and a LoRA adapter: the difference of every weight, decomposed and truncated."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.adapters.low_rank import residual, truncated_svd
from modelglue.adapters.selection import Selection, select_tensors
from modelglue.adapters.written import adapter_config, fill_folder
from modelglue.checkpoint import (
    ENGINE_VERSION,
    Checkpoint,
    SafetensorsCheckpoint,
    TensorsCheckpoint,
    json_bytes,
    staged,
    tensor_file,
    torch_dtype,
    write_bytes_atomic,
    write_json_atomic,
)  # fmt: skip
from modelglue.checkpoint.adapter.keys import PREFIX
from modelglue.checkpoint.adapter.names import in_live_models, is_transposed
from modelglue.checkpoint.engine.workers import run_tasks
from modelglue.checkpoint.output.staging import check_apart
from modelglue.errors import CheckpointError, MergeError, UserError

if TYPE_CHECKING:
    import torch

#: what the extraction found, in the adapter's folder
EXTRACTION_FILE = "modelglue_extraction.json"
#: finished matrices, inside the half-done folder only
_PARTS = ".parts"
DEFAULT_RANK = 64
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor. `error`: ||difference - B A|| / ||difference||, measured on the factors as they are stored."""

    name: str
    kind: str
    rank: int = 0
    norm: float = 0.0
    error: float = 0.0
    stable_rank: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Extraction:
    """What `extract_lora` did."""

    directory: Path
    tensors: Sequence[TensorReport]
    rank: int
    bytes: int
    resumed: int
    warnings: Sequence[str]

    @property
    def error(self) -> float:
        """The share of the whole difference that is lost, over all tensors that were decomposed (root of summed squares)."""
        whole = sum(one.norm**2 for one in self.tensors)
        lost = sum((one.error * one.norm) ** 2 for one in self.tensors)
        return (lost / whole) ** 0.5 if whole else 0.0


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know."""

    model: Checkpoint
    base: Checkpoint
    folder: Path
    limits: dict[str, Any]
    distribute: bool
    transposed: bool
    stored: str


@dataclass(frozen=True)
class _Task:
    number: int
    name: str
    embedding: bool


def extract_lora(
    model: Checkpoint,
    base: Checkpoint,
    directory: str | Path,
    *,
    max_rank: int | None = None,
    sv_epsilon: float = 0.0,
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embed_lora: bool = False,
    distribute: bool = True,
    save_others: bool = True,
    exact: bool = False,
    fan_in_fan_out: bool | None = None,
    dtype: str = "float32",
    base_name: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Write an adapter that turns `base` into `model`, as nearly as its ranks allow: for every linear weight the best B A of its rank.

    The rank of each matrix is the smallest of: `max_rank` (64 unless another limit is given); the singular values above `sv_epsilon`; the
    fewest that carry the share `energy` of the squared difference. Differences are taken in float32. Where `max_rank` is below an eighth of
    a matrix's smaller side (and this above 256) a random sketch finds the directions, unless `exact`. Singular values are split between
    both factors, or stand in A (`distribute` False). Every update has scale 1.

    Tables of embeddings are saved whole where they have changed, or decomposed too (`embed_lora`). Norms, biases of other layers, tables
    of another size, and what the base lacks are saved whole in modules_to_save, or left out (`save_others` False). Biases of decomposed
    layers move with the update where all of these have one (lora_bias), else they replace the base's. `include` and `exclude`: globs on
    a module's name or its last part; what they leave out keeps the base's weights.

    Killed at any moment it continues when called again: finished matrices are kept. Equal inputs give equal bytes. Time: one
    decomposition per matrix. Memory, per worker: about four of the largest matrix in float32. `progress(done, total)` gets elements.

    Source: LoRA extraction as in mergekit; truncated SVD (Eckart and Young, 1936).
    """
    directory = Path(directory)
    _check(max_rank, sv_epsilon, energy, dtype)
    if max_rank is None and energy is None and sv_epsilon == 0:
        max_rank = DEFAULT_RANK
    check_apart(
        directory,
        [(str(source.describe().get("model")), place) for one in (model, base) for source in one.sources() for place in source.places],
    )
    transposed = is_transposed(model.config) if fan_in_fan_out is None else fan_in_fan_out
    limits = {"max_rank": max_rank, "sv_epsilon": sv_epsilon, "energy": energy, "exact": exact}
    kind = {"include": list(include), "exclude": list(exclude), "embed_lora": embed_lora, "save_others": save_others}
    recipe = [ENGINE_VERSION, model.stamp, base.stamp, limits, kind, distribute, transposed, dtype, base_name]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    with staged(directory, key=key, overwrite=overwrite) as folder:
        for checkpoint in (model, base):
            checkpoint.prepare()
        chosen = select_tensors(model, base, include=include, exclude=exclude, embed_lora=embed_lora, save_others=save_others)
        job = _Job(model, base, folder / _PARTS, limits, distribute, transposed, _STORED[dtype])
        found, resumed = _decompose_all(job, chosen, workers, progress)
        tensors, config, reports = _assembled(job, chosen, found, _name_of(base, base_name))
        size = fill_folder(folder, tensors, config, [_label(model), _label(base)])
        rank = max((one.rank for one in reports), default=0)
        warnings = tuple(chosen.warnings)
        result = Extraction(directory, reports, rank, size, resumed, warnings)
        record = {"tensors": [asdict(one) for one in reports], "rank": rank, "error": result.error, "bytes": size, "warnings": warnings}
        (folder / EXTRACTION_FILE).write_bytes(json_bytes(record))
        shutil.rmtree(job.folder, ignore_errors=True)
    return result


def _check(max_rank: int | None, sv_epsilon: float, energy: float | None, dtype: str) -> None:
    if max_rank is not None and max_rank < 1:
        raise UserError(f"the rank is {max_rank}; allowed is a whole number from 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"the energy is {energy}; allowed is a share above 0, up to 1.")
    if not 0 <= sv_epsilon < float("inf"):
        raise UserError(f"the threshold for singular values is {sv_epsilon}; allowed is a number from 0.")
    if dtype not in _STORED:
        raise UserError(f"dtype is '{dtype}'; allowed are {', '.join(_STORED)}.")


def _label(checkpoint: Checkpoint) -> str:
    return str(checkpoint.describe().get("model", "a merge"))


def _name_of(base: Checkpoint, given: str | None) -> str | None:
    """What the adapter calls its base: a hub id where there is one."""
    name = base.describe().get("model")
    return given or base.hub_id or (name if isinstance(name, str) else None)


# -- the decompositions ---------------------------------------------------------------------------------------------------------


def _decompose_all(
    job: _Job, chosen: Selection, workers: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, TensorReport], int]:
    """Every matrix, largest first, each kept on the disk when it is finished; and how many an earlier run had finished."""
    job.folder.mkdir(exist_ok=True)
    names = chosen.of("lora", "embedding")
    tasks = [_Task(number, name, chosen.kinds[name] == "embedding") for number, name in enumerate(names)]
    found = {task.name: report for task in tasks if (report := _finished(job, task)) is not None}
    resumed = len(found)
    total = sum(job.model.info(name).numel for name in names)
    done = sum(job.model.info(name).numel for name in found)
    if progress is not None:
        progress(done, total)

    def on_done(task: _Task, report: TensorReport) -> None:
        nonlocal done
        found[task.name] = report
        done += job.model.info(task.name).numel
        if progress is not None:
            progress(done, total)

    waiting = sorted((task for task in tasks if task.name not in found), key=lambda task: (-job.model.info(task.name).numel, task.name))
    run_tasks(_decompose, job, waiting, workers=workers, on_done=on_done)
    return found, resumed


def _paths(job: _Job, task: _Task) -> tuple[Path, Path]:
    return job.folder / f"{task.number}.safetensors", job.folder / f"{task.number}.json"


def _finished(job: _Job, task: _Task) -> TensorReport | None:
    """The report of a matrix that an earlier run has finished; it is written after the factors."""
    try:
        report = TensorReport(**json.loads(_paths(job, task)[1].read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return report if report.name == task.name else None


def _decompose(job: _Job, task: _Task) -> TensorReport:
    """One matrix: its difference, the factors as they are stored, and how far these are from it. Runs in a worker."""
    import torch

    stored = torch_dtype(job.stored)
    delta = _difference(job, task.name)
    flipped = task.embedding or job.transposed
    best = truncated_svd(delta.T if flipped else delta, seed=task.name, **job.limits)
    A, B = (factor.to(stored).contiguous() for factor in best.factors(distribute=job.distribute))
    if not bool(torch.isfinite(A).all()) or not bool(torch.isfinite(B).all()):
        raise MergeError(f"the factors of '{task.name}' do not fit {stored}. Store float32.")
    kind = "embedding" if task.embedding else "lora"
    report = TensorReport(task.name, kind)
    factors, summary = _paths(job, task)
    if best.rank:
        lost = residual(delta.T if flipped else delta, A, B)
        size = (A.numel() + B.numel()) * A.element_size()
        report = TensorReport(task.name, kind, best.rank, best.norm, lost / best.norm, best.stable_rank, size)
        write_bytes_atomic(factors, tensor_file(TensorsCheckpoint({"A": A, "B": B})))
    elif best.norm:
        report = TensorReport(task.name, kind, 0, best.norm, 1.0, best.stable_rank)
    write_json_atomic(summary, asdict(report))
    return report


def _difference(job: _Job, name: str) -> torch.Tensor:
    """W' - W in float32, as it is stored."""
    import torch

    ours, theirs = job.model.tensor(name), job.base.tensor(name)
    wide = torch.float64 if torch.float64 in (ours.dtype, theirs.dtype) else torch.float32
    delta = ours.to(wide, copy=True).sub_(theirs).to(torch.float32)
    if not bool(torch.isfinite(delta.sum())) and not bool(torch.isfinite(delta).all()):
        raise MergeError(f"the difference of '{name}' holds NaN or infinity. Repair the model or the base.")
    return delta


# -- the adapter ----------------------------------------------------------------------------------------------------------------


def _assembled(
    job: _Job, chosen: Selection, found: dict[str, TensorReport], base_name: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[TensorReport]]:
    """Tensors under PEFT's keys (views of the finished parts), the config, and a report on every tensor."""
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    reports: dict[str, TensorReport] = {}
    for number, name in enumerate(chosen.of("lora", "embedding")):
        report = found[name]
        reports[name] = report if report.norm else TensorReport(name, "equal")
        if not report.rank:
            continue
        module = name.removesuffix(".weight")
        ranks[module] = report.rank
        part = SafetensorsCheckpoint(job.folder / f"{number}.safetensors")
        for side in ("A", "B"):
            key = f"lora_embedding_{side}" if report.kind == "embedding" else f"lora_{side}.weight"
            tensors[f"{PREFIX}{module}.{key}"] = part.tensor(side)
    for name in chosen.of("saved"):
        tensors[f"{PREFIX}{name}"] = job.model.tensor(name)
        reports[name] = TensorReport(name, "saved", bytes=job.model.info(name).nbytes)
    if chosen.tied is not None:  # PEFT looks for both
        embedding, head = chosen.tied
        tensors[f"{PREFIX}{head}"] = job.model.tensor(embedding)
    moved, replaces = _biases(job, chosen, ranks, tensors, reports)
    for name in chosen.of("equal", "excluded", "left out", "tied"):
        reports[name] = TensorReport(name, chosen.kinds[name])
    if not tensors:
        raise CheckpointError(
            "model and base do not differ where the adapter may: there is nothing to extract. Check both paths, and the patterns."
        )
    config = adapter_config(
        ranks={in_live_models(module): rank for module, rank in ranks.items()},
        scale_one=max(ranks.values(), default=1),
        base=base_name,
        task_type=_task_type(job.model),
        fan_in_fan_out=job.transposed,
        lora_bias=moved,
        bias="lora_only" if replaces else "none",
        modules_to_save=[in_live_models(module) for module in chosen.saved_modules],
        tied=chosen.tied is not None,
    )
    tensors = {f"{PREFIX}{in_live_models(key.removeprefix(PREFIX))}": values for key, values in tensors.items()}
    return tensors, config, [reports[name] for name in sorted(reports)]


def _biases(
    job: _Job, chosen: Selection, ranks: dict[str, int], tensors: dict[str, torch.Tensor], reports: dict[str, TensorReport]
) -> tuple[bool, bool]:
    """Biases of updated layers: as updates if every updated layer has one, else as replacements. Whether there are some, of each."""
    import torch

    linear = [module for module in ranks if chosen.kinds[f"{module}.weight"] == "lora"]
    known = set(job.base.names())
    moves = len(linear) == len(ranks) and all(f"{module}.bias" in known for module in linear)
    for name in chosen.moved_biases:
        module = name.removesuffix(".bias")
        if module not in ranks:  # no singular value of the layer was worth keeping
            reports[name] = TensorReport(name, "left out")
            continue
        delta = job.model.tensor(name).float() - job.base.tensor(name).float()
        key = f"{PREFIX}{module}.lora_B.bias" if moves else f"{PREFIX}{module}.base_layer.bias"
        tensors[key] = delta.to(torch_dtype(job.stored)) if moves else job.model.tensor(name)
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        reports[name] = TensorReport(name, "bias", norm=norm, bytes=tensors[key].numel() * tensors[key].element_size())
    some = any(one.kind == "bias" for one in reports.values())
    for module in linear if some and moves else ():
        shape = job.base.info(f"{module}.bias").shape
        tensors.setdefault(f"{PREFIX}{module}.lora_B.bias", torch.zeros(shape, dtype=torch_dtype(job.stored)))
    return some and moves, some and not moves


def _task_type(model: Checkpoint) -> str | None:
    names = model.config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "ForSequenceClassification": "SEQ_CLS",
    }
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)
