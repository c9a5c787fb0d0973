"""What it costs to run a mixture: time for each token against the chosen expert alone, and memory with one expert at a time.

    python benchmarks/serving.py speed
    python benchmarks/serving.py memory --scratch /big/disk

`speed` compares, on the tiny zoo and on four random models of 25 M parameters, the processor time of a generated token behind the router
with that of the same prompts at the chosen expert by itself; both are run in turn and the median of the ratios is given.

`memory` writes eight bf16 models of 1.1 B parameters (random weights) under --scratch, which takes 18 GB, and removes them. It generates
with one expert by itself and with all eight behind a router under `residency: lru:1`, each in a process of its own, whose memory is
read 20 times a second: the resident set, and what is its own and its share of what others map too (Pss in /proc/PID/smaps_rollup, Linux
only). Pages of the mapped weights count. The mixture must stay below what one expert by itself holds plus 20 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from large import write_random
from merge import ROOT, llama_shapes

ZOO = ROOT / "examples" / "tiny-zoo" / "models"
NEEDED = 20_000_000_000
EXPERTS = 8
#: hidden size, intermediate size, layers, key-value width: 1.1 B parameters with a vocabulary of 32,000
SHAPE = (2048, 5632, 22, 256)
SMALL_SHAPE = (256, 704, 2, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"), help="folder with 20 GB of room; what is made there is removed")
    parser.add_argument("--small", action="store_true", help="models of 12 M parameters, to try this script")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    scratch = options.scratch / "modelglue-serving"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MODELGLUE_CACHE", str(scratch / "cache"))
    try:
        speed(scratch, options.rounds) if options.what == "speed" else memory(scratch, small=options.small)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# -- speed ------------------------------------------------------------------------------------------------------------------------


def speed(scratch: Path, rounds: int) -> None:
    from modelglue.mixture import ExpertSpec, RouterSpec, write_mixture

    prompts = {"sort": "sort: dcba =", "reverse": "reverse: abcd =", "next": "next: abcd =", "stranger": "double: abcd ="}
    zoo = [ExpertSpec(name, ZOO / name, (prompt,)) for name, prompt in prompts.items()]
    random = []
    for number, name in enumerate(prompts):
        write_llama(scratch / name, (512, 1408, 6, 256), number)
        random.append(ExpertSpec(name, scratch / name, (prompts[name],)))
    print("| experts | router layer | prompts | tokens each, at most | alone, ms a token | mixture, ms a token | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for title, experts, texts in (
        ("tiny zoo, 0.4 M", zoo, list(prompts.values())),
        ("random, 25 M", random, [f"{prompt} {number}" for number, prompt in enumerate(prompts.values())]),
    ):
        for layer in (0, 2):
            folder = scratch / f"mixture-{title[:4]}-{layer}"
            write_mixture(folder, experts, RouterSpec(router_layer=layer, gate_mode="hidden_avg"), encoder=experts[0].path)
            for rows in (1, 16):
                compare(folder, title, layer, texts, rows, rounds)


def compare(folder: Path, title: str, layer: int, texts: Sequence[str], rows: int, rounds: int) -> None:
    """One row of the table: every text `rows` times (so that one expert has a batch), by the mixture and by the expert it chooses."""
    from modelglue.mixture import Mixture

    mixed = Mixture.load(folder, "all")
    tokens = 48
    ratios, alone, routed = [], [], []
    for _ in range(rounds + 1):
        for text in texts:
            (route,) = mixed.route([text])
            (model,) = mixed._models(route.key)
            batch = [text] * rows
            how: dict[str, Any] = {"until": [], "max_new_tokens": tokens}
            times = []
            for run in (model.generate, mixed.generate):
                begin = time.process_time()
                run(batch, **how)
                written = sum(model.tokens) - rows * len(model.encoder.encode([text])[0])
                times.append(1000 * (time.process_time() - begin) / max(written, 1))
            alone.append(times[0])
            routed.append(times[1])
            ratios.append(times[1] / times[0])
    skip = len(texts)  # the first round warms up
    values = [statistics.median(found[skip:]) for found in (alone, routed, ratios)]
    print(f"| {title} | {layer} | {rows} | {tokens} | {values[0]:.3f} | {values[1]:.3f} | {values[2]:.3f} |", flush=True)


# -- memory -----------------------------------------------------------------------------------------------------------------------


def memory(scratch: Path, *, small: bool) -> None:
    from modelglue.mixture import ExpertSpec, Mixture, RouterSpec, write_mixture

    free = shutil.disk_usage(scratch).free
    if free < NEEDED and not small:
        raise SystemExit(f"{scratch}: {free:,} bytes are free and {NEEDED:,} are needed. Choose another --scratch.")
    names = [f"expert{number}" for number in range(EXPERTS)]
    for number, name in enumerate(names):
        write_llama(scratch / name, SMALL_SHAPE if small else SHAPE, number)
        print(f"wrote {name}", file=sys.stderr, flush=True)
    weights = sum(path.stat().st_size for path in (scratch / names[0]).glob("*.safetensors"))
    experts = [ExpertSpec(name, scratch / name, (name,)) for name in names]
    letters = "abcdefghijklmnopqrstuvwxyz"
    print("| router layer | process | peak resident MB | peak own and shared MB | above an empty process, share of one expert |")
    print("|--:|---|--:|--:|--:|")
    empty = sampled([sys.executable, "-c", "import torch, transformers; from transformers import AutoModelForCausalLM, LlamaForCausalLM"])
    print(f"| | empty | {empty[0] / 1e6:.0f} | {empty[1] / 1e6:.0f} | |", flush=True)
    alone = generating(scratch / names[0], ["abc"], [])
    print(f"| | one expert alone | {alone[0] / 1e6:.0f} | {alone[1] / 1e6:.0f} | {(alone[1] - empty[1]) / weights:.3f} |", flush=True)
    for layer in (0, 2):
        folder = scratch / f"mixture{layer}"
        write_mixture(folder, experts, RouterSpec(gate_mode="random", router_layer=layer), encoder=experts[0].path)
        found: dict[str, str] = {}  # a prompt for every expert
        texts = [first * 3 + second for first in letters for second in letters]
        for text, route in zip(texts, Mixture.load(folder, "lru:1", dtype="stored").route(texts), strict=True):
            found.setdefault(route.name, text)
        if len(found) < EXPERTS:
            print(f"only {len(found)} experts are chosen by any of {len(texts)} prompts", file=sys.stderr)
        peak = generating(folder, list(found.values()), ["--residency", "lru:1"])
        share = (peak[1] - empty[1]) / weights
        print(f"| {layer} | {len(found)} experts, lru:1 | {peak[0] / 1e6:.0f} | {peak[1] / 1e6:.0f} | {share:.3f} |", flush=True)
        if peak[1] > 1.2 * alone[1]:
            raise SystemExit(f"the mixture held {peak[1] / alone[1]:.3f} of what one expert by itself does, allowed is 1.2")


def generating(folder: Path, prompts: Sequence[str], options: Sequence[str]) -> list[int]:
    command = [sys.executable, "-m", "modelglue", "generate", str(folder), *prompts, "--max-new-tokens", "4", "--dtype", "stored"]
    return sampled([*command, *options, "--quiet"])


def sampled(command: Sequence[str]) -> list[int]:
    """Run the command; [peak resident bytes, peak bytes of its own and its share of others'] of its process."""
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    peak, done = [0, 0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(OSError), Path(f"/proc/{process.pid}/smaps_rollup").open(encoding="ascii") as lines:
                values = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[0] in ("Rss:", "Pss:")}
                peak[0], peak[1] = max(peak[0], values["Rss:"]), max(peak[1], values["Pss:"])

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


def write_llama(folder: Path, shape: tuple[int, int, int, int], number: int) -> None:
    """A bf16 Llama of one file, with the tokenizer of the tiny zoo."""
    import torch

    hidden, intermediate, layers, width = shape
    folder.mkdir(parents=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors, end = sorted(llama_shapes(*shape)), 0
    for name, size in tensors:
        begin, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors:
            write_random(stream, torch.Size(size).numel(), f"{name}{number}", 0)
        stream.flush()
        os.fsync(stream.fileno())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": width // 64, "vocab_size": 32000,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / "sort" / file, folder)


if __name__ == "__main__":
    main()
