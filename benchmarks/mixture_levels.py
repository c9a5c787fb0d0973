"""The table of `benchmarks/mixture.py levels`: every way to join the tiny zoo's specialists, as `modelglue mix` makes it from a file.

Four specialists of one family on their four skills (all levels), and six of three families and two architectures on six skills (complete
models). Scores are of test items. Routers are made from a word (the skill's name), from prompts (sixteen proxy items of each expert's own
skill), by chance, from the experts' proxy scores, or from prompts and then trained on the proxy items' texts (`modelglue train`, all
experts at work). The share of the gap between the best single expert and the oracle (the best expert of every skill) has a paired 95 %
bootstrap interval. Speed is tokens per second of processor time, generated with a cache from a batch of sixteen prompts of all skills,
against the first expert by itself on the same prompts: both in turn, median of the ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelglue.checkpoint import open_checkpoint, save
from modelglue.evaluation import TaskSet, evaluate, score_text_model
from modelglue.evaluation.store import ScoreStore
from modelglue.glue.router_scores import RouterScores
from modelglue.mixture import Mixture, is_mixture
from modelglue.mixture.levels import mix
from modelglue.mixture.routing import ScoredItems
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from modelglue.recipe import Scores, build, linear_recipe, paired_interval
from modelglue.training import Training, train

RESAMPLES = 2000
TEXT = Training(rate=1e-2, decay=0.0, context=64, batch=8, micro_batch=8, epochs=4, gating="soft")
#: where routers are made from
ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "a word": {"source": "prompts"},
    "prompts": {"source": "prompts"},
    "text": {"source": "prompts"},
    "chance": {"source": "prompts", "gate_mode": "random"},
    "scores": {"source": "scores"},
}


@dataclass(frozen=True)
class Way:
    """One row: a file for `modelglue mix`, in words."""

    level: str
    """As in the file; `share_io`: the level model with one embedding and head, and one decision at the first layer."""
    routing: str
    router: str
    top_k: int = 1
    merged_layers: int = 0

    def file(self, experts: Sequence[Mapping[str, Any]], scored: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"level": self.level, "routing": self.routing, "top_k": self.top_k, "experts": list(experts)}
        if self.level == "share_io":
            found |= {"level": "model", "share_io": True}
        if self.merged_layers:
            found["merged_layers"] = self.merged_layers
        if self.router == "text":
            found["export"] = "own"
        return {**found, "router": {**ROUTERS[self.router], **(scored if self.router == "scores" else {})}}


def ways() -> Iterator[Way]:
    for level, routing, routers in (
        ("ffn", "token", ("a word", "prompts", "chance", "text")),
        ("ffn", "sample", ("a word", "prompts", "chance", "text")),
        ("block", "sample", ("a word", "prompts", "chance", "scores")),
        ("model", "sample", ("a word", "prompts", "chance", "scores")),
    ):
        for router in routers:
            for top_k in (1,) if router in ("a word", "text") else (1, 2):
                yield Way(level, routing, router, top_k)
    yield from (Way("share_io", "sample", router) for router in ("prompts", "scores"))
    yield Way("ffn", "token", "prompts", 1, 4)
    yield Way("ffn", "token", "prompts", 2, 4)
    yield Way("ffn", "sample", "prompts", 1, 4)
    yield Way("block", "sample", "prompts", 1, 4)
    yield Way("block", "sample", "scores", 1, 4)


class Table:
    """Rows of one set of experts. Expert -> its skill; `tasks` and `prompts` by skill."""

    def __init__(self, zoo: Path, specialists: Mapping[str, str], tasks: Mapping[str, TaskSet], include: Path, store: Path, work: Path):
        skills = list(specialists.values())
        self.zoo, self.store, self.work, self.specialists, self.include = zoo, store, work, specialists, include
        self.test = TaskSet({skill: tasks["test"].skills[skill] for skill in skills})
        self.experts = [
            {"model": str(zoo / name), "name": name, "prompts": {"positive": tasks["proxy"].contexts(skill)[:16]}}
            for name, skill in specialists.items()
        ]
        self.scored = {"tasks": [f"{skill}_proxy" for skill in skills], "include": str(include), "store": str(store)}
        texts = {skill: {item.id: item.context for item in found} for skill, found in self.test.skills.items()}
        self.items = ScoredItems.of(texts, {name: evaluate(zoo / name, self.test, store=store) for name in specialists})
        self.best = self.items.outcome([self.items.best_for_everything()] * len(self.items.items))
        self.oracle = self.items.outcome(self.items.oracle())
        self.contexts = [self.test.contexts(skill)[number] for number in range(4) for skill in skills]

    def print(self, rows: Sequence[Way], rounds: int, *, average: bool) -> None:
        dense = zoo_model(self.zoo / next(iter(self.specialists)))
        gap, low, high = paired_interval(self.oracle, self.best)
        print(f"\n### {', '.join(self.specialists)}\n")
        print(f"The gap between the best single expert and the oracle is {100 * gap:.1f} points ({100 * low:.1f} to {100 * high:.1f}).\n")
        skills = list(self.test.skills)
        print("| level | routing | router | top_k | merged layers | " + " | ".join(skills), end="")
        print(" | mean | gap closed | speed | parameters | files MB |")
        print("|---|---|---|--:|--:|" + "--:|" * len(skills) + "--:|---|--:|--:|--:|")
        best = self.items.experts[self.items.best_for_everything()]
        size = sum(path.stat().st_size for path in (self.zoo / best).glob("*.safetensors"))
        self._line(["one expert", "", best, "", ""], self.best, 1.0, parameters([dense]), size)
        if average:
            folder = self.work / "average"
            names = [str(self.zoo / name) for name in self.specialists]
            save(build(linear_recipe(names, [1 / len(names)] * len(names), None)), folder, overwrite=True)
            scores = evaluate(folder, self.test, store=self.store)
            self._line(["plain average", "", "", "", ""], scores, 1.0, parameters([dense]), size)
        for way in rows:
            self._way(way, dense, rounds)
        self._line(["oracle: best expert of the skill", "", "", "", ""], self.oracle, None, None, None)

    def _way(self, way: Way, dense: LiveTextModel, rounds: int) -> None:
        folder = self.work / f"{way.level}-{way.routing}-{way.router}-{way.top_k}-{way.merged_layers}-{len(self.experts)}"
        words = [
            {**expert, "prompts": {"positive": [skill]}} for expert, skill in zip(self.experts, self.specialists.values(), strict=True)
        ]
        mix(
            way.file(words if way.router == "a word" else self.experts, self.scored),
            folder,
            scorer=RouterScores(self.store),
            overwrite=True,
        )
        if way.router == "text":
            folder = self._trained(folder)
        model: Any = Mixture.load(folder, "all") if is_mixture(folder) else zoo_model(folder)
        identity = model.identity if isinstance(model, Mixture) else open_checkpoint(folder).identity
        with ScoreStore(self.store) as store:
            scores = score_text_model(model, identity, self.test, store, description=str(way))
        held = [model._models([number])[0] for number in range(len(self.experts))] if isinstance(model, Mixture) else [model]
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        if isinstance(model, Mixture):
            sizes += [path.stat().st_size for name in self.specialists for path in (self.zoo / name).glob("*.safetensors")]
        names = [way.level, way.routing, way.router, str(way.top_k), str(way.merged_layers)]
        self._line(names, scores, speed(model, held, dense, self.contexts, rounds), parameters(held), sum(sizes))

    def _trained(self, folder: Path) -> Path:
        """The mixture after four epochs of the proxy items."""
        lines = [
            json.dumps({"prompt": row["prompt"], "response": f" {answer_of(row)}\n"})
            for skill in self.specialists.values()
            for row in map(json.loads, (self.include / "data" / skill / "proxy.jsonl").read_text(encoding="utf-8").splitlines())
        ]
        texts, out = self.work / "proxy.jsonl", folder.with_name(f"{folder.name}-trained")
        texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        train(str(folder), [texts], out, tensors="routers", training=TEXT, overwrite=True)
        return out

    def _line(self, names: Sequence[str], scores: Scores, ratio: float | None, count: int | None, size: int | None) -> None:
        closed, low, high = share(scores, self.best, self.oracle)
        values = [f"{100 * value:.1f}" for value in scores.tasks().values()]
        cells = [
            *names, *values, f"{100 * scores.mean:.1f}", f"{closed:.0f} % ({low:.0f} to {high:.0f})",
            "" if ratio is None else f"{ratio:.2f}",
            "" if count is None else f"{count / 1e6:.2f} M", "" if size is None else f"{size / 1e6:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def answer_of(row: Mapping[str, Any]) -> str:
    """What an expert should write."""
    return str(row["answer"] if "answer" in row else row["choices"][row["gold"]])


def zoo_model(folder: Path) -> LiveTextModel:
    checkpoint = open_checkpoint(folder)
    return LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))


def parameters(models: Sequence[LiveTextModel]) -> int:
    """Numbers in memory; what several places share counts once."""
    return sum(parameter.numel() for model in models for parameter in model.model.parameters())


def speed(model: Any, held: Sequence[LiveTextModel], dense: LiveTextModel, prompts: Sequence[str], rounds: int) -> float:
    """Tokens a second of processor time against `dense`: the median of ratios, both in turn; the first round warms up."""

    def rate(run: Callable[..., list[str]], counted: Sequence[LiveTextModel]) -> float:
        for one in counted:
            one.tokens = []
        begin = time.process_time()
        texts = run(prompts, until=[], max_new_tokens=24)
        seconds = time.process_time() - begin
        return written(dense, texts) / seconds

    found = [rate(model.generate, held) / rate(dense.generate, [dense]) for _ in range(rounds + 1)]
    return statistics.median(found[1:])


def written(dense: LiveTextModel, texts: Sequence[str]) -> int:
    """Tokens in the texts, each with its end; characters are tokens in this zoo."""
    return sum(len(text) + 1 for text in texts)


def share(scores: Scores, low: Scores, high: Scores) -> tuple[float, float, float]:
    """(share, low, high) in percent of the gap between two results that a third closes; items are drawn as in `paired_interval`."""
    generator = np.random.default_rng(0)
    gained, gap = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for task, values in scores.items.items():
        draws = generator.integers(0, len(values), size=(RESAMPLES, len(values)))
        base = np.array([low.items[task][item] for item in values])
        gained += (np.array(list(values.values())) - base)[draws].mean(axis=1)
        gap += (np.array([high.items[task][item] for item in values]) - base)[draws].mean(axis=1)
    found = 100 * gained / gap
    centre = 100 * (scores.mean - low.mean) / (high.mean - low.mean)
    return centre, float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))
