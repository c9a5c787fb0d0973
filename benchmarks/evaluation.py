"""What a candidate costs besides the model's own work: its merge into the live model, and everything around the forward passes.

    python benchmarks/evaluation.py                 # all three tables; --size 0.3 for less memory

1. The tiny zoo: building a linear merge of some members and writing it into the live model, against scoring it on 100 items of the zoo's
   six tasks.
2. Writing a merge of --size billion parameters (float32 live, bf16 members in memory) into a live model, against the bandwidth limit: the
   time in which as many threads move as many bytes (members read, live model written) by copying float32 tensors.
3. Scoring tasks of 300 items against calling the model directly: the same batches as id tensors that were made before, transformers' own
   forward passes, with a cache where text is generated, for as many tokens as the answers have; no texts, no stop strings, no marks, no
   store. And against the forward passes that scoring itself makes, which share what prompts have in common.

Every number is the median of --repeats. The result is Markdown on stdout.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, open_checkpoint
from modelglue.evaluation import CandidateEvaluator, ResidentModel, ScoreStore, TaskSet
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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["merge", "large", "overhead"], default=None)
    options = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, median of {options.repeats}.\n")
    if options.only in (None, "merge"):
        merge_table(options.repeats)
    if options.only in (None, "large"):
        large_table(options.size, options.repeats)
    if options.only in (None, "overhead"):
        overhead_table(options.repeats)


# -- the tiny zoo -----------------------------------------------------------------------------------------------------------------


def merge_table(repeats: int) -> None:
    models = {name: open_checkpoint(ZOO / "models" / name) for name in MEMBERS}
    tasks = TaskSet.load([f"{skill}_proxy" for skill in SKILLS], ZOO / "tasks")
    print("| members | build, ms | into the live model, ms | scoring 100 items, ms | merge / scoring |")
    print("|---|---|---|---|---|")
    for count in (2, 4, 8):
        made, written, scored = [], [], []
        with ScoreStore(":memory:") as store:
            resident = ResidentModel()
            evaluator = CandidateEvaluator(models, tasks, store, resident=resident)
            plan = Plan.prefix(evaluator, {skill: 17 if number < 4 else 16 for number, skill in enumerate(SKILLS)})
            for number in range(repeats + 2):
                candidate = Candidate.linear({name: 1 + (place + 1) * (number + 1) / 100 for place, name in enumerate(MEMBERS[:count])})
                start = time.perf_counter()
                expression, key = evaluator.members.expression(candidate), evaluator.key(candidate)
                middle = time.perf_counter()
                resident.holding(expression, key)
                end = time.perf_counter()
                evaluator.evaluate(candidate, plan)
                made.append(middle - start)
                written.append(end - middle)
                scored.append(time.perf_counter() - end)
        build_time, write, score = (statistics.median(values[2:]) * 1000 for values in (made, written, scored))
        print(f"| {count} | {build_time:.2f} | {write:.2f} | {score:.1f} | {(build_time + write) / score:.1%} |")
    print()


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
    limit = bandwidth(torch.get_num_threads(), repeats)
    print(f"{numel / 1e9:.2f} B parameters; copying moves {limit / 1e9:.1f} GB/s.\n")
    print("| merge | s | ns per parameter | limit, ns | ratio |")
    print("|---|---|---|---|---|")
    resolve: Mapping[str, Checkpoint] = {str(number): member for number, member in enumerate(members)}
    for label, names, store in (
        ("one model", ["0"], None),
        ("linear of 2", ["0", "1"], None),
        ("linear of 2, stored float32", ["0", "1"], "float32"),
    ):
        made = members[0] if len(names) == 1 else build(linear_recipe(names, [0.4, 0.6], store), resolve=resolve.__getitem__)
        seconds = median(lambda made=made: load_into(made, live), max(repeats // 2, 3))
        bound = (2 * len(names) + 4) * numel / limit
        print(f"| {label} | {seconds:.2f} | {seconds / numel * 1e9:.2f} | {bound / numel * 1e9:.2f} | {seconds / bound:.2f} |")
    print()


def noise(shape: torch.Size, seed: int) -> torch.Tensor:
    block = torch.randn(2**16, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)


def bandwidth(threads: int, repeats: int) -> float:
    """Bytes a second that copying reads and writes, with tensors much larger than the caches."""
    tensors = [(torch.ones(2**25), torch.empty(2**25).fill_(0)) for _ in range(threads)]

    def copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        torch.set_num_threads(1)
        pair[1].copy_(pair[0])

    with ThreadPoolExecutor(threads) as pool:
        seconds = median(lambda: list(pool.map(copy, tensors)), repeats)
    return threads * 2 * 4 * 2**25 / seconds


# -- overhead ---------------------------------------------------------------------------------------------------------------------


def overhead_table(repeats: int) -> None:
    model = open_checkpoint(ZOO / "models" / "generalist")
    live = ResidentModel().holding(model, "m")
    print("| task (300 items) | evaluation, ms | the model directly, ms | overhead | its own forward passes, ms | around them |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for skill in ("reverse", "larger"):
            tasks = three_hundred(skill, Path(folder))
            direct = directly(live, tasks)
            spent = passes(live.model)
            whole, alone, within = [], [], []
            for number in range(repeats + 1):
                spent.clear()
                start = time.perf_counter()
                evaluate(live, tasks, str(number))
                whole.append(time.perf_counter() - start)
                within.append(sum(spent))
                alone.append(timed(direct))
            live.model.__dict__.pop("forward")
            total, least, own = (statistics.median(values[1:]) * 1000 for values in (whole, alone, within))
            print(f"| {skill} | {total:.0f} | {least:.0f} | {total / least - 1:.0%} | {own:.0f} | {total / own - 1:.0%} |")


def passes(model: Any) -> list[float]:
    """The seconds of every forward pass from now on."""
    spent: list[float] = []
    forward = model.forward

    @functools.wraps(forward)
    def watched(*values: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return forward(*values, **options)
        finally:
            spent.append(time.perf_counter() - start)

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


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(function: Callable[[], object], repeats: int) -> float:
    return statistics.median([timed(function) for _ in range(repeats + 1)][1:])


if __name__ == "__main__":
    main()
