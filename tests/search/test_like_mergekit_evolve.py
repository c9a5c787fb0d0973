"""Recorded runs of mergekit's own genome and merge (`benchmarks/evolve.py --record`): the same vectors give the same models here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from modelglue.evaluation import FunctionEvaluator, ScoreStore
from modelglue.evaluation.members import Members
from modelglue.recipe import Candidate, build, read_recipe
from modelglue.search import SearchSettings
from modelglue.search.genome_space import GenomeSpace
from modelglue.search.settings import Facts, make_space
from modelglue.studies import read_search

RECORD = Path(__file__).parent / "files" / "mergekit_evolve.safetensors"
LAYERS = 4


@dataclass(frozen=True)
class Record:
    genomes: list[dict[str, Any]]
    recipes: Mapping[str, str]
    models: Mapping[str, Checkpoint]
    merged: Mapping[str, Checkpoint]


@pytest.fixture(scope="module")
def record() -> Record:
    groups: dict[str, dict[str, dict[str, torch.Tensor]]] = {"models": {}, "merged": {}}
    with safe_open(RECORD, "pt") as file:
        about = file.metadata()
        for key in file.keys():  # noqa: SIM118 - no mapping
            kind, label, name = key.split("/")
            groups[kind].setdefault(label, {})[name] = file.get_tensor(key)
    config = json.loads(about["config"])
    made = {
        kind: {label: TensorsCheckpoint(tensors, config, label=label) for label, tensors in found.items()} for kind, found in groups.items()
    }
    return Record(json.loads(about["genomes"]), json.loads(about["recipes"]), made["models"], made["merged"])


def space_of(genome: Mapping[str, Any], folder: Path) -> GenomeSpace:
    """Through the importer, as a search does it."""
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({"genome": genome["definition"], "tasks": ["any"]}))
    file = read_search(plan).file
    base = None if isinstance(file.zoo, str) else file.zoo.base
    found = make_space(SearchSettings(members=tuple(file.members or ()), base=base, space=file.space), Facts(layers=LAYERS))
    assert isinstance(found, GenomeSpace)
    return found


def candidates(record: Record, folder: Path) -> dict[str, Candidate]:
    """Of every recorded vector."""
    found = {}
    for genome in record.genomes:
        space = space_of(genome, folder)
        for number, vector in enumerate(genome["vectors"]):
            params = {parameter.name: gene for parameter, gene in zip(space.space.parameters, vector, strict=True)}
            candidate = space.candidate(params)
            assert candidate is not None
            found[f"{genome['name']}-{number}"] = candidate
    return found


def test_vectors_are_decoded_to_the_same_recipes(record: Record, tmp_path: Path) -> None:
    members = Members(record.models, "float32")
    found = candidates(record, tmp_path)
    assert found.keys() == record.recipes.keys()
    methods = set()
    for key, candidate in found.items():
        value = {**yaml.safe_load(record.recipes[key]), "dtype": "float32"}
        theirs = build(read_recipe(value), resolve=record.models.__getitem__)
        ours = members.expression(candidate)
        assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in theirs.names()), key
        methods.add(candidate.method)
    assert methods == {"linear", "task_arithmetic", "ties", "dare_ties", "slerp"}


def test_the_merged_models_are_the_same(record: Record, tmp_path: Path) -> None:
    members = Members(record.models, "float32")
    found = candidates(record, tmp_path)
    assert len(record.merged) == len([key for key, one in found.items() if one.method != "dare_ties"])
    for key, theirs in record.merged.items():
        ours = members.expression(found[key])
        assert ours.names() == theirs.names()
        for name in theirs.names():
            torch.testing.assert_close(
                ours.tensor(name), theirs.tensor(name), rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_the_best_vector_is_the_same_with_the_same_score(record: Record, tmp_path: Path) -> None:
    """Closeness to a blend of the models that no vector meets, as a score."""
    blend = {"method": "linear", "models": [{"model": "a", "weight": 0.75}, {"model": "b", "weight": 0.25}]}
    target = build(read_recipe(blend), resolve=record.models.__getitem__)

    def closeness(model: Checkpoint) -> float:
        return -sum(float(((model.tensor(name) - target.tensor(name)) ** 2).sum()) for name in model.names())

    found = {key: one for key, one in candidates(record, tmp_path).items() if key in record.merged}
    with ScoreStore(":memory:") as store:
        ours = FunctionEvaluator(closeness, record.models, store)
        theirs = FunctionEvaluator(closeness, record.merged, store)
        scores = {key: ours.evaluate(candidate).mean for key, candidate in found.items()}
        elsewhere = {key: theirs.evaluate(Candidate.single(key)).mean for key in found}
    assert scores == pytest.approx(elsewhere, rel=1e-5)
    assert len(set(elsewhere.values())) == len(elsewhere)
    assert sorted(scores, key=scores.__getitem__) == sorted(elsewhere, key=elsewhere.__getitem__)
