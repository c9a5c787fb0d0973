"""Weighted sums in machine code: every input is read once, the result is rounded as it is stored and written where it is wanted, once.

Plain torch makes a pass over the chunk for every conversion, product and sum, which costs three times what the memory allows. The function
below makes one. The system's C compiler makes it in half a second, beside the work, and it is kept in the cache. It gives torch's bits: one
rounding for every product and every sum, none fused. Until it is there, where there is no compiler, and for what it does not know (float16,
float64), torch does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.engine.compiled import compile_mode, processor
from modelglue.settings import cache_dir

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

#: input elements that a process sums with torch before it has the function compiled, beside its work
_WORTH_COMPILING = 2**26

_SOURCE = r"""
#include <stdint.h>
#include <string.h>

enum { BLOCK = 1024 };

static inline float widened(uint16_t half) { uint32_t bits = (uint32_t)half << 16; float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint32_t rounded(uint32_t bits) { return (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u; }
static inline uint32_t infinite(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

#define READ(p, is_half, k) ((is_half) ? widened(((const uint16_t *)(p))[k]) : ((const float *)(p))[k])
#define TERM(p, is_half, scale, k) ((below ? READ(p, is_half, k) - below[k] : READ(p, is_half, k)) * (scale))
#define LOOP(...) { for (int k = 0; k < n; k++) { __VA_ARGS__; } }
#define BY_BASE(loop) if (below) loop else { const float *below = 0; loop }
#define BY_KIND(loop) if (is_half) BY_BASE(loop(1)) else BY_BASE(loop(0))

/* sum = scale x, or sum + scale x, with x - below for x where there is a base */
static void start(float *restrict sum, const void *p, int is_half, float scale, const float *below, int n)
{
#define FIRST(h) LOOP(sum[k] = TERM(p, h, scale, k))
    BY_KIND(FIRST)
}
static void go_on(float *restrict sum, const void *p, int is_half, float scale, const float *below, int n)
{
#define NEXT(h) LOOP(sum[k] += TERM(p, h, scale, k))
    BY_KIND(NEXT)
}

/* the sum (or that of two inputs, in one pass) as it is stored; whether some of it is not finite */
static inline __attribute__((always_inline)) uint32_t finish(
    const float *sum, const void *p, const void *q, float scale, float second, const float *below, int n,
    int round_half, void *restrict out, int out_half)
{
    uint32_t bad = 0;
#define STORE(value) LOOP( \
        float x = value; if (below) x += below[k]; \
        uint32_t bits = bits_of(x); bad |= infinite(bits); \
        if (round_half) { bits = rounded(bits); bad |= infinite(bits); } \
        if (out_half) ((uint16_t *)out)[k] = (uint16_t)(bits >> 16); else { memcpy(&x, &bits, 4); ((float *)out)[k] = x; })
    if (sum) { BY_BASE(STORE(sum[k])) } else { BY_BASE(STORE(TERM(p, 1, scale, k) + TERM(q, 1, second, k))) }
    return bad;
}

/* out = sum_i scale_i x_i, or base + sum_i scale_i (x_i - base); returns whether some number in it is not finite */
int modelglue_sum(int64_t length, int count, const void **inputs, const int *halves, const float *scales,
                  const void *base, int base_half, int round_half, void *out, int out_half)
{
    float sum[BLOCK], base_block[BLOCK];
    uint32_t bad = 0;
    const int pair = count == 2 && halves[0] && halves[1];
    for (int64_t at = 0; at < length; at += BLOCK) {
        const int n = length - at < BLOCK ? (int)(length - at) : BLOCK;
        const float *below = base ? base_block : 0;
#define AT(p, is_half) ((const char *)(p) + at * ((is_half) ? 2 : 4))
        if (base) start(base_block, AT(base, base_half), base_half, 1.0f, 0, n);
        for (int i = 0; i < count && !pair; i++)
            (i ? go_on : start)(sum, AT(inputs[i], halves[i]), halves[i], scales[i], below, n);
        const float *done = pair ? 0 : sum;
        const void *p = AT(inputs[0], 1), *q = AT(inputs[count > 1], 1);
        void *to = (char *)out + at * (out_half ? 2 : 4);
        const float scale = scales[0], second = scales[count > 1];
        if (round_half && out_half) bad |= finish(done, p, q, scale, second, below, n, 1, to, 1);
        else if (round_half) bad |= finish(done, p, q, scale, second, below, n, 1, to, 0);
        else bad |= finish(done, p, q, scale, second, below, n, 0, to, 0);
    }
    return bad != 0;
}
"""
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


def _summed_over(base: torch.Tensor | None, models: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor | None:
    wanted = _landing.get()
    if wanted is None:
        return None
    import torch

    wide, half = torch.float32, torch.bfloat16
    out, inputs = wanted.out, [*models, *([base] if base is not None else [])]
    fits = all(one.dtype in (wide, half) and one.is_contiguous() and one.numel() == out.numel() for one in inputs)
    known = wanted.store in (wide, half) and out.dtype in (wide, wanted.store) and out.is_contiguous()
    library = _found() if fits and known and all(one.device.type == "cpu" for one in (out, *inputs)) else None
    if library is None:
        raise _DeclinedError
    count = len(models)
    pointers = (ctypes.c_void_p * count)(*(model.data_ptr() for model in models))
    halves = (ctypes.c_int * count)(*(model.dtype == half for model in models))
    factors = (ctypes.c_float * count)(*scales)
    below, below_half = (None, False) if base is None else (base.data_ptr(), base.dtype == half)
    bad = library.modelglue_sum(
        out.numel(), count, pointers, halves, factors, below, below_half, wanted.store == half, out.data_ptr(), out.dtype == half
    )
    wanted.sound = not bad
    return out


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
    digest = hashlib.sha256("\0".join([_SOURCE, *_FLAGS, platform.machine(), processor()]).encode())
    return folder / "compiled" / f"sum-{digest.hexdigest()[:32]}.so"


def _loaded(path: Path) -> Any:
    try:
        library = ctypes.CDLL(str(path))
        function = library.modelglue_sum
    except (OSError, AttributeError) as error:
        _log.info("%s: cannot be loaded, sums run as plain torch (%s)", path, error)
        return None
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [ctypes.c_int64, whole, pointer, pointer, pointer, pointer, whole, whole, pointer, whole]
    function.restype = whole
    return library


def _started(path: Path) -> subprocess.Popen[bytes] | None:
    """A process that compiles the library and then gives it its name, even if this one has ended by then. None: it cannot be made."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    partial = path.with_suffix(f".{os.getpid()}.partial")
    command = [compiler, *_FLAGS, "-x", "c", "-", "-o", str(partial)]
    finished = f"{shlex.join(command)} && mv -f {shlex.quote(str(partial))} {shlex.quote(str(path))}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        started = subprocess.Popen(["sh", "-c", finished], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert started.stdin is not None
        with started.stdin:
            started.stdin.write(_SOURCE.encode())
    except OSError as error:
        _log.info("%s: cannot be compiled, sums run as plain torch (%s)", path, error)
        return None
    return started
