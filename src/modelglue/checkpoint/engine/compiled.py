"""Chunk functions: pure arithmetic on the chunks of one position range, run as plain torch or as compiled machine code.

A chunk function takes 1-D tensors of one length, lists of them, and numbers, and returns one such tensor. Numbers are arguments of the
compiled code too, so it is compiled once per function, number of models and dtypes, whatever the recipe's weights; hence a chunk function
never branches on a number (True, False, None and words may be branched on, they are part of the key). Eager torch is the reference: the
compiled code gives the same bits, and whatever cannot be compiled or loaded runs eagerly.

Compiling goes through torch.export and Inductor, ahead of time, in a process of its own: a merge that finds the shared object in
the cache maps it in a millisecond and imports no compiler, where torch.compile would spend seconds in every process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.errors import UserError
from modelglue.settings import cache_dir

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

#: `auto` uses what is in the cache from this many output elements on: below, a merge takes about a second anyway
_WORTH_LOADING = 2**25
#: `auto` compiles from this many output elements on. A function takes half a minute to compile and saves a few nanoseconds an
#: element, so a single merge of fewer than some ten billion never gets it back.
_WORTH_COMPILING = 10**10
_COMPILE_SECONDS = 900
_LONGEST = 2**31 - 1

_table: ContextVar[Mapping[str, str] | None] = ContextVar("table", default=None)
_plain: ContextVar[bool] = ContextVar("plain", default=False)
_seen: ContextVar[dict[str, tuple[str, Any]] | None] = ContextVar("seen", default=None)


class ChunkFunction:
    """A function on chunks; calling it runs the compiled version inside `using(...)`, else `plain`: the function itself, or another
    that gives the same bits faster where nothing is compiled.
    """

    def __init__(self, function: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor] | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.plain = plain or function
        self.id = f"{function.__module__}:{function.__qualname__}"

    def __call__(self, *arguments: Any) -> torch.Tensor:
        table, seen = _table.get(), _seen.get()
        if table is None and seen is None:
            return self.plain(*arguments)
        tensors: list[torch.Tensor] = []
        floats: list[float] = []
        integers: list[int] = []
        shape = _shape_of(arguments, tensors, floats, integers)
        key = f"{self.id} {json.dumps(shape)}"
        if seen is not None:
            seen[key] = (self.id, shape)
        runner = _load(table[key]) if table and key in table and _even(tensors) else None
        if runner is None:
            return self.plain(*arguments)
        result: torch.Tensor = runner.run([*tensors, *_numbers(floats, integers)])[0]
        return result


def chunk_function(function: Callable[..., torch.Tensor]) -> ChunkFunction:
    """Mark a module-level function as a chunk function (decorator)."""
    return ChunkFunction(function)


def compile_mode() -> str:
    """MODELGLUE_COMPILE: auto (the default), on or off."""
    mode = os.environ.get("MODELGLUE_COMPILE", "auto")
    if mode not in ("auto", "on", "off"):
        raise UserError(f"MODELGLUE_COMPILE is '{mode}'; allowed are auto, on and off. Unset it for auto.")
    return mode


@contextmanager
def using(table: Mapping[str, str] | None) -> Iterator[None]:
    """Run the chunk functions of `table` (from `find`) compiled within this block."""
    token = _table.set(table)
    try:
        yield
    finally:
        _table.reset(token)


@contextmanager
def plain() -> Iterator[None]:
    """Nothing is looked up or compiled within this block: what it prepares will run on machines that may have other processors."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def find(sample: Callable[[], Any], elements: int) -> Mapping[str, str] | None:
    """Where the compiled versions of all chunk functions that `sample()` calls are, compiling them first if that pays.

    `elements` is how many output elements the job has. None means: run eagerly. With MODELGLUE_COMPILE=on the size does not matter;
    what then cannot be compiled is logged as a warning and runs eagerly. Compiling takes about 20 s a function on one core and
    half a gigabyte in a process that ends before the merge begins.
    """
    mode = compile_mode()
    if mode == "off" or _plain.get() or (mode == "auto" and elements < _WORTH_LOADING):
        return None
    seen: dict[str, tuple[str, Any]] = {}
    token, inner = _seen.set(seen), _table.set(None)
    try:
        sample()
    finally:
        _seen.reset(token)
        _table.reset(inner)
    paths = {key: _path(key, function) for key, (function, _) in seen.items()}
    missing = [key for key, path in paths.items() if not path.is_file()]
    if missing and (mode == "on" or elements >= _WORTH_COMPILING):
        _compile([(seen[key][0], seen[key][1], paths[key]) for key in missing])
    return {key: str(path) for key, path in paths.items() if path.is_file()} or None


# -- arguments ----------------------------------------------------------------------------------------------------------------


def _shape_of(value: Any, tensors: list[torch.Tensor], floats: list[float], integers: list[int]) -> Any:
    """What of the arguments is fixed in the compiled code, JSON-ready; tensors and numbers go to the lists, in order."""
    if isinstance(value, bool | str | None):
        return {"fixed": value}
    if isinstance(value, float):
        floats.append(value)
        return "float"
    if isinstance(value, int):
        integers.append(value)
        return "integer"
    if isinstance(value, Sequence):
        return [_shape_of(item, tensors, floats, integers) for item in value]
    tensors.append(value)
    return str(value.dtype)


def _rebuilt(shape: Any, tensors: Iterator[Any], floats: Iterator[Any], integers: Iterator[Any]) -> Any:
    """The inverse of `_shape_of`."""
    if isinstance(shape, list):
        return [_rebuilt(item, tensors, floats, integers) for item in shape]
    if isinstance(shape, dict):
        return shape["fixed"]
    return next({"float": floats, "integer": integers}.get(shape, tensors))


