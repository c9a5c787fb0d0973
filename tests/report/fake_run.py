"""A run folder as `modelglue glue` leaves it: eleven models, three families, five skills.

The searching, clustering and choosing is done by the library itself on made-up scores, so the schema is the real one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelglue.checkpoint import TensorsCheckpoint, write_json_atomic
from modelglue.recipe import Candidate, Scores, interval, paired_interval
from modelglue.search import select
from modelglue.zoo import Similarity, find_families

SKILLS = ("reverse", "sort", "next", "larger", "double")
ITEMS = {"proxy": 60, "confirmation": 60, "test": 200}
HOME = {"reverse": 0, "reverse-twin": 0, "sort": 0, "sort-twin": 0, "next": 0, "larger": 0, "generalist": 0, "corrupted": 0,
        "drifted": 1, "drifted-child": 1, "stranger": 2}  # fmt: skip
GOOD_AT = {"reverse": "reverse", "reverse-twin": "reverse", "sort": "sort", "sort-twin": "sort", "next": "next", "larger": "larger"}


def skill_of(alias: str) -> list[float]:
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
    return [value + 0.22 * (GOOD_AT.get(alias) == skill) for skill, value in zip(SKILLS, ability, strict=True)]


@dataclass
class FakeEvaluator:
    """Scores of linear merges: abilities average, and blending helps a little unless the corrupted model is in it."""

    split: str
    names: Mapping[str, str] = field(default_factory=dict)
    tasks: Sequence[str] = SKILLS

    def evaluate(self, candidate: Candidate) -> Scores:
        parts = [(self.names.get(alias, alias), weight) for alias, weight in zip(candidate.members, candidate.weights, strict=True)]
        ability = sum(weight * np.array(skill_of(alias)) for alias, weight in parts)
        spread = 1 - sum(weight**2 for _, weight in parts)
        return scored(np.clip(ability + 0.16 * spread, 0, 0.99), self.split, key=str(parts))


def scored(ability: Any, split: str, key: str) -> Scores:
    """Item i is right when its fixed difficulty is below the ability (with a little noise of the candidate's own)."""
    items = {}
    for number, skill in enumerate(SKILLS):
        shared = np.random.default_rng([number, len(split)]).random(ITEMS[split])
        digest = int.from_bytes(hashlib.sha256(f"{key}/{skill}".encode()).digest()[:4], "little")
        own = np.random.default_rng(digest).normal(0, 0.05, ITEMS[split])
        right = (shared + own < ability[number]).astype(float)
        items[skill] = {f"{skill}-{item}": value for item, value in enumerate(right.tolist())}
    return Scores(items)


def matrix_of(aliases: Sequence[str]) -> Any:
    """Near 1 inside a family, low across; the stranger has another vocabulary and sizes: nothing to compare."""
    rows = np.random.default_rng(3)
    matrix = np.ones((len(aliases), len(aliases)))
    for i, a in enumerate(aliases):
        for j, b in enumerate(aliases[:i]):
            near = 0.9985 - 0.012 * rows.random() - 0.02 * ("corrupted" in (a, b))
            value = near if HOME[a] == HOME[b] else 0.63 + 0.05 * rows.random()
            matrix[i, j] = matrix[j, i] = float("nan") if "stranger" in (a, b) else value
    return matrix


def write_fake_run(run: Path, *, rename: Mapping[str, str] | None = None) -> Path:
    """Write the folder; `rename` gives models other (hostile) names."""
    run.mkdir(parents=True, exist_ok=True)
    shown = {alias: (rename or {}).get(alias, alias) for alias in HOME}
    plain = {name: alias for alias, name in shown.items()}
    aliases = list(plain)
    matrix = matrix_of(list(HOME))
    found = find_families(matrix, threshold=0.95, labels=aliases).to_json()
    similarity = Similarity(
        matrix, tuple(aliases), "column", "all", False, (), None, TensorsCheckpoint({"similarity": torch.from_numpy(matrix.copy())})
    )
    similarity.save(run / "similarity.safetensors")
    evaluators = {split: FakeEvaluator(split, plain) for split in ITEMS}

    def single(alias: str, split: str) -> Scores:
        return evaluators[split].evaluate(Candidate.single(alias))

    ranking = sorted(
        ({"alias": alias, "score": single(alias, "proxy").mean, "tasks": single(alias, "proxy").tasks()} for alias in aliases),
        key=lambda row: -row["score"],
    )
    families = [_family(family, matrix, aliases, evaluators) for family in found["families"]]
    candidates = {f["representative"]["name"]: Candidate.linear(f["representative"]["weights"]) for f in families}
    names = list(candidates)
    won = {name: [] for name in names}
    for skill in SKILLS:
        won[max(names, key=lambda name: evaluators["proxy"].evaluate(candidates[name]).tasks()[skill])].append(skill)
    kept = [name for name in names if won[name]]
    home = {skill: name for name, skills in won.items() for skill in skills}
    mixture = {split: _mixture(home, candidates, evaluators[split]) for split in ITEMS}
    best_single = max(aliases, key=lambda alias: single(alias, "confirmation").mean)
    decisions = {
        "tasks": {split: list(SKILLS) for split in ITEMS},
        "ranking": ranking,
        "families": families,
        "experts": [
            {"name": name, "family": number, "won": won[name], "kept": name in kept,
             "reason": "best on " + ", ".join(won[name]) if won[name] else "best on no proxy task"}
            for number, name in enumerate(names)
        ],
        "router": {
            "gate_mode": "hidden", "router_layer": 0, "encoder": f"representatives/{names[0]}",
            "self_test": {"experts": kept, "confusion": _confusion(len(kept)), "accuracy": 71 / 72},
            "condition_number": {"gate": 2.71}, "margin": -0.0134, "warnings": [f"1 of 24 prompts of '{kept[-1]}' reach another expert."],
            "load": _load(home, kept, ITEMS["proxy"]), "oracle_gap": 0.0133,
        },
        "outcome": {
            "kind": "mixture", "name": "mixture", "reason": "every expert answers what it is best at", "split": "confirmation",
            "score": mixture["confirmation"].mean, "best_single": best_single,
            "interval_vs_best_single": list(paired_interval(mixture["confirmation"], single(best_single, "confirmation"))),
        },
    }  # fmt: skip
    write_json_atomic(run / "zoo.json", _zoo(shown))
    write_json_atomic(run / "families.json", found)
    write_json_atomic(run / "decisions.json", decisions)
    write_json_atomic(run / "results.json", _results(families, aliases, evaluators, candidates, mixture, home, kept))
    write_json_atomic(run / "run.json", {"format": "modelglue-run/1", "key": "0" * 64, "complete": True})
    _write_log(run / "log.jsonl")
    return run


def _family(family: Mapping[str, Any], matrix: Any, aliases: Sequence[str], evaluators: Mapping[str, FakeEvaluator]) -> dict[str, Any]:
    members = family["members"]
    proxy = evaluators["proxy"]
    singles = {alias: proxy.evaluate(Candidate.single(alias)) for alias in members}
    best = max(members, key=lambda alias: singles[alias].mean)
    strategies: list[Any] = []
    candidate, chosen = Candidate.single(best), None
    if len(members) > 1:
        result = select(
            members, proxy, strategy="all", confirm=evaluators["confirmation"],
            similarity_to=lambda weights, other: float(np.mean([matrix[aliases.index(a), aliases.index(other)] for a in weights])),
        )  # fmt: skip
        strategies = [selection.to_json() for selection in result.selections]
        candidate, chosen = Candidate.linear(result.chosen.weights), result.chosen.strategy
    scores = proxy.evaluate(candidate)
    is_merge = len(candidate.members) > 1
    weights = dict(zip(candidate.members, candidate.weights, strict=True))
    return {
        "id": family["id"], "members": members, "strategies": strategies, "chosen": chosen,
        "rejected": [alias for alias in members if alias not in weights],
        "representative": {
            "name": f"family-{family['id']}" if is_merge else candidate.members[0], "kind": "merge" if is_merge else "single",
            "strategy": chosen if is_merge else None, "weights": weights, "proxy": scores.mean, "tasks": scores.tasks(),
            "best_member": best,
            "interval_vs_best_member": list(paired_interval(scores, singles[best])),
        },
    }  # fmt: skip


def _mixture(home: Mapping[str, str], candidates: Mapping[str, Candidate], evaluator: FakeEvaluator) -> Scores:
    return Scores({skill: evaluator.evaluate(candidates[home[skill]]).items[skill] for skill in SKILLS})


def _confusion(experts: int) -> list[list[int]]:
    """All 24 prompts of every expert come home but one of the last's."""
    table = [[24 * (i == j) for j in range(experts)] for i in range(experts)]
    table[-1][0], table[-1][-1] = 1, 23
    return table


def _load(home: Mapping[str, str], experts: Sequence[str], items: int) -> dict[str, dict[str, int]]:
    astray = max(1, items // 40)
    return {
        skill: {expert: items - astray * (len(experts) - 1) if home[skill] == expert else astray for expert in experts} for skill in SKILLS
    }


def _results(
    families: Sequence[Any], aliases: Sequence[str], evaluators: Mapping[str, FakeEvaluator], candidates: Mapping[str, Candidate],
    mixture: Mapping[str, Scores], home: Mapping[str, str], kept: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    test = evaluators["test"]
    family_of = {alias: family["id"] for family in families for alias in family["members"]}
    rows = [("base", "base", None, scored(np.array([0.52, 0.55, 0.5, 0.71, 0.16]), "test", "base"))]
    rows += [(alias, "single", family_of[alias], test.evaluate(Candidate.single(alias))) for alias in aliases]
    comparisons = []
    for family in families:
        if len(family["members"]) > 1:
            number, name = family["id"], family["representative"]["name"]
            average = test.evaluate(Candidate.linear(dict.fromkeys(family["members"], 1.0)))
            merged = test.evaluate(candidates[name])
            rows += [(f"average of family {number}", "average", number, average), (name, "representative", number, merged)]
            comparisons.append((name, merged, f"average of family {number}", average, [s for s in SKILLS if home[s] == name]))
    rows.append(("mixture", "mixture", None, mixture["test"]))
    by_name = {name: scores for name, _, _, scores in rows}
    best = max(aliases, key=lambda alias: by_name[alias].mean)
    comparisons.insert(0, ("result", mixture["test"], best, by_name[best], list(SKILLS)))
    return {
        "split": "test",
        "skills": list(SKILLS),
        "models": [
            {
                "name": name, "kind": kind, "family": family, "mean": scores.mean, "interval": list(interval(scores)),
                "tasks": {task: {"score": value, "items": ITEMS["test"]} for task, value in scores.tasks().items()},
            }
            for name, kind, family, scores in rows
        ],
        "comparisons": [_comparison(*comparison) for comparison in comparisons],
        "routing": _load(home, kept, ITEMS["test"]),
        "cost": {"candidates": 204, "items_scored": 81_340, "bytes_read": 23_812_480},
    }  # fmt: skip


def _comparison(a: str, ours: Scores, b: str, theirs: Scores, skills: Sequence[str]) -> dict[str, Any]:
    difference, low, high = paired_interval(ours.only(skills), theirs.only(skills))
    return {"a": a, "b": b, "skills": list(skills), "difference": difference, "interval": [low, high]}


def _zoo(shown: Mapping[str, str]) -> dict[str, Any]:
    models = [
        {
            "alias": name, "reference": f"models/{alias}", "identity": hashlib.sha256(alias.encode()).hexdigest(),
            "architecture": "LlamaForCausalLM", "parameters": 541_056, "bytes": 2_164_224, "domain": [GOOD_AT.get(alias, "general")],
            "prompts": {"positive": [], "negative": []},
        }
        for alias, name in shown.items()
    ]  # fmt: skip
    return {"name": "tiny zoo", "base": "base", "models": models, "warnings": []}


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
