"""A model in files of torch.save (.bin, .pt, .pth), read lazily and weights-only: nothing in them is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelglue.checkpoint.formats.folder import DiskCheckpoint
from modelglue.checkpoint.formats.mapped import MappedFiles
from modelglue.checkpoint.formats.shards import PICKLED
from modelglue.checkpoint.formats.torch_file import Placed, read_torch_file
from modelglue.checkpoint.protocol import ITEM_SIZE, TensorInfo

if TYPE_CHECKING:
    import torch


class PickledCheckpoint(DiskCheckpoint):
    """The tensors of a folder of .bin, .pt or .pth files (or of one such file), of today's zip format or of the one before torch 1.6.

    Opening reads the pickles, which hold names and shapes, by a machine that knows tensors and plain containers only; tensors that
    share a storage keep all their names. Reading a contiguous tensor returns a view of the mapped file; of a transposed or cut-out one
    it copies the elements asked for, so memory is O(stop - start).
    """

    def __init__(self, path: Path, reference: str | None = None) -> None:
        self._where: dict[str, tuple[int, Placed]] = {}
        super().__init__(path, reference, PICKLED)
        sizes = [0] * len(self._shards)
        for number, placed in self._where.values():
            sizes[number] = max(sizes[number], placed.begin + placed.numel * ITEM_SIZE[placed.info.dtype])
        self._files = MappedFiles(self._shards, sizes)

    def _headers(self, number: int, shard: Path) -> Mapping[str, TensorInfo]:
        found = read_torch_file(shard)
        for name, placed in found.items():
            self._where.setdefault(name, (number, placed))
        return {name: placed.info for name, placed in found.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        info = self.info(name)
        number, placed = self._where[name]
        item = ITEM_SIZE[info.dtype]
        count = (info.numel if stop is None else stop) - start
        if placed.contiguous or count <= 0:
            view = self._files.view(number, placed.begin + (placed.offset + start) * item, count, info.dtype)
        else:
            view = self._gather(number, placed, start, start + count)
        if out is not None:
            view = out.copy_(view)
        return view

    def _gather(self, number: int, placed: Placed, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop, in the tensor's own order, of a tensor that does not lie in that order."""
        import torch

        item = ITEM_SIZE[placed.info.dtype]
        reach = placed.offset + 1 + sum((size - 1) * stride for size, stride in zip(placed.info.shape, placed.stride, strict=True))
        if placed.begin % item:  # the old format does not align; bytes always are
            storage = self._files.view(number, placed.begin, reach * item, "U8")
            shape, stride = (*placed.info.shape, item), (*(n * item for n in placed.stride), 1)
            values = _flat(torch.as_strided(storage, shape, stride, placed.offset * item), start * item, stop * item)
            return values.view(self._files.view(number, 0, 0, placed.info.dtype).dtype)
        storage = self._files.view(number, placed.begin, reach, placed.info.dtype)
        values = _flat(torch.as_strided(storage, placed.info.shape, placed.stride, placed.offset), start, stop)
        # A single element counts as contiguous whatever its stride, and then its bytes cannot be looked at.
        return values if values.stride(0) == 1 else values.clone(memory_format=torch.contiguous_format)


def _flat(view: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements start..stop of the flattened view, copying no others: the rows that are wanted whole at once, the ends one level down."""
    import torch

    if view.dim() <= 1:
        return view.reshape(-1)[start:stop].contiguous()
    inner = view[0].numel()
    first, last = -(-start // inner), stop // inner
    if first > last:  # within one row
        return _flat(view[last], start - last * inner, stop - last * inner)
    parts = [view[first:last].reshape(-1)]
    if start < first * inner:
        parts.insert(0, _flat(view[first - 1], start - (first - 1) * inner, inner))
    if stop > last * inner:
        parts.append(_flat(view[last], 0, stop - last * inner))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
