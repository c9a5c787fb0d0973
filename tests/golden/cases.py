"""Golden files: numbers that other people's code produced, and how ours is asked for the same.

A file `<folder>/<case>.safetensors` holds inputs (`base.*`, `model0.*`, `data.*`), the answer (`expected.*`, or the metadata key
`expected` as JSON) and metadata (`system`, `params`, `rtol`, `atol`). A folder `<folder>/cases/<case>` holds a recipe for the models in
`<folder>/inputs` and the model that it should give. An adapter translates a case into calls of the public interface;
it holds no arithmetic of its own. `adapters/*.py` export ADAPTERS, a mapping from the beginning of a test id ("mergekit/ties-") to a
function that takes a `Case` and returns an `Answer`; the longest matching beginning counts. Ids that must be answered stand in BUILT.txt.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("MODELGLUE_GOLDEN") or HERE / "files")


@dataclass(frozen=True)
class Case:
    """One golden file."""

    path: Path

    @property
    def id(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.path, "pt") as file:
            return dict(file.metadata() or {})

    @property
    def system(self) -> str:
        return self.metadata["system"]

    @cached_property
    def params(self) -> dict[str, Any]:
        return dict(json.loads(self.metadata["params"]))

    @cached_property
    def all_tensors(self) -> dict[str, torch.Tensor]:
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under `prefix.`, without it ("base", "model0", "expected", "data.model0.uniform")."""
        start = f"{prefix}."
        return {name.removeprefix(start): value for name, value in self.all_tensors.items() if name.startswith(start)}

    @cached_property
    def models(self) -> list[dict[str, torch.Tensor]]:
        found: list[dict[str, torch.Tensor]] = []
        while tensors := self.tensors(f"model{len(found)}"):
            found.append(tensors)
        return found


@dataclass(frozen=True)
class FolderCase(Case):
    """A golden folder `<folder>/cases/<case>`: a recipe over the models in `<folder>/inputs`, and the model folder that it should give."""

    @property
    def id(self) -> str:
        return f"{self.path.parent.parent.name}/{self.path.name}"

    @property
    def inputs(self) -> Path:
        return self.path.parent.parent / "inputs"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yml"

    @cached_property
    def metadata(self) -> dict[str, str]:
        case = json.loads((self.path / "case.json").read_text())
        return {
            "system": self.path.parent.parent.name, "params": json.dumps(case), "rtol": str(case["rtol"]), "atol": str(case["atol"]),
            "expected": json.dumps(facts(self.path / "expected")),
        }  # fmt: skip

    @cached_property
    def all_tensors(self) -> dict[str, torch.Tensor]:
        return {f"expected.{name}": value for name, value in weights(self.path / "expected").items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


#: what the config of a merged model has to get right, whatever else stands in it
_CONFIG = ("architectures", "model_type", "dtype", "num_hidden_layers", "num_layers", "num_decoder_layers", "vocab_size")


def facts(folder: Path) -> dict[str, Any]:
    """What a model folder must agree in besides its values: dtypes, fields of the config, the vocabulary of its tokenizer if it has one."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = folder / "tokenizer.json"
    vocabulary = None
    if tokenizer.is_file():
        content = json.loads(tokenizer.read_text())
        vocabulary = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    return {
        "dtypes": {name: str(value.dtype) for name, value in weights(folder).items()},
        "config": {key: config[key] for key in _CONFIG if key in config},
        "vocabulary": vocabulary,
    }


@dataclass(frozen=True)
class Answer:
    """Ours: tensors for every `expected.*`, and (where the metadata has `expected`) the same JSON."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    json: Any = None


Adapter = Callable[[Case], Answer]


def load_adapters() -> dict[str, Adapter]:
    """ADAPTERS of every module in adapters/; two for one beginning are a mistake."""
    found: dict[str, Adapter] = {}
    package = importlib.import_module("tests.golden.adapters")
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        adapters = importlib.import_module(f"tests.golden.adapters.{module}").ADAPTERS
        twice = sorted(set(found) & set(adapters))
        assert not twice, f"{module}: {twice} has an adapter already"
        found.update(adapters)
    return found


def adapter_for(case_id: str, adapters: Mapping[str, Adapter]) -> Adapter | None:
    fitting = [start for start in adapters if case_id.startswith(start)]
    return adapters[max(fitting, key=len)] if fitting else None


def all_cases() -> list[Case]:
    folders = [FolderCase(path.parent) for path in sorted(FOLDER.glob("*/cases/*/case.json"))]
    return [*(Case(path) for path in sorted(FOLDER.glob("*/*.safetensors"))), *folders]


def assert_same_json(found: Any, expected: Any, rtol: float, atol: float, where: str = "expected") -> None:
    """Equal structure and words; numbers within the tolerance."""
    if isinstance(expected, Mapping):
        assert isinstance(found, Mapping), f"{where}: {found!r}, expected a mapping"
        assert sorted(found) == sorted(expected), f"{where}: keys {sorted(found)}, expected {sorted(expected)}"
        for key in expected:
            assert_same_json(found[key], expected[key], rtol, atol, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list | tuple), f"{where}: {found!r}, expected a list"
        assert len(found) == len(expected), f"{where}: {len(found)} entries, expected {len(expected)}"
        for position, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_same_json(ours, theirs, rtol, atol, f"{where}[{position}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=rtol, abs_tol=atol), f"{where}: {found}, expected {expected}"
    else:
        assert found == expected, f"{where}: {found!r}, expected {expected!r}"
