"""A merge of two 7 B-shaped models (random weights) in little memory: what all processes together hold, private and shared.

    python benchmarks/large.py --scratch /big/disk

writes two bf16 models under --scratch, which takes 27 GB, merges them by --method (another 13.5 GB), and removes all three. It first
checks that 45 GB are free. While the merge runs, the memory of all its processes is added up 10 times a second: private pages, and
shared ones once each, in proportion (Pss in /proc/PID/smaps_rollup, Linux only); pages of the inputs count while they are mapped. The
largest sum must stay below --limit. Where the system lets this user make a control group with a memory limit, a second merge runs in
one, where the page cache counts too; elsewhere it runs under RLIMIT_DATA, which bounds what a process may allocate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from merge import ROOT, descendants, llama_shapes

NEEDED = 45_000_000_000
#: hidden size, intermediate size, layers, key-value width: 6.7 B parameters with a vocabulary of 32,000
SHAPE = (4096, 11008, 32, 4096)
SMALL_SHAPE = (1024, 2816, 4, 1024)
PIECE = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder with 45 GB of room; what is made there is removed")
    parser.add_argument("--method", default="ties", help="linear or ties")
    parser.add_argument("--limit", type=int, default=2 * 2**30, help="bytes that all processes together may hold")
    parser.add_argument("--small", action="store_true", help="models of 0.1 B parameters, to try this script")
    options = parser.parse_args()
    scratch = options.scratch / "modelglue-large"
    options.scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.scratch).free
    if free < NEEDED and not options.small:
        raise SystemExit(f"{options.scratch}: {free:,} bytes are free and {NEEDED:,} are needed. Choose another --scratch.")
    try:
        folders = [scratch / name for name in ("one", "two")]
        for number, folder in enumerate(folders):
            write_model(folder, SMALL_SHAPE if options.small else SHAPE, number)
        measure(scratch, folders, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
            with contextlib.suppress(OSError):
                (Path(root) / "modelglue-large").rmdir()


def measure(scratch: Path, folders: Sequence[Path], options: argparse.Namespace) -> None:
    recipe = scratch / "recipe.yaml"
    first, second = map(str, folders)
    value: dict[str, Any] = {"format": "modelglue/1", "method": options.method}
    if options.method == "ties":  # one task vector on a base: the same two models
        value |= {"base": first, "models": [{"model": second, "weight": 1.0, "density": 0.5}]}
    else:
        value |= {"models": [{"model": first, "weight": 0.5}, {"model": second, "weight": 0.5}]}
    recipe.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    print(
        "| method | output GB | memory limit | wall s | peak private MiB | private and shared MiB |\n|---|---|---|---|---|---|", flush=True
    )
    for place, prefix in (("no limit", []), limited(options.limit)):
        output = scratch / "merged"
        merge = [sys.executable, "-m", "modelglue", "merge", str(recipe), str(output), "--quiet"]
        begin = time.perf_counter()
        peak = sampled([*prefix, *merge])
        wall = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        shutil.rmtree(output)
        held = f"{peak[0] / 2**20:.0f} | {peak[1] / 2**20:.0f}"
        print(f"| {options.method} | {size / 1e9:.1f} | {place} | {wall:.0f} | {held} |", flush=True)
        if peak[1] > options.limit:
            raise SystemExit(f"the processes held {peak[1]:,} bytes, allowed are {options.limit:,}")


def limited(limit: int) -> tuple[str, list[str]]:
    """How a command is put under a memory limit here: its name, and what is put before the command."""
    systemd = shutil.which("systemd-run")
    if systemd is not None:
        prefix = [systemd, "--user", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return "control group of systemd", prefix
    for root, file in ((Path("/sys/fs/cgroup"), "memory.max"), (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")):
        group = root / "modelglue-large"
        with contextlib.suppress(OSError):
            group.mkdir(exist_ok=True)
            (group / file).write_text(str(limit), encoding="ascii")
            enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
            return "control group, page cache included", ["sh", "-c", enter, "sh"]
        with contextlib.suppress(OSError):
            group.rmdir()
    return "RLIMIT_DATA, each process", ["sh", "-c", f'ulimit -d {limit // 1024} && exec "$@"', "sh"]


def sampled(command: Sequence[str]) -> list[int]:
    """Run the command; [peak private bytes, peak private and shared bytes] over all its processes."""
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    peak, done = [0, 0], threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            private = proportional = 0
            for pid in descendants(process.pid):
                with contextlib.suppress(OSError), Path(f"/proc/{pid}/smaps_rollup").open(encoding="ascii") as lines:
                    for line in lines:
                        private += int(line.split()[1]) * 1024 if line.startswith("Private_") else 0
                        proportional += int(line.split()[1]) * 1024 if line.startswith("Pss:") else 0
            peak[0], peak[1] = max(peak[0], private), max(peak[1], proportional)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        code = process.wait()
    finally:
        done.set()
        sampler.join()
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return peak


def write_model(folder: Path, shape: tuple[int, int, int, int], number: int) -> None:
    """One bf16 model in shards like those of the hub, each of up to 5 GB; number 1 is number 0 and a step."""
    import torch

    folder.mkdir(parents=True)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in sorted(llama_shapes(*shape)):
        length = 2 * torch.Size(size).numel()
        if filled + length > 5_000_000_000:
            groups.append([])
            filled = 0
        groups[-1].append((name, size))
        filled += length
    where: dict[str, str] = {}
    for position, group in enumerate(groups, 1):
        file = f"model-{position:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in group:
            begin, end = end, end + 2 * torch.Size(size).numel()
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
            where[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, size in group:
                write_random(stream, torch.Size(size).numel(), name, number)
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', encoding="utf-8")


def write_random(stream: BinaryIO, numel: int, name: str, number: int) -> None:
    """Normal numbers of a stretch of 16 Mi, repeated: what they are does not matter, and making seven thousand million would."""
    import torch

    generator = torch.Generator().manual_seed(sum(name.encode()))
    values = torch.randn(min(numel, PIECE), generator=generator).mul_(0.02)
    if number:
        values += torch.randn(len(values), generator=generator).mul_(0.001)
    data = values.bfloat16().view(torch.uint8).numpy().data
    for start in range(0, numel, PIECE):
        stream.write(data[: 2 * min(PIECE, numel - start)])


if __name__ == "__main__":
    main()
