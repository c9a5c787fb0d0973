"""`modelglue merge` against copying the same bytes, and against mergekit: wall time, CPU time and peak private memory.

    python benchmarks/merge.py --size 1.1 --scratch /big/disk --compile off,on --mergekit

makes three Llama-shaped bf16 models and their base under --scratch (kept for the next run), then alternates a plain copy with every
method: --repeats rounds, the median counts. The copy reads every byte of the models with 1 MiB preadv, writes as many bytes as one
model has with pwrite, in as many processes as the merge has workers; the base is read too where the method reads it. Both end with
fsync; inputs are in the page cache; a fresh output each time. A run is a whole command, interpreter start and imports included. Memory
comes from one more, untimed run, in which the private memory in /proc/PID/smaps_rollup of all its processes is summed 20 times a second
(Linux only). With --mergekit the same merges run in mergekit as well, in alternation; it is installed from the package index into
<scratch>/mergekit-environment when it is not there, runs with its own defaults, and computes in float32 and stores bfloat16, as
modelglue does. The result is Markdown on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PIECE = 2**20

#: billions of parameters -> hidden size, intermediate size, layers, key-value width
SHAPES = {
    "0.03": (384, 1024, 4, 64),
    "0.1": (640, 1728, 14, 128),
    "0.3": (1024, 2816, 22, 256),
    "1.1": (2048, 5632, 22, 256),
}
VOCABULARY = 32000

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 1.0}},
    "slerp": {"parameters": {"t": 0.4}, "base": True, "models": 1},
    "task_arithmetic": {"each": {"weight": 0.4}, "base": True},
    "ties": {"each": {"weight": 1.0, "density": 0.5}, "base": True},
    "dare_ties": {"each": {"weight": 0.5, "density": 0.3}, "base": True, "seed": 1},
    "della": {"each": {"weight": 0.5, "density": 0.5, "epsilon": 0.2}, "base": True, "seed": 1},
    "model_stock": {"base": True},
    "passthrough": {"models": 1},
}
#: what the other program is installed with, in an environment of its own
MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.3", help="billions of parameters of each model")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "benchmark", help="folder for models and outputs")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated method ids")
    parser.add_argument("--compile", default="off,on", help="comma-separated values of MODELGLUE_COMPILE: off, on, auto")
    parser.add_argument("--repeats", type=int, default=5, help="alternations; the median counts")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of merge and copy")
    parser.add_argument("--mergekit", action="store_true", help="measure mergekit too")
    parser.add_argument("--json", type=Path, help="also write every single measurement here")
    parser.add_argument("--copy", nargs="+", type=Path, help=argparse.SUPPRESS)  # the copying process itself: OUT IN...
    options = parser.parse_args()
    if options.copy:
        copy(options.copy[0], options.copy[1:], options.workers)
        return
    measure(options)


@dataclass
class Run:
    """One command: seconds of wall and CPU time (its children included), and peak private megabytes if sampled."""

    wall: float
    cpu: float
    private_mb: float | None = None


def measure(options: argparse.Namespace) -> None:
    scratch = options.scratch / options.size
    folders = make_models(scratch, options.size)
    methods = options.methods.split(",")
    modes = options.compile.split(",")
    recipes = {method: write_recipe(scratch, method, folders) for method in methods}
    for path in folders:
        warm(path / "model.safetensors")
    copies: dict[int, list[Run]] = {}
    merges: dict[tuple[str, str], list[Run]] = {(method, mode): [] for method in methods for mode in modes}
    if set(modes) - {"off"}:
        for method in methods:  # compile once, outside the measurement
            merge(recipes[method], scratch, options, modes[-1])
    other = mergekit_command(options.scratch) if options.mergekit else None
    others: dict[str, list[Run]] = {method: [] for method in methods} if other else {}
    for _ in range(options.repeats):
        for method in methods:
            count = inputs_of(method)
            inputs = [path / "model.safetensors" for path in ([*folders[1:], folders[0]] if count == 4 else folders)][:count]
            output = scratch / "copied"
            command = [sys.executable, __file__, "--workers", str(options.workers), "--copy", str(output), *map(str, inputs)]
            copies.setdefault(count, []).append(run(command, {}))
            output.unlink()
            for mode in modes:
                merges[method, mode].append(merge(recipes[method], scratch, options, mode))
            if other:
                others[method].append(merge_elsewhere(other, scratch, method, folders))
            if options.json:  # after every method, because a long measurement may be cut short
                write_raw(options.json, copies, merges, others)
    memory = {key: merge(recipes[key[0]], scratch, options, key[1], sample=True).private_mb for key in merges}
    report(options, folders, copies, merges, memory, others)


def write_raw(
    path: Path, copies: Mapping[int, Sequence[Run]], merges: Mapping[tuple[str, str], Sequence[Run]], others: Mapping[str, Sequence[Run]]
) -> None:
    raw = {f"{method} {mode}": [vars(r) for r in runs] for (method, mode), runs in merges.items()}
    raw |= {f"{method} mergekit": [vars(r) for r in runs] for method, runs in others.items()}
    raw |= {f"copy {count}": [vars(r) for r in runs] for count, runs in copies.items()}
    path.write_text(json.dumps(raw, indent=2), encoding="utf-8")


def inputs_of(method: str) -> int:
    settings = METHODS[method]
    return int(settings.get("models", 3)) + bool(settings.get("base"))


def report(
    options: argparse.Namespace,
    folders: Sequence[Path],
    copies: Mapping[int, Sequence[Run]],
    merges: Mapping[tuple[str, str], Sequence[Run]],
    memory: Mapping[tuple[str, str], float | None],
    others: Mapping[str, Sequence[Run]],
) -> None:
    import torch

    size = (folders[0] / "model.safetensors").stat().st_size
    print(
        f"{options.size} B parameters ({size / 1e9:.2f} GB a model), {options.workers} workers, {cpu_name()}, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"median of {options.repeats}.\n"
    )
    print("| method | files read | chunk functions | wall s | CPU s | copy, wall s | ratio | peak private MB |")
    print("|---|---|---|---|---|---|---|---|")
    for (method, mode), runs in merges.items():
        count = inputs_of(method)
        wall, base = (statistics.median(r.wall for r in group) for group in (runs, copies[count]))
        cpu = statistics.median(r.cpu for r in runs)
        word = {"off": "eager", "on": "compiled"}.get(mode, mode)
        private = memory[method, mode]
        shown = "" if private is None else f"{private:.0f}"
        print(f"| {method} | {count} | {word} | {wall:.2f} | {cpu:.2f} | {base:.2f} | {wall / base:.2f} | {shown} |")
    if not others:
        return
    print(f"\nAgainst {MERGEKIT[1].replace('==', ' ')} ({MERGEKIT[0].replace('==', ' ')}), with the better of our modes:\n")
    print("| method | mergekit wall s | CPU s | private MB | wall, times ours | CPU, times ours | memory, times ours |")
    print("|---|---|---|---|---|---|---|")
    for method, runs in others.items():
        ours = {mode: statistics.median(r.cpu for r in group) for (name, mode), group in merges.items() if name == method}
        mode = min(ours, key=lambda mode: ours[mode])
        walls = statistics.median(r.wall for r in merges[method, mode])
        wall, cpu, private = statistics.median(r.wall for r in runs), statistics.median(r.cpu for r in runs), runs[0].private_mb or 0.0
        times = private / (memory[method, mode] or 1.0)
        print(f"| {method} | {wall:.2f} | {cpu:.2f} | {private:.0f} | {wall / walls:.1f} | {cpu / ours[mode]:.1f} | {times:.1f} |")


def merge(recipe: Path, scratch: Path, options: argparse.Namespace, mode: str, *, sample: bool = False) -> Run:
    output = scratch / "merged"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "modelglue", "merge", str(recipe), str(output), "--quiet", "--workers", str(options.workers)]
    environment = {"MODELGLUE_COMPILE": mode, "MODELGLUE_CACHE": str(options.scratch / "cache")}
    result = run(command, environment, sample=sample)
    shutil.rmtree(output)
    return result


def mergekit_command(scratch: Path) -> str:
    """Where mergekit's command is; installs it when it is not there."""
    place = scratch / "mergekit-environment"
    command = place / "bin" / "mergekit-yaml"
    if not command.is_file():
        print(f"installing {' '.join(MERGEKIT)} in {place}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        for package in MERGEKIT:  # torch first and alone, so that its pinned build is what the other finds
            subprocess.run([str(place / "bin" / "pip"), "install", "--quiet", package], check=True)
    return str(command)


def merge_elsewhere(command: str, scratch: Path, method: str, folders: Sequence[Path]) -> Run:
    """Its memory is sampled in the same run, because its runs are long enough to bear it."""
    output = scratch / "merged-elsewhere"
    shutil.rmtree(output, ignore_errors=True)
    recipe = write_mergekit_recipe(scratch, method, folders)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": None, "PYTHONPATH": None}
    result = run([command, str(recipe), str(output), "--no-copy-tokenizer", "--no-write-model-card"], offline, sample=True, quiet=True)
    shutil.rmtree(output)
    return result


def run(command: Sequence[str], environment: Mapping[str, str | None], *, sample: bool = False, quiet: bool = False) -> Run:
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    begin = time.perf_counter()
    chosen = {key: value for key, value in {**os.environ, "PYTHONPATH": paths, **environment}.items() if value is not None}
    sink = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, env=chosen, stdout=sink, stderr=sink)
    peak = [0.0]
    done = threading.Event()
    sampler = threading.Thread(target=sample_memory, args=(process.pid, done, peak))
    if sample:
        sampler.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if sample:
        done.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Run(wall, usage.ru_utime + usage.ru_stime, peak[0] if sample else None)


