"""The entries of an expert that differ most from a base, in a folder that `SparseCheckpoint` reads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelglue.checkpoint import (
    FLOATING,
    Checkpoint,
    JoinedCheckpoint,
    RenamedCheckpoint,
    SafetensorsCheckpoint,
    TensorsCheckpoint,
    json_bytes,
    staged,
    write_tensor_file,
)
from modelglue.checkpoint.protocol import file_bytes
from modelglue.checkpoint.sparse import BLOCK, DELTA_FILE, DELTA_WEIGHTS, DeltaManifest
from modelglue.errors import MergeError

if TYPE_CHECKING:
    import torch

_PARTS = ".parts"


def write_sparse(model: Checkpoint, base: Checkpoint, folder: Path, density: float, *, key: str) -> None:
    """Write `model` as its difference to `base`: of every matrix the `density` largest changes, everything else that differs whole.

    Of changes of equal size those that come first are kept. Values are the model's own, in its dtype, so a density of 1 restores it.
    Memory: four times the largest tensor in float32. Time: one partial sort of every matrix. MergeError for NaN and infinity.
    """
    partly, whole = [], []
    with staged(folder, key=key, overwrite=True) as half:
        parts = half / _PARTS
        parts.mkdir(exist_ok=True)
        for number, name in enumerate(model.names()):
            path = parts / f"{number}.safetensors"
            found = dict(_kept(model, base, name, density))
            if f"{name}.mask" in found:
                partly.append(name)
            elif found:
                whole.append(name)
            if found:
                write_tensor_file(TensorsCheckpoint(found), path)
        if not partly and not whole:  # the base itself; a file of weights holds something
            whole = [min(model.names(), key=lambda name: (model.info(name).numel, name))]
            write_tensor_file(RenamedCheckpoint(model, {whole[0]: whole[0]}), parts / "0.safetensors")
        found_parts = [("", SafetensorsCheckpoint(path)) for path in sorted(parts.iterdir())]
        write_tensor_file(JoinedCheckpoint(found_parts), half / DELTA_WEIGHTS)
        shutil.rmtree(parts)
        for name, file in model.files.items():
            (half / name).write_bytes(file_bytes(file))
        (half / "config.json").write_bytes(json_bytes(dict(model.config)))
        manifest = DeltaManifest(base_identity=base.identity, partly=tuple(partly), whole=tuple(whole))
        (half / DELTA_FILE).write_bytes(json_bytes(manifest.model_dump(mode="json")))


def _kept(model: Checkpoint, base: Checkpoint, name: str, density: float) -> Iterator[tuple[str, torch.Tensor]]:
    """What is kept of one tensor, by its name in the folder; nothing where it is the base's."""
    import torch

    values, info = model.read(name), model.info(name)
    known = name in base.names() and base.info(name).shape == info.shape
    if known and base.info(name) == info and values.equal(base.read(name)):
        return
    if not known or info.dtype not in FLOATING or len(info.shape) < 2 or base.info(name).dtype not in FLOATING:
        yield name, values.view(info.shape)
        return
    change = (values.float() - base.read(name).float()).abs_()
    if not bool(torch.isfinite(change).all()):
        raise MergeError(f"the difference of '{name}' holds NaN or infinity. Repair the model or the base.")
    count = min(max(1, round(density * info.numel)), int((change > 0).sum())) if density < 1 else info.numel
    replaced = _largest(change, count)
    padded = torch.nn.functional.pad(replaced, (0, -info.numel % 8)).view(-1, 8).to(torch.uint8)
    counts = torch.stack([part.sum() for part in torch.split(replaced, BLOCK)])
    yield f"{name}.mask", (padded << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
    yield f"{name}.values", values[replaced]
    yield f"{name}.starts", torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def _largest(change: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` largest; of equal ones the first."""
    import torch

    if count == 0:
        return torch.zeros(len(change), dtype=torch.bool)
    least = change.kthvalue(len(change) - count + 1).values
    found = change > least
    ties = (change == least).nonzero().flatten()[: count - int(found.sum())]
    found[ties] = True
    return found
