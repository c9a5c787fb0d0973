"""What a candidate costs besides the model's own work: its merge into the live model, and everything around the forward passes.

    python benchmarks/evaluation.py                 # all three tables; --size 0.3 for less memory

1. The tiny zoo: building a linear merge of some members and writing it into the live model, against scoring it on 100 items of the zoo's
   six tasks. Every round is another candidate.
2. Writing a merge of --size billion parameters (float32 live, bf16 members in memory) into a live model, against the bandwidth limit: what
   it takes to move as many bytes (members read, live model written) by copying float32 tensors much larger than the caches.
3. Scoring tasks of 300 items, against (a) the forward passes that scoring itself makes, which share what prompts have in common, and (b)
   calling the model directly: the same batches as id tensors that were made before, transformers' own forward passes, with a cache where
   text is generated, for as many tokens as the answers have; no texts, no stop strings, no marks, no store. Every round is another
   candidate, as in a search: questions have been tokenised before, answers have not been seen.

What is compared runs by turns in one process, --repeats times. Times are CPU seconds (all threads together), so that what else runs on the
machine counts little, and the least of all rounds; ratios are of those. Sums run in machine code (MODELGLUE_COMPILE=on) unless the
environment says otherwise. The result is Markdown on stdout.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, open_checkpoint
from modelglue.checkpoint.engine import native
from modelglue.evaluation import CandidateEvaluator, ResidentModel, ScoreStore, TaskSet
from modelglue.evaluation.members import Members
from modelglue.evaluation.scoring import BATCH_ITEMS, answer
from modelglue.models import inference, load_into
from modelglue.models.build import empty_model
from modelglue.recipe import Candidate, Plan, build, linear_recipe

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "examples" / "tiny-zoo"
SKILLS = ["sort", "reverse", "larger", "next", "skip", "double"]
MEMBERS = ["reverse", "sort", "larger", "next", "generalist", "drifted", "base", "reverse-twin"]
SIZES = {"0.1": (640, 1728, 14, 128), "0.3": (1024, 2816, 22, 256), "1.1": (2048, 5632, 22, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.1")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["merge", "large", "overhead"], default=None)
    options = parser.parse_args()
    mode = os.environ.setdefault("MODELGLUE_COMPILE", "on")
    sums = "machine code" if native.ready(0) else "plain torch"
    machine = f"{processor()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{machine}, {torch.get_num_threads()} threads; sums in {sums} (MODELGLUE_COMPILE={mode}); least of {options.repeats} rounds.\n")
    if options.only in (None, "merge"):
        merge_table(options.repeats)
    if options.only in (None, "large"):
        large_table(options.size, options.repeats)
    if options.only in (None, "overhead"):
        overhead_table(options.repeats)


def processor() -> str:
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


# -- the tiny zoo -----------------------------------------------------------------------------------------------------------------


def merge_table(repeats: int) -> None:
    models = {name: open_checkpoint(ZOO / "models" / name) for name in MEMBERS}
    tasks = TaskSet.load([f"{skill}_proxy" for skill in SKILLS], ZOO / "tasks")
    print("| members | build, ms | into the live model, ms | scoring 100 items, ms | merge / scoring |")
    print("|---|---|---|---|---|")
    rounds: dict[int, list[tuple[float, float, float]]] = {count: [] for count in (2, 4, 8)}
    with ScoreStore(":memory:") as store:
        resident = ResidentModel()
        evaluator = CandidateEvaluator(models, tasks, store, resident=resident)
        plan = Plan.prefix(evaluator, {skill: 17 if number < 4 else 16 for number, skill in enumerate(SKILLS)})
        for number in range(repeats + 2):
            for count, found in rounds.items():
                candidate = nth_candidate(number, MEMBERS[:count])
                start = time.process_time()
                expression, key = evaluator.members.expression(candidate), evaluator.key(candidate)
                built = time.process_time()
                resident.holding(expression, key)
                written = time.process_time()
                found.append((built - start, written - built, timed(partial(evaluator.evaluate, candidate, plan))))
    for count, found in rounds.items():
        build_time, written, scored = (min(values) * 1000 for values in zip(*found[2:], strict=True))
        print(f"| {count} | {build_time:.2f} | {written:.2f} | {scored:.1f} | {(build_time + written) / scored:.1%} |")
    print()


def nth_candidate(number: int, members: Sequence[str]) -> Candidate:
    return Candidate.linear({name: 1 + (place + 1) * (number + 1) / 100 for place, name in enumerate(members)})


# -- large models -----------------------------------------------------------------------------------------------------------------


def large_table(size: str, repeats: int) -> None:
    hidden, intermediate, layers, narrow = SIZES[size]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": narrow // 64, "vocab_size": 32000,
        "tie_word_embeddings": False,
    }  # fmt: skip
    live = empty_model(config, "synthetic")
    shapes = {name: value.shape for name, value in live.state_dict().items()}
    numel = sum(shape.numel() for shape in shapes.values())
    members = [TensorsCheckpoint({name: noise(shape, seed) for name, shape in shapes.items()}, config) for seed in range(2)]
    resolve: Mapping[str, Checkpoint] = {str(number): member for number, member in enumerate(members)}
    merges = {
        "one model": (members[0], 1),
        "linear of 2": (build(linear_recipe(["0", "1"], [0.4, 0.6], None), resolve=resolve.__getitem__), 2),
        "linear of 2, stored float32": (build(linear_recipe(["0", "1"], [0.4, 0.6], "float32"), resolve=resolve.__getitem__), 2),
    }
    copies, seconds = [], {label: float("inf") for label in merges}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        copy = copying(pool, torch.get_num_threads())
        for _ in range(repeats):
            for label, (made, _) in merges.items():
                copies.append(timed(copy))
                seconds[label] = min(seconds[label], timed(partial(load_into, made, live)))
    limit = torch.get_num_threads() * _COPIED_BYTES / min(copies)
    print(f"{numel / 1e9:.2f} B parameters; copying moves {limit / 1e9:.1f} GB per CPU second.\n")
    print("| merge | s | ns per parameter | limit, ns | ratio |")
    print("|---|---|---|---|---|")
    for label, (_, count) in merges.items():
        bound, spent = (2 * count + 4) * numel / limit, seconds[label]
        print(f"| {label} | {spent:.2f} | {spent / numel * 1e9:.2f} | {bound / numel * 1e9:.2f} | {spent / bound:.2f} |")
    print()


def noise(shape: torch.Size, seed: int) -> torch.Tensor:
    block = torch.randn(2**16, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)


_COPIED_BYTES = 2 * 4 * 2**26


def copying(pool: ThreadPoolExecutor, threads: int) -> Callable[[], object]:
    """Reading and writing _COPIED_BYTES in every thread, in tensors much larger than the caches."""
    tensors = [(torch.ones(2**26), torch.zeros(2**26)) for _ in range(threads)]

    def copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        torch.set_num_threads(1)
        pair[1].copy_(pair[0])

    return lambda: list(pool.map(copy, tensors))


# -- overhead ---------------------------------------------------------------------------------------------------------------------


def overhead_table(repeats: int) -> None:
    models = {name: open_checkpoint(ZOO / "models" / name) for name in MEMBERS}
    members, resident = Members(models), ResidentModel()
    live = resident.holding(models["generalist"], "generalist")
    print("| task (300 items) | evaluation, ms | its own forward passes, ms | around them | the model directly, ms | against that |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for skill in ("reverse", "larger"):
            tasks = three_hundred(skill, Path(folder))
            spent = passes(live.model)
            whole, alone, within = [], [], []
            for number in range(repeats + 1):
                candidate = nth_candidate(number, ["generalist", skill, "drifted"])
                resident.holding(members.expression(candidate), members.identity(candidate))
                direct = directly(live, tasks)
                spent.clear()
                whole.append(timed(partial(evaluate, live, tasks, str(number))))
                within.append(sum(spent))
                alone.append(timed(direct))
            live.model.__dict__.pop("forward")
            total, own, least = (min(values[1:]) * 1000 for values in (whole, within, alone))
            around, against = total / own - 1, total / least - 1
            print(f"| {skill} | {total:.0f} | {own:.0f} | {around:.0%} | {least:.0f} | {against:+.0%} |")


def passes(model: Any) -> list[float]:
    """The CPU seconds of every forward pass from now on."""
    spent: list[float] = []
    forward = model.forward

    @functools.wraps(forward)
    def watched(*values: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return forward(*values, **options)
        finally:
            spent.append(time.process_time() - start)

    model.forward = watched
    return spent


def three_hundred(skill: str, folder: Path) -> TaskSet:
    """A task of the tiny zoo with 300 documents, from all of its sets."""
    lines = [
        line
        for split in ("proxy", "confirmation", "test")
        for line in (ZOO / "tasks" / "data" / skill / f"{split}.jsonl").read_text().splitlines()
    ]
    distinct = list(dict.fromkeys(lines))[:300]
    assert len(distinct) == 300
    (folder / f"{skill}.jsonl").write_text("\n".join(distinct) + "\n")
    settings: dict[str, Any] = yaml.safe_load((ZOO / "tasks" / f"{skill}_proxy.yaml").read_text())
    settings |= {"task": f"{skill}_300", "dataset_kwargs": {"data_files": {"test": f"{skill}.jsonl"}}}
    (folder / f"{skill}.yaml").write_text(json.dumps(settings))
    return TaskSet.load([f"{skill}_300"], folder)


def evaluate(live: Any, tasks: TaskSet, key: str) -> None:
    from modelglue.evaluation import score_text_model

    with ScoreStore(":memory:") as store:
        score_text_model(live, key, tasks, store)


def directly(live: Any, tasks: TaskSet) -> Callable[[], None]:
    """The model's work alone, on tensors that are there already."""
    (items,) = tasks.skills.values()
    batches = [items[start : start + BATCH_ITEMS] for start in range(0, len(items), BATCH_ITEMS)]
    if items[0].requests[0].generation is None:
        rows = [[live.tokenizer(r.context + r.continuation)["input_ids"] for item in batch for r in item.requests] for batch in batches]
        inputs = [padded(part[start : start + BATCH_ITEMS], left=False) for part in rows for start in range(0, len(part), BATCH_ITEMS)]

        def forward() -> None:
            with inference(live.model):
                for ids, mask in inputs:
                    live.model(input_ids=ids, attention_mask=mask).logits.log_softmax(dim=-1).argmax(dim=-1)

        return forward
    asked = [(padded([live.tokenizer(item.context)["input_ids"] for item in batch], left=True), steps(live, batch)) for batch in batches]

    def generate() -> None:
        with inference(live.model):
            for (ids, mask), count in asked:
                read(live.model, ids, mask, count)

    return generate


def steps(live: Any, batch: Sequence[Any]) -> int:
    """The longest answer of a batch, in tokens, the end of the line among them."""
    replies, _ = answer(live, [item.requests for item in batch])
    return max(len(live.tokenizer(str(reply))["input_ids"]) for (reply,) in replies)


def read(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int) -> None:
    past = None
    for _ in range(count):
        positions = (mask.cumsum(dim=1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=past, use_cache=True, logits_to_keep=1)
        past, ids = output.cache, output.logits[:, -1].argmax(dim=-1)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def padded(rows: Sequence[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
    mask = [[*pad, *[1] * len(row)] if left else [*[1] * len(row), *pad] for row, pad in zip(rows, pads, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


if __name__ == "__main__":
    main()