def sample_memory(root: int, done: threading.Event, peak: list[float]) -> None:
    """Private_Clean + Private_Dirty of the process and all its descendants, in megabytes; the largest sum goes to peak[0]."""
    while not done.wait(0.05):
        total = 0
        for process in descendants(root):
            with contextlib.suppress(OSError), Path(f"/proc/{process}/smaps_rollup").open(encoding="ascii") as lines:
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        peak[0] = max(peak[0], total * 1024 / 1e6)


def descendants(root: int) -> list[int]:
    found = [root]
    for process in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{process}/task"):
                children = Path(f"/proc/{process}/task/{task}/children")
                found += [int(child) for child in children.read_text(encoding="ascii").split()]
    return found


# -- the copy -----------------------------------------------------------------------------------------------------------------


def copy(output: Path, inputs: Sequence[Path], workers: int) -> None:
    """Read all inputs and write the bytes of the first, in pieces of 1 MiB, worker k taking every piece whose number is k."""
    size = inputs[0].stat().st_size
    with output.open("wb") as stream:
        stream.truncate(size)
    children = []
    for worker in range(workers):
        child = os.fork()
        if child == 0:
            copy_share(output, inputs, size, worker, workers)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit("a copying process failed")
    descriptor = os.open(output, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def copy_share(output: Path, inputs: Sequence[Path], size: int, worker: int, workers: int) -> None:
    sources = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(output, os.O_WRONLY)
    buffers = [memoryview(bytearray(PIECE)) for _ in inputs]
    for offset in range(worker * PIECE, size, workers * PIECE):
        length = min(PIECE, size - offset)
        for source, buffer in zip(sources, buffers, strict=True):
            os.preadv(source, [buffer[:length]], offset)
        os.pwrite(target, buffers[0][:length], offset)


# -- the models ---------------------------------------------------------------------------------------------------------------


def make_models(scratch: Path, size: str) -> list[Path]:
    """Base and three children whose every weight moved a little, as bf16 Llama folders; made once."""
    folders = [scratch / name for name in ("base", "one", "two", "three")]
    for number, folder in enumerate(folders):
        if (folder / "model.safetensors").is_file():
            continue
        print(f"making {folder}", file=sys.stderr)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial, SHAPES[size], number)
        partial.rename(folder)
    return folders