def _even(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the compiled code may be given these: it trusts its caller."""
    length = tensors[0].shape[0] if tensors and tensors[0].dim() == 1 else 0
    return 2 <= length <= _LONGEST and all(
        t.dim() == 1 and t.shape[0] == length and t.is_contiguous() and t.device.type == "cpu" for t in tensors
    )


def _numbers(floats: Sequence[float], integers: Sequence[int]) -> list[torch.Tensor]:
    """One tensor per kind. 0-d elements of it act like Python numbers: they take the dtype of the tensor that they meet."""
    import torch

    found = [torch.tensor(floats, dtype=torch.float64)] if floats else []
    return [*found, torch.tensor(integers, dtype=torch.int64)] if integers else found


# -- the cache ----------------------------------------------------------------------------------------------------------------


def _path(key: str, function: str) -> Path:
    """Named by all that the machine code depends on: torch, the processor, the sources and the arguments' shape."""
    import torch

    module = importlib.import_module(function.partition(":")[0])
    package = Path(str(module.__file__)).parent
    # helpers of a chunk function may live in the neighbouring private modules
    sources = [Path(str(module.__file__)), *sorted(package.glob("_*.py")), Path(__file__)]
    digest = hashlib.sha256(f"{torch.__version__}\0{platform.machine()}\0{processor()}\0{key}".encode())
    for source in sources:
        digest.update(source.read_bytes())
    return cache_dir() / "compiled" / f"{digest.hexdigest()[:32]}.so"


@functools.cache
def processor() -> str:
    """What instructions there are: code compiled for one processor may not run on another that shares the home folder."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


@functools.cache
def _load(path: str) -> Any:
    """The shared object at `path`, ready to run on the CPU; None if this torch cannot load it. Once per process."""
    import torch

    try:
        return torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)
    except (AttributeError, RuntimeError) as error:
        _log.warning("%s: cannot be loaded, the merge runs eagerly (%s)", path, error)
        return None


# -- compiling ----------------------------------------------------------------------------------------------------------------


def _compile(wanted: Sequence[tuple[str, Any, Path]]) -> None:
    """Compile (function, shape, target) triples in one process of their own; failures are logged, not raised."""
    text = json.dumps([[function, shape, str(path)] for function, shape, path in wanted])
    command = [sys.executable, "-W", "ignore", "-c", "from modelglue.checkpoint.engine.compiled import _compile_all; _compile_all()"]
    try:
        wanted[0][2].parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="modelglue-compile-") as scratch:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "TORCHINDUCTOR_CACHE_DIR": scratch,
                "TMPDIR": scratch,
                "OMP_NUM_THREADS": "1",
            }
            done = subprocess.run(
                command, input=text, text=True, env=environment, capture_output=True, timeout=_COMPILE_SECONDS, check=False
            )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            _log.warning("chunk functions could not be compiled, the merge runs eagerly: %s", reason)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("chunk functions could not be compiled, the merge runs eagerly: %s", error)


def _compile_all() -> None:
    """The compiling process: triples as JSON on standard input."""
    for function, shape, path in json.loads(sys.stdin.read()):
        _compile_one(function, shape, Path(path))


def _compile_one(function: str, shape: Any, path: Path) -> None:
    import torch
    import torch.export

    module, _, name = function.partition(":")
    chunk = getattr(importlib.import_module(module), name)
    chunk = getattr(chunk, "function", chunk)  # the name is the function's own, which a ChunkFunction may stand beside
    dtypes, floats, integers = _flat(shape)

    class Program(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            tensors, numbers = arguments[: len(dtypes)], list(arguments[len(dtypes) :])
            floats_given = numbers.pop(0) if floats else torch.empty(0)
            integers_given = numbers.pop(0) if integers else torch.empty(0)
            given = _rebuilt(shape, iter(tensors), (floats_given[i] for i in range(floats)), (integers_given[i] for i in range(integers)))
            return chunk(*given)  # type: ignore[no-any-return]

    example = (*(torch.ones(4096, dtype=getattr(torch, dtype)) for dtype in dtypes), *_numbers([0.5] * floats, [1] * integers))
    length = torch.export.Dim("length", min=2, max=_LONGEST)
    dynamic = tuple({0: length} if position < len(dtypes) else None for position in range(len(example)))
    program = torch.export.export(Program(), example, dynamic_shapes={"arguments": dynamic})
    partial = path.with_suffix(f".{os.getpid()}.partial.so")
    folder = tempfile.mkdtemp()
    built = torch._inductor.aot_compile(
        program.module(),
        example,
        # one thread: the workers are the parallelism
        options={"aot_inductor.output_path": f"{folder}/chunk.so", "cpp.threads": 1, "compile_threads": 1},
    )
    partial.write_bytes(Path(str(built)).read_bytes())
    partial.replace(path)


def _flat(shape: Any) -> tuple[list[str], int, int]:
    """Dtype names of the tensors in a shape, and how many floats and integers it has."""
    if isinstance(shape, list):
        parts = [_flat(item) for item in shape]
        return [dtype for part in parts for dtype in part[0]], sum(part[1] for part in parts), sum(part[2] for part in parts)
    if isinstance(shape, dict):
        return [], 0, 0
    if shape in ("float", "integer"):
        return [], int(shape == "float"), int(shape == "integer")
    return [str(shape).removeprefix("torch.")], 0, 0
