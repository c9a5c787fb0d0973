"""What routers are worth on the tiny zoo: from prompts, learned from proxy scores, by perplexity, and an oracle.

    python benchmarks/mixture.py routers RUN [RUN ...] --store scores.sqlite
    python benchmarks/mixture.py routers --specialists examples/tiny-zoo/models --store scores.sqlite
    python benchmarks/mixture.py levels --store scores.sqlite

`levels` is described in mixture_levels.py. `routers`: a RUN is the folder of a finished `modelglue glue`; its experts are routed between.
`--specialists` routes between the four specialists of the family, `drifted-child` and `stranger` of a folder of models instead, each with
sixteen proxy items of its own skill as prompts.
Every expert is scored once on proxy and test items (kept in --store); routers see proxy items alone, and test items only say what came
of it. The gain is over the router from prompts with all its settings left to `auto`, in points of the mean over skills, with a paired
95 % interval. The oracle knows the best expert of every skill; where it is less than 2 points above that router, the share of the gap
that is closed is not measurable.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixture_levels import Table, ways
from modelglue.checkpoint import open_checkpoint
from modelglue.evaluation import TaskSet, evaluate
from modelglue.mixture import ExpertSpec, RouterSpec, read_manifest
from modelglue.mixture.gates import Gate
from modelglue.mixture.prompted import prompt_router
from modelglue.mixture.router import Reader
from modelglue.mixture.routing import Fit, ScoredItems, bits_per_character, learn_router
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from modelglue.recipe import Scores, paired_interval

ZOO = Path(__file__).parents[1] / "examples" / "tiny-zoo"
SKILLS = ("reverse", "sort", "next", "larger", "skip", "double")
SPECIALISTS = {"reverse": "reverse", "sort": "sort", "next": "next", "larger": "larger", "drifted-child": "skip", "stranger": "double"}
#: gaps below this say nothing about a router
MEASURABLE = 0.02
AUTO = RouterSpec(gate_mode="auto", router_layer="auto")


@dataclass(frozen=True)
class Field:
    """Experts, and what each makes of every proxy and test item."""

    name: str
    experts: Sequence[ExpertSpec]
    proxy: ScoredItems
    test: ScoredItems

    @classmethod
    def of(cls, name: str, experts: Sequence[ExpertSpec], tasks: dict[str, TaskSet], store: Path) -> Field:
        items = {}
        for split, task_set in tasks.items():
            texts = {skill: {item.id: item.context for item in found} for skill, found in task_set.skills.items()}
            items[split] = ScoredItems.of(texts, {one.name: evaluate(one.path, task_set, store=store) for one in experts})
        return cls(name, experts, items["proxy"], items["test"])

    def routed(self, encoder: Path, layer: int, gate: Gate) -> Scores:
        """Test scores behind a gate: every item by the expert with the largest logit, as the runtime has it."""
        checkpoint = open_checkpoint(encoder)
        reader = Reader(load_live(checkpoint), load_tokenizer(checkpoint), layer)
        return self.test.outcome(reader.logits(self.test.texts, gate, "prompt").argmax(dim=1).tolist())

    def from_prompts(self, router: RouterSpec) -> tuple[Scores, str]:
        made = prompt_router(self.experts, router, None if router is AUTO else self.experts[0].path)
        return self.routed(made.encoder, made.layer, made.gate), f"{made.mode}, layer {made.layer} of {made.encoder.name}"

    def learned(self, kind: Literal["linear", "mlp"], objective: Literal["best", "expected"]) -> tuple[Scores, str]:
        found = learn_router(self.experts, self.proxy, AUTO, Fit(kind=kind, objective=objective))
        made = found.router
        assert made is not None, found.message
        verdict = "used" if found.used else "prompts stay"
        return self.routed(made.encoder, made.layer, made.gate), f"{verdict}; layer {made.layer} of {made.encoder.name}"

    def by_perplexity(self) -> tuple[Scores, str]:
        bits = []
        for expert in self.experts:
            checkpoint = open_checkpoint(expert.path)
            bits.append(bits_per_character(LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint)), self.test.texts))
        return self.test.outcome([row.index(min(row)) for row in map(list, zip(*bits, strict=True))]), "every expert reads every prompt"

    def rows(self) -> list[tuple[str, Callable[[], tuple[Scores, str]]]]:
        count, best = len(self.test.items), self.proxy.best_for_everything()
        every_item = [item.values.index(max(item.values)) for item in self.test.items]
        prompts = [("random", 0), ("uniform_random", 0), ("cheap_embed", 0), ("hidden", 0), ("hidden_avg", 0), ("hidden", "auto")]
        return [
            ("one expert for everything", lambda: (self.test.outcome([best] * count), self.test.experts[best])),
            *(
                (f"prompts: {mode}, layer {layer}", lambda mode=mode, layer=layer: self.from_prompts(RouterSpec(mode, layer)))
                for mode, layer in prompts
            ),
            ("**prompts: auto**", lambda: self.from_prompts(AUTO)),
            ("perplexity", self.by_perplexity),
            *(
                (f"**scores: {kind}, {objective}**", lambda kind=kind, objective=objective: self.learned(kind, objective))
                for kind in ("linear", "mlp") for objective in ("best", "expected")
            ),
            ("oracle: best expert of the skill", lambda: (self.test.outcome(self.test.oracle()), "")),
            ("best expert of every item", lambda: (self.test.outcome(every_item), "no router can know")),
        ]  # fmt: skip


def routers(field: Field) -> None:
    """One table: test score, gain over the prompts' router, share of the gap to the oracle that is closed, and the time it took."""
    reference, _ = field.from_prompts(AUTO)
    oracle = field.test.outcome(field.test.oracle())
    gap, low, high = paired_interval(oracle, reference)
    print(f"\n### {field.name}: {', '.join(expert.name for expert in field.experts)}\n")
    print(f"Gap between the router from prompts and the oracle: {100 * gap:.1f} points ({100 * low:.1f} to {100 * high:.1f}).\n")
    print("| router | test | gain over prompts: auto | gap closed | seconds | |")
    print("|---|--:|---|--:|--:|---|")
    for name, run in field.rows():
        start = time.perf_counter()
        scores, note = run()
        seconds = time.perf_counter() - start
        gain, low, high = paired_interval(scores, reference)
        closed = f"{100 * gain / gap:.0f} %" if gap >= MEASURABLE else "not measurable"
        interval = f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        print(f"| {name} | {100 * scores.mean:.1f} | {interval} | {closed} | {seconds:.1f} | {note} |", flush=True)


