"""Merging on another device: the same method code on its tensors, with larger chunks and copies that overlap the arithmetic.

A worker with a device has two lanes. Each has a thread, a stream of the device, and pinned buffers of its own; while one lane computes,
the other fills its buffers from the mapped files, and the worker writes what the lane before has finished. Nothing but the place of the
tensors differs from a merge on the processor, so the results differ by rounding at most, and not at all where the device rounds alike.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from modelglue.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

Piece = TypeVar("Piece")

#: elements of a chunk on a device: enough to keep it busy while the next chunk is on its way
DEVICE_CHUNK_ELEMENTS = 2**24
#: the processor, treated as a device: the same buffers, copies and lanes, where there is no other device to test them on
SIMULATED = "cpu:sim"
_LANES = 2

_lane: ContextVar[Lane | None] = ContextVar("lane", default=None)


def devices_of(text: str | None) -> tuple[str, ...]:
    """The devices that `--device` names, "cuda:0,cuda:1" say; none for the processor. UserError for one that torch does not see here."""
    names = tuple(part.strip() for part in (text or "cpu").split(","))
    if names == ("cpu",):
        return ()
    for name in names:
        if name != SIMULATED:
            _check(name, names)
    if len(set(names)) < len(names):
        raise UserError(f"device '{text}': names a device twice. Name each once.")
    return names


def _check(name: str, names: Sequence[str]) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type in ("cpu", "meta"):
        also = " beside others" if name == "cpu" else ""
        raise UserError(f"device '{name}'{also}: is none to merge on. Allowed are cpu, cuda, cuda:0,cuda:1 (several), mps, xpu.")
    try:
        module = torch.get_device_module(device.type)
        count = int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if count <= (device.index or 0):
        found = f"{count} of this kind" if count else "no such device"
        raise UserError(f"device '{name}': torch {torch.__version__} sees {found} here. Choose another, or leave --device out.")


class Lane:
    """One stream of a device with pinned buffers of its own, used by one thread at a time."""

    def __init__(self, name: str) -> None:
        import torch

        self.device = torch.device("cpu" if name == SIMULATED else name)
        self._pinned: dict[Any, torch.Tensor] = {}
        self._copied: dict[Any, Any] = {}
        # other kinds of devices order their work by themselves
        self._stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this block the engine computes here."""
        import torch

        token = _lane.set(self)
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                yield
        except torch.OutOfMemoryError as error:
            raise RunError(f"device {self.device}: has too little memory for this merge. Free some, or leave --device out.") from error
        finally:
            _lane.reset(token)

    def upload(self, slot: Any, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, by way of the pinned buffer `slot`; returns while the copy may still be under way."""
        import torch

        if slot in self._copied:
            self._copied.pop(slot).synchronize()  # the device still reads what was put there before
        pinned = self._buffer(slot, values.numel(), values.dtype)
        pinned.copy_(values.reshape(-1))
        there = torch.empty(values.numel(), dtype=values.dtype, device=self.device)
        there.copy_(pinned, non_blocking=True)
        if self._stream is not None:
            self._copied[slot] = self._stream.record_event()
        return there

    def download(self, values: torch.Tensor) -> torch.Tensor:
        """`values` in a pinned buffer that is good until the lane's next download."""
        pinned = self._buffer("out", values.numel(), values.dtype)
        pinned.copy_(values, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return pinned

    def _buffer(self, slot: Any, numel: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        key = (slot, dtype)
        if key not in self._pinned or self._pinned[key].numel() < numel:
            self._pinned[key] = torch.empty(numel, dtype=dtype, pin_memory=self.device.type == "cuda")
        return self._pinned[key][:numel]


def current() -> Lane | None:
    """The lane that computes here; None on the processor."""
    return _lane.get()


@contextmanager
def wide() -> Iterator[None]:
    """What may need float64 runs on the processor within this block where the device has none (Apple's)."""
    lane = current()
    token = _lane.set(None if lane is not None and lane.device.type == "mps" else lane)
    try:
        yield
    finally:
        _lane.reset(token)


@contextmanager
def there() -> Iterator[None]:
    """Tensors that are made within this block are made where the lane computes."""
    lane = current()
    if lane is None or lane.device.type == "cpu":
        yield
        return
    with lane.device:
        yield


def pipelined(
    pieces: Sequence[Piece], read: Callable[[Piece], torch.Tensor], lanes: Sequence[Lane]
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """(piece, read(piece)) in order, several in work at once: what is yielded is good until the next is asked for."""
    if not lanes:
        for piece in pieces:
            yield piece, read(piece)
        return

    def on(lane: Lane, piece: Piece) -> torch.Tensor:
        with lane.active():
            return read(piece)

    running: deque[tuple[Piece, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(len(lanes)) as threads:
        try:
            for number, piece in enumerate(pieces):
                if len(running) == len(lanes):
                    done, future = running.popleft()
                    yield done, future.result()
                running.append((piece, threads.submit(on, lanes[number % len(lanes)], piece)))
            while running:
                done, future = running.popleft()
                yield done, future.result()
        finally:
            for _, future in running:
                future.cancel()


_made: dict[str, tuple[Lane, ...]] = {}


def lanes_of(name: str | None) -> tuple[Lane, ...]:
    """The lanes of a device, made once per process; none for the processor."""
    if name is None:
        return ()
    if name not in _made:
        _made[name] = tuple(Lane(name) for _ in range(_LANES))
    return _made[name]
