"""A run folder as `modelglue glue` leaves it: eleven models, three families, five skills; or more models, or other names.

All decisions are taken and written by the library itself on made-up scores, so the files are the real ones in everything but the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from modelglue.checkpoint import TensorsCheckpoint, write_json_atomic
from modelglue.glue import decide, mix
from modelglue.glue.schema import ClusterOptions, MixtureOptions, SelectOptions
from modelglue.mixture import SelfTest
from modelglue.recipe import Candidate, Scores
from modelglue.zoo import Similarity, ZooModel, find_families

SKILLS = ("reverse", "sort", "next", "larger", "double")
HOME = {"reverse": 0, "reverse-twin": 0, "sort": 0, "sort-twin": 0, "next": 0, "larger": 0, "generalist": 0, "corrupted": 0,
        "drifted": 1, "drifted-child": 1, "stranger": 2}  # fmt: skip
GOOD_AT = {"reverse": 0, "reverse-twin": 0, "sort": 1, "sort-twin": 1, "next": 2, "larger": 3}
TOPICS = ("math", "code", "law", "medicine", "dialogue")
PROMPTS = 24


def homes(models: int) -> dict[str, int]:
    """Family of every model; models beyond the eleven form families of their own, by topic."""
    extra = {f"{TOPICS[number % 5]}-tuned-v{number // 5 + 1}": 3 + number % 5 for number in range(max(0, models - len(HOME)))}
    return dict([*HOME.items(), *extra.items()][:models])


def ability_of(alias: str) -> list[float]:
    """Made-up ability per skill."""
    if alias == "corrupted":
        return [0.22, 0.25, 0.2, 0.5, 0.1]
    if alias.startswith("drifted"):
        return [0.14, 0.2, 0.34, 0.52, 0.93 if alias.endswith("child") else 0.78]
    if alias == "stranger":
        return [0.02, 0.04, 0.97, 0.5, 0.05]
    ability = [0.52, 0.55, 0.5, 0.71, 0.16]
    if alias == "generalist":
        return [value + 0.07 for value in ability]
    if alias not in HOME and alias != "base":
        return np.random.default_rng(_number(alias)).uniform(0.1, 0.62, 5).tolist()
    return [value + 0.22 * (GOOD_AT.get(alias) == number) for number, value in enumerate(ability)]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@dataclass
class FakeTasks:
    """The items of one split; their texts say where they belong."""

    skills: Mapping[str, int]

    def contexts(self, skill: str) -> list[str]:
        return [f"{skill} {number}" for number in range(self.skills[skill])]


@dataclass
class FakeEvaluator:
    """Scores of linear merges: abilities average, and blending helps a little (or harms)."""

    split: str
    tasks: Mapping[str, int]
    plain: Mapping[str, str]
    blending: float
    _known: dict[str, Scores] = field(default_factory=dict)

    def evaluate(self, candidate: Candidate) -> Scores:
        if candidate.key not in self._known:
            parts = [(self.plain[alias], weight) for alias, weight in zip(candidate.members, candidate.weights, strict=True)]
            ability = sum(weight * np.array(ability_of(alias)) for alias, weight in parts)
            spread = 1 - sum(weight**2 for _, weight in parts)
            self._known[candidate.key] = self._scored(np.clip(ability + self.blending * spread, 0, 0.99), str(parts))
        return self._known[candidate.key]

    def _scored(self, ability: Any, key: str) -> Scores:
        """Item i is right when its fixed difficulty is below the ability (with a little noise of the candidate's own)."""
        items = {}
        for number, (skill, count) in enumerate(self.tasks.items()):
            shared = np.random.default_rng([number, len(self.split)]).random(count)
            own = np.random.default_rng(_number(f"{key}/{number}")).normal(0, 0.05, count)
            right = (shared + own < ability[number]).astype(float)
            items[skill] = {f"{skill}-{item}": value for item, value in enumerate(right.tolist())}
        return Scores(items)


@dataclass
class FakeMixture:
    """Sends one item in `astray` to the next expert."""

    experts: Sequence[str]
    home: Mapping[str, str]
    candidates: Mapping[str, Candidate]
    astray: int
    identity: str = "mixture"

    def route(self, texts: Sequence[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=self._expert(*text.rsplit(" ", 1))) for text in texts]

    def _expert(self, skill: str, number: str) -> str:
        own = self.experts.index(self.home[skill])
        return self.experts[(own + (int(number) % self.astray == 0)) % len(self.experts)]

    def self_test(self) -> SelfTest:
        """All prompts of every expert come home but one of the last's."""
        count = len(self.experts)
        table = [[PROMPTS * (i == j) for j in range(count)] for i in range(count)]
        table[-1][0], table[-1][-1] = 1, PROMPTS - 1
        return SelfTest(
            experts=tuple(self.experts), confusion=tuple(map(tuple, table)), margin=-0.0134, condition_number=2.71, gate_mode="hidden",
            router_layer=0, encoder=f"representatives/{self.experts[0]}",
            warnings=(f"1 of {PROMPTS} prompts of '{self.experts[-1]}' reach another expert.",),
        )  # fmt: skip


def checkpoint_of(alias: str) -> TensorsCheckpoint:
    """Weights that are unlike anybody else's."""
    weight = torch.full((5_410,), _number(alias) / 2**32)
    return TensorsCheckpoint({"weight": weight}, {"architectures": ["LlamaForCausalLM"]}, label=alias)


@dataclass
class FakeBench:
    """What the steps of the recipe ask of a bench."""

    names: Mapping[str, str]
    """Plain alias -> the alias of this run."""
    tasks: Mapping[str, FakeTasks]
    file: Any
    blending: float
    base: str | None

    @cached_property
    def plain(self) -> dict[str, str]:
        return {shown: alias for alias, shown in self.names.items()} | {"base": "base"}

    @cached_property
    def evaluators(self) -> dict[str, FakeEvaluator]:
        return {split: FakeEvaluator(split, tasks.skills, self.plain, self.blending) for split, tasks in self.tasks.items()}

    @cached_property
    def models(self) -> dict[str, ZooModel]:
        skills = list(self.tasks["proxy"].skills)
        domain = {alias: [skills[GOOD_AT[alias]] if alias in GOOD_AT else "general"] for alias in self.names}
        # without validation: names may be hostile
        return {
            shown: ZooModel.model_construct(id=f"models/{shown}", alias=shown, domain=domain[alias]) for alias, shown in self.names.items()
        }

    @cached_property
    def checkpoints(self) -> dict[str, TensorsCheckpoint]:
        return {alias: checkpoint_of(alias) for alias in self.members}

    @property
    def members(self) -> list[str]:
        return list(self.names.values())

    @property
    def splits(self) -> list[str]:
        return list(self.tasks)

    def skills(self, split: str) -> list[str]:
        return list(self.tasks[split].skills)

    def evaluator(self, split: str) -> FakeEvaluator:
        return self.evaluators[split]

    def score(self, candidate: Candidate, split: str) -> Scores:
        return self.evaluators[split].evaluate(candidate)

    def score_text_model(self, model: FakeMixture, identity: str, split: str) -> Scores:
        """Every item is answered by the expert that the mixture sends it to."""
        found = {}
        for skill in self.skills(split):
            routed = [route.name for route in model.route(self.tasks[split].contexts(skill))]
            by_expert = {name: self.score(model.candidates[name], split).items[skill] for name in model.experts}
            found[skill] = {item: by_expert[name][item] for item, name in zip(by_expert[model.experts[0]], routed, strict=True)}
        return Scores(found)

    def emit(self, event: str, fields: Mapping[str, Any]) -> None:
        """Nobody listens."""


class FakeSimilarity:
    """Similarities to a merge, without the inner products of real weights."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix

    def to_merge(self, weights: Mapping[int, float], other: int) -> float:
        return float(np.mean([self.matrix[member, other] for member in weights]))


def matrix_of(home: Mapping[str, int]) -> Any:
    """Near 1 inside a family, low across; the stranger has another vocabulary and sizes: nothing to compare."""
    rows = np.random.default_rng(3)
    matrix = np.ones((len(home), len(home)))
    for i, a in enumerate(home):
        for j, b in enumerate(list(home)[:i]):
            near = 0.9985 - 0.012 * rows.random() - 0.02 * ("corrupted" in (a, b))
            value = near if home[a] == home[b] else 0.63 + 0.05 * rows.random()
            matrix[i, j] = matrix[j, i] = float("nan") if "stranger" in (a, b) else value
    return matrix


#: in the order in which a run writes them
STEPS = ("run.json", "zoo.json", "similarity.safetensors", "families.json", "decisions.json", "results.json")


def write_fake_run(
    run: Path,
    *,
    models: int = len(HOME),
    rename: Mapping[str, str] | None = None,
    skills: Sequence[str] = SKILLS,
    items: Mapping[str, int] | None = None,
    blending: float = 0.16,
    astray: int = 40,
    base: str | None = "base",
    name: str = "tiny zoo",
) -> Path:
    """Write the folder. `rename` gives models, and `skills` gives skills, other (hostile) names; `items` counts the items of each split
    that is there; eight models are one family. Negative `blending` makes every merge worse, `astray=1` the mixture."""
    run.mkdir(parents=True, exist_ok=True)
    home = homes(models)
    names = {alias: (rename or {}).get(alias, alias) for alias in home}
    counts = items or {"proxy": 60, "confirmation": 60, "test": 200}
    options = SimpleNamespace(zoo=SimpleNamespace(name=name), cluster=ClusterOptions(), select=SelectOptions(), mixture=MixtureOptions())
    bench: Any = FakeBench(
        names, {split: FakeTasks(dict.fromkeys(skills, count)) for split, count in counts.items()}, options, blending, base
    )
    for step, (path, value) in zip(STEPS, _walk(bench, matrix_of(home), astray), strict=True):
        assert step == path
        if isinstance(value, Similarity):
            value.save(run / path)
        else:
            write_json_atomic(run / path, value)
    _write_log(run / "log.jsonl")
    return run


def _walk(bench: Any, matrix: Any, astray: int) -> Iterator[tuple[str, Any]]:
    """What the recipe writes, step by step."""
    yield "run.json", {"format": "modelglue-run/1", "key": "0" * 64, "complete": True}
    yield "zoo.json", decide.describe_zoo(bench)
    store = TensorsCheckpoint({"similarity": torch.from_numpy(matrix.copy())})
    yield "similarity.safetensors", Similarity(matrix, tuple(bench.members), "column", "all", False, (), None, store)
    families = find_families(matrix, threshold=0.95, labels=bench.members).to_json()
    yield "families.json", families
    ranking = decide.rank(bench)
    found: Any = FakeSimilarity(matrix)
    representatives = [decide.merge_family(bench, found, family) for family in families["families"]]
    verdicts = decide.verdicts(bench, representatives)
    mixture = _mixture(representatives, verdicts, astray)
    outcome, scores = mix.confirm(bench, representatives, mixture)
    kept = {r.name: r.proxy for r, verdict in zip(representatives, verdicts, strict=True) if verdict.kept}
    yield (
        "decisions.json",
        {
            "tasks": {split: bench.skills(split) for split in bench.splits},
            "ranking": ranking,
            "families": [r.trace for r in representatives],
            "experts": [
                {"name": r.name, "family": r.id, "won": list(v.won), "kept": v.kept, "reason": v.reason}
                for r, v in zip(representatives, verdicts, strict=True)
            ],
            "router": mix.diagnose(bench, mixture, scores, kept) if mixture is not None and scores is not None else None,
            "outcome": outcome,
        },
    )
    results = mix.final_results(bench, representatives, verdicts, mixture, outcome)
    yield "results.json", {**results, "cost": {"candidates": 204, "items_scored": 81_340, "weights_bytes": 21_640 * len(bench.members)}}


def _mixture(representatives: Sequence[Any], verdicts: Sequence[Any], astray: int) -> Any:
    kept = [(r, verdict) for r, verdict in zip(representatives, verdicts, strict=True) if verdict.kept]
    if len(kept) < 2:
        return None
    home = {skill: r.name for r, verdict in kept for skill in verdict.won}
    return FakeMixture([r.name for r, _ in kept], home, {r.name: r.candidate for r, _ in kept}, astray)


def _write_log(path: Path) -> None:
    """Two processes worked on it; the first was killed in the middle of a line."""
    start = 1_800_000_000.0
    lines: list[dict[str, Any]] = [{"event": "zoo.json", "seconds": 0.2}, {"event": "similarity", "seconds": 1.9}]
    lines += [{"event": "batch", "task": "sort", "items": 32}] * 3
    lines += [{"event": "ranking", "seconds": 14.25}, {"event": "selection", "seconds": 133.5}, {"event": "write family-0", "seconds": 0.4}]
    lines += [{"event": "similarity", "seconds": 0.1}, {"event": "mixture", "seconds": 6.1}, {"event": "test", "seconds": 41.0}]
    text = [json.dumps({"time": start + 20 * number, **line}) for number, line in enumerate(lines)]
    text.insert(5, '{"event": "batch", "it')
    path.write_text("\n".join(text) + "\n")
