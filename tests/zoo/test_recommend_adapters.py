"""What is recommended for zoos of adapters, for mixed ones, and for the files of searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.cli.recommend import _measured
from modelglue.zoo.recommend import recommendations
from tests.adapters.on_disk import linear, write_adapter
from tests.small_zoo import TINY_ZOO, write_tasks, write_yaml

BASE = str(TINY_ZOO / "models" / "base")


def write_lora(folder: Path, seed: int, rank: int = 2, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> str:
    """A folder as PEFT writes it, for two layers of the tiny zoo's base."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for number, target in enumerate(targets):
            found = linear(f"model.layers.{layer}.self_attn.{target}", 64, 64, rank, seed * 1000 + 10 * layer + number)
            tensors |= {name: 0.02 * value for name, value in found.items()}
    return str(write_adapter(folder, tensors, r=rank, lora_alpha=2 * rank, target_modules=list(targets)))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": write_lora(folder / "one", 1),
        "two": write_lora(folder / "two", 2),
        "wide": write_lora(folder / "wide", 3, 6, ("o_proj",)),
    }


def advice(path: Path, verdict: str) -> dict[str, str]:
    return {one.method: one.why for one in recommendations(_measured(path, None)) if one.verdict == verdict}


def zoo(folder: Path, models: list[dict[str, Any]], **more: Any) -> Path:
    return write_yaml(folder / "zoo.yaml", {"format": "modelglue/1", "zoo": {"models": models, **more}})


def test_adapters_of_one_base_name_it_and_are_joined_exactly(adapters: dict[str, str], tmp_path: Path) -> None:
    path = zoo(tmp_path, [{"id": BASE, "adapter": adapters[name], "alias": name} for name in ("one", "two")])
    measured = _measured(path, None)
    assert measured.has_base, "the base that they are adapters of"
    assert (measured.adapters, measured.ranks, measured.same_targets) == (("one", "two"), {"one": 2, "two": 2}, True)
    assert 0 < measured.change["one"] < 0.2
    tried = advice(path, "try")
    assert "exactly the weighted sum and has rank 4" in tried["merge-adapters --mode cat, or svd"]
    assert "product of the sums" in advice(path, "avoid")["merge-adapters --mode linear, ties, dare_*"]
    assert "adapters: one rank 2, two rank 2" in measured.in_words()
    assert "the base" in next(iter(advice(path, "reference")))


def test_adapters_of_other_ranks_and_targets(adapters: dict[str, str], tmp_path: Path) -> None:
    path = zoo(tmp_path, [{"id": f"{BASE}+{adapters[name]}", "alias": name} for name in ("one", "wide")])
    measured = _measured(path, None)
    assert (measured.ranks, measured.same_targets) == ({"one": 2, "wide": 6}, False)
    assert "ranks differ (2, 6)" in advice(path, "avoid")["merge-adapters --mode linear, ties, dare_*"]
    assert any(line.endswith("they change different tensors") for line in measured.in_words())
    assert measured.kinship == pytest.approx(0.0, abs=1e-6), "changes of other tensors have nothing in common"


def test_a_mixed_zoo(adapters: dict[str, str], tmp_path: Path) -> None:
    models = [{"id": BASE, "adapter": adapters["one"], "alias": "one"}, {"id": str(TINY_ZOO / "models" / "sort"), "domain": ["safety"]}]
    path = zoo(tmp_path, models, base=BASE)
    tried = advice(path, "try")
    assert "1 of 2 models are adapters" in tried["any method over base+adapter"]
    assert "extract-lora, then merge-adapters" in tried
    assert not any("cat" in method for method in tried)
    assert "safety" in tried["linear or task_arithmetic, the safety model as a member"]


def test_a_search_file_with_a_recipe_among_its_models(adapters: dict[str, str], tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", ["reverse"], items=2)
    blend = {"method": "linear", "models": [{"model": str(TINY_ZOO / "models" / name), "weight": 0.5} for name in ("sort", "next")]}
    file = {
        "zoo": {"base": BASE, "models": [{"id": f"{BASE}+{adapters['two']}", "alias": "two"}, {"recipe": blend, "alias": "blend"}]},
        "tasks": {"include": "tasks", "proxy": ["reverse_proxy"]}, "searcher": "cma",
    }  # fmt: skip
    path = write_yaml(tmp_path / "search.yaml", file)
    measured = _measured(path, None)
    assert (measured.models, measured.adapters, measured.proxy, measured.has_base) == (("two", "blend"), ("two",), True, True)
    assert next(iter(advice(path, "first"))).startswith("search")
    plan = {"genome": {"models": [str(TINY_ZOO / "models" / name) for name in ("sort", "next")], "merge_method": "linear"}, "tasks": ["x"]}
    evolve = _measured(write_yaml(tmp_path / "evolve.yaml", plan), BASE)
    assert (evolve.models, evolve.has_base) == (("sort", "next"), True)


def test_measurements_are_json(adapters: dict[str, str], tmp_path: Path) -> None:
    path = zoo(tmp_path, [{"id": BASE, "adapter": adapters[name], "alias": name} for name in ("one", "two")])
    assert json.loads(json.dumps(_measured(path, None).to_json()))["ranks"] == {"one": 2, "two": 2}
