"""Weighted sums and inner products in machine code: every input is read once, a sum is rounded and written where it is wanted, once.

Plain torch makes a pass over the chunk for every conversion, product and sum, which costs three times what the memory allows. The functions
in sums.c make one. The system's C compiler makes them in a second, beside the work, and they are kept in the cache. They give torch's bits:
one rounding for every product and every sum, none fused, in an order that both keep. Until they are there, where there is no compiler, and
for what they do not know (float64, tensors on a device), torch does the work.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.engine.compiled import compile_mode, processor
from modelglue.settings import BLOCK_ELEMENTS, cache_dir

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

#: input elements that a process sums with torch before it has the function compiled, beside its work
_WORTH_COMPILING = 2**26

_SOURCE = Path(__file__).with_name("sums.c")
#: how it numbers the dtypes that it knows
_KINDS = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


@dataclass
class _Landing:
    """Where a sum shall be written, and how it is stored before it gets there."""

    out: torch.Tensor
    store: torch.dtype
    sound: bool = False


class _DeclinedError(Exception):
    """Torch has to do it."""


_landing: ContextVar[_Landing | None] = ContextVar("landing", default=None)
_summed = 0
_libraries: dict[Path, Any] = {}
_compilers: dict[Path, tuple[int, subprocess.Popen[bytes] | None]] = {}  # with the process that started them


def lands(merge: Callable[[], object], out: torch.Tensor, store: torch.dtype) -> bool:
    """Call `merge`, whose last step is a weighted sum: rounded to `store`, it is written into `out` (of that dtype or float32).

    False where the sum was not done, as machine code is not made for its inputs, or where something in `out` is not finite.
    """
    wanted = _Landing(out, store)
    token = _landing.set(wanted)
    try:
        return merge() is out and wanted.sound
    except _DeclinedError:
        return False
    finally:
        _landing.reset(token)


def ready(elements: int) -> bool:
    """Whether sums of so many input elements will be done in machine code; compiles it where it is not in the cache and pays by now."""
    global _summed
    _summed += elements
    return _found() is not None


def summed(models: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor | None:
    """sum_i s_i X_i where `lands` wants it; None outside of it."""
    return _summed_over(None, models, scales)


def added(base: torch.Tensor, models: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor | None:
    """B + sum_i s_i (X_i - B) where `lands` wants it; None outside of it."""
    return _summed_over(base, models, scales)


def grams(models: Sequence[torch.Tensor], base: torch.Tensor | None) -> torch.Tensor | None:
    """Inner products of every pair i <= j of 1-D tensors, or of their differences to the base, over each block of 65,536 elements:
    float64 [blocks, pairs]. None where torch has to do it, in the order that sums.c fixes.
    """
    import torch

    count, length = len(models), len(models[0])
    inputs = [*models, *([base] if base is not None else [])]
    kinds = _kinds(inputs, length)
    library = _found() if kinds is not None and ready(length * len(inputs)) else None
    if kinds is None or library is None:
        return None
    sums = torch.empty(-(-length // BLOCK_ELEMENTS), count * (count + 1) // 2, dtype=torch.float64)
    room = torch.empty(count * 1024 + sums.shape[1] * 4096)
    library.modelglue_grams(length, count, *_arrays(models, kinds), *_base(base, kinds), room.data_ptr(), sums.data_ptr())
    return sums


def _summed_over(base: torch.Tensor | None, models: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor | None:
    wanted = _landing.get()
    if wanted is None:
        return None
    out, count = wanted.out, len(models)
    kinds = _kinds([out, *models, *([base] if base is not None else [])], out.numel())
    stored = _KINDS.get(str(wanted.store))
    if kinds is None or stored is None or kinds[0] not in (stored, _KINDS["torch.float32"]) or not count == len(scales) > 0:
        raise _DeclinedError
    library = _found()
    if library is None:
        raise _DeclinedError
    written, *kinds = kinds
    factors = (ctypes.c_float * count)(*scales)
    place = stored, out.data_ptr(), written
    bad = library.modelglue_sum(out.numel(), count, *_arrays(models, kinds), factors, *_base(base, kinds), *place)
    wanted.sound = not bad
    return out


def _kinds(tensors: Sequence[torch.Tensor], length: int) -> list[int] | None:
    """How sums.c numbers their dtypes; None where one has another dtype or length, lies on a device, or not in one piece."""
    kinds = [_KINDS.get(str(tensor.dtype), -1) for tensor in tensors]
    known = all(tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() == length for tensor in tensors)
    return kinds if known and -1 not in kinds else None


def _arrays(models: Sequence[torch.Tensor], kinds: Sequence[int]) -> tuple[Any, Any]:
    count = len(models)
    return (ctypes.c_void_p * count)(*(model.data_ptr() for model in models)), (ctypes.c_int * count)(*kinds[:count])


def _base(base: torch.Tensor | None, kinds: Sequence[int]) -> tuple[int | None, int]:
    return (None, 0) if base is None else (base.data_ptr(), kinds[-1])


def _found() -> Any:
    """The compiled library, or None while there is none."""
    mode = compile_mode()
    if mode == "off":
        return None
    path = _path(cache_dir())
    if path in _libraries:
        return _libraries[path]
    if not path.is_file():
        if mode == "auto" and _summed < _WORTH_COMPILING:
            return None
        if path not in _compilers:
            _compilers[path] = os.getpid(), _started(path)
        parent, compiler = _compilers[path]
        if compiler is not None:
            if parent != os.getpid():  # a forked worker waits for the file
                return None
            if mode == "on":
                compiler.wait()
            if compiler.poll() is None:
                return None
    _libraries[path] = _loaded(path)
    return _libraries[path]


@cache
def _path(folder: Path) -> Path:
    """Named by the source and by what instructions the processor has."""
    digest = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), *(word.encode() for word in (*_FLAGS, platform.machine(), processor()))]))
    return folder / "compiled" / f"sum-{digest.hexdigest()[:32]}.so"


def _loaded(path: Path) -> Any:
    try:
        library = ctypes.CDLL(str(path))
        sums, grams_of = library.modelglue_sum, library.modelglue_grams
    except (OSError, AttributeError) as error:
        _log.info("%s: cannot be loaded, sums run as plain torch (%s)", path, error)
        return None
    length, pointer, whole = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    sums.argtypes = [length, whole, pointer, pointer, pointer, pointer, whole, whole, pointer, whole]
    sums.restype = whole
    grams_of.argtypes = [length, whole, pointer, pointer, pointer, whole, pointer, pointer]
    grams_of.restype = None
    return library


def _started(path: Path) -> subprocess.Popen[bytes] | None:
    """A process that compiles the library and then gives it its name. None: it cannot be made."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
    command = [compiler, *_FLAGS, "-o", str(partial), str(_SOURCE)]
    finished = f"{shlex.join(command)} && mv -f {shlex.quote(str(partial))} {shlex.quote(str(path))}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        started = subprocess.Popen(["sh", "-c", finished], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        _log.info("%s: cannot be compiled, sums run as plain torch (%s)", path, error)
        return None
    atexit.register(started.wait)  # a moment, where this process ends before it
    return started