def write_model(folder: Path, shape: tuple[int, int, int, int], number: int) -> None:
    import torch

    hidden, intermediate, layers, narrow = shape
    tensors = dict(llama_shapes(hidden, intermediate, layers, narrow))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(tensors):
        length = 2 * torch.Size(tensors[name]).numel()
        header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for order, name in enumerate(sorted(tensors)):
            numel = torch.Size(tensors[name]).numel()
            values = torch.randn(numel, generator=torch.Generator().manual_seed(order)).mul_(0.02)
            if number:
                values += torch.randn(numel, generator=torch.Generator().manual_seed(1000 * number + order)).mul_(0.001)
            stream.write(memoryview(values.bfloat16().view(torch.uint8).numpy()))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": narrow // 64,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def llama_shapes(hidden: int, intermediate: int, layers: int, narrow: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (VOCABULARY, hidden)),
        ("lm_head.weight", (VOCABULARY, hidden)),
        ("model.norm.weight", (hidden,)),
    ]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes += [
            (f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (narrow, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (narrow, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)),
            (f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)),
            (f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)),
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        ]
    return shapes


def write_recipe(scratch: Path, method: str, folders: Sequence[Path]) -> Path:
    settings = METHODS[method]
    models = [{"model": str(path), **settings.get("each", {})} for path in folders[1:]]
    recipe: dict[str, Any] = {"format": "modelglue/1", "method": method, "models": models[: settings.get("models", 3)]}
    if settings.get("base"):
        recipe["base"] = str(folders[0])
    recipe |= {key: settings[key] for key in ("parameters", "seed") if key in settings}
    path = scratch / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def write_mergekit_recipe(scratch: Path, method: str, folders: Sequence[Path]) -> Path:
    settings = METHODS[method]
    models = [{"model": str(path), "parameters": settings.get("each", {})} for path in folders[1:]][: settings.get("models", 3)]
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
    if settings.get("base"):
        recipe["base_model"] = str(folders[0])
        if method in ("slerp", "model_stock"):
            models.insert(0, {"model": str(folders[0]), "parameters": {}})
    recipe |= {"models": models, "parameters": settings.get("parameters", {})}
    path = scratch / f"{method}-mergekit.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def warm(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