def item_sets() -> dict[str, TaskSet]:
    return {split: TaskSet.load([f"{skill}_{split}" for skill in SKILLS], ZOO / "tasks") for split in ("proxy", "test")}


def fields(runs: Sequence[Path], specialists: Sequence[Path], store: Path) -> list[Field]:
    tasks = item_sets()
    found = []
    for run in runs:
        manifest, _ = read_manifest(run / "mixture")
        found.append(Field.of(f"experts of the run {run.name}", manifest.specs(run / "mixture"), tasks, store))
    for folder in specialists:
        experts = [
            ExpertSpec(name, folder / name, tuple(tasks["proxy"].contexts(skill)[:16])) for name, skill in SPECIALISTS.items()
        ]  # fmt: skip
        found.append(Field.of(f"specialists in {folder.name}", experts, tasks, store))
    return found


def levels(models: Path, store: Path | None, rounds: int) -> None:
    """Two tables: four specialists of one family at all levels, six of three families as complete models."""
    tasks = item_sets()
    with tempfile.TemporaryDirectory() as work:
        for number, specialists in enumerate((dict(list(SPECIALISTS.items())[:4]), SPECIALISTS)):
            table = Table(models, specialists, tasks, ZOO / "tasks", store or Path(work) / "scores.sqlite", Path(work))
            table.print([way for way in ways() if number == 0 or (way.level == "model" and way.top_k == 1)], rounds, average=number == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("routers", help="one table for every run and every folder of specialists")
    command.add_argument("runs", nargs="*", type=Path)
    command.add_argument("--specialists", nargs="*", type=Path, default=[])
    command.add_argument("--store", type=Path, default=None, help="where the experts' scores are kept")
    command = commands.add_parser("levels", help="every level, routing and router between the specialists of --specialists")
    command.add_argument("--specialists", type=Path, default=ZOO / "models")
    command.add_argument("--store", type=Path, default=None, help="where scores are kept")
    command.add_argument("--rounds", type=int, default=7, help="generations that are timed")
    options = parser.parse_args()
    if options.command == "levels":
        levels(options.specialists, options.store, options.rounds)
        return
    store = options.store or Path(tempfile.mkdtemp()) / "scores.sqlite"
    for field in fields(options.runs, options.specialists, store):
        routers(field)


if __name__ == "__main__":
    main()
