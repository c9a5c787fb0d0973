"""The floors: imports point downwards, siblings do not know each other, and what answers at once imports nothing heavy.

Read from the sources with `ast`, so that imports inside functions, under TYPE_CHECKING and through strings ("modelglue.cli.merge:merge")
count as well.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelglue.cli.app import COMMANDS
from tests.conftest import REPOSITORY

SOURCE = REPOSITORY / "src"
PACKAGE = SOURCE / "modelglue"

FLOORS = {
    "errors": 0, "settings": 0,
    "checkpoint": 1,
    "methods": 2,
    "recipe": 3, "adapters": 3,
    "models": 4,
    "search": 5, "mixture": 5, "evaluation": 5, "calibration": 5, "zoo": 5,
    "glue": 6, "studies": 6, "serve": 6, "training": 6,
    "report": 7,
    "cli": 8,
}  # fmt: skip
#: floor 0 has no siblings: settings raises the errors
GROUND = {"errors", "settings"}
#: beside the house: the conformance suite for merge methods, which nothing in the house imports
BESIDE = {"testing": 2}
#: the door, and what `python -m modelglue` runs; the door imports nothing before it is asked
DOOR = {"", "__main__"}
#: modules that import by a name that they compute
COMPUTED = {"modelglue", "modelglue.methods.registry", "modelglue.checkpoint.engine.compiled", "modelglue.evaluation.function"}

#: what the files of floor 2 may import of ours. A method: the registry, and arithmetic that methods share.
REGISTRY_NEEDS = {"modelglue.errors", "modelglue.checkpoint"}
SHARED_ARITHMETIC_NEEDS = {
    "modelglue.settings", "modelglue.checkpoint.engine.compiled.chunk_function", "modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS",
    "modelglue.checkpoint.engine.native",
}  # fmt: skip

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "huggingface_hub", "scipy")
#: floors whose modules must be importable in a moment
LIGHT = {"errors", "settings", "checkpoint", "methods", "recipe", "adapters", "cli", *DOOR}

_REFERENCE = re.compile(r"modelglue(?:\.\w+)+(?::\w+)?")


@dataclass(frozen=True)
class Import:
    """One import of one module: `name` is as precise as the statement ("modelglue.recipe.Scores" for a from-import)."""

    importer: str
    name: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: {self.name}"

    @property
    def home(self) -> str:
        """The package or module of ours right below the root that is imported ("" for the root itself)."""
        return [*self.name.split("."), ""][1]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports_of(module: str, tree: ast.Module, *, package: bool = False) -> Iterator[Import]:
    """Every import of a module, its own package's relative ones resolved."""
    late = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(node)
        for child in ast.walk(node)
    }
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + (1 if package else 0)] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inside_strings:
            if _REFERENCE.fullmatch(node.value):
                found = [node.value.replace(":", ".")]
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            start = str(node.values[0].value)
            if start.startswith("modelglue.") and "." in start.removeprefix("modelglue."):
                found = [start.rstrip(".")]
        for name in found:
            yield Import(module, name, getattr(node, "lineno", 0), node not in late)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += imports_of(module_name(path), tree, package=path.name == "__init__.py")
    return found


IMPORTS = all_imports()
OURS = [one for one in IMPORTS if one.name.split(".")[0] == "modelglue"]
FOREIGN = [one for one in IMPORTS if one.name.split(".")[0] != "modelglue"]


# -- the reader itself ------------------------------------------------------------------------------------------------------------


def read(text: str, module: str = "modelglue.zoo.families", *, package: bool = False) -> list[tuple[str, bool]]:
    return [(one.name, one.at_import_time) for one in imports_of(module, ast.parse(text), package=package)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import modelglue.glue as g", [("modelglue.glue", True)]),
        ("from modelglue import glue, __version__", [("modelglue.glue", True), ("modelglue.__version__", True)]),
        ("from modelglue.recipe import Scores", [("modelglue.recipe.Scores", True)]),
        ("from .schema import Zoo", [("modelglue.zoo.schema.Zoo", True)]),
        ("from ..glue import run", [("modelglue.glue.run", True)]),
        ("def f():\n    import torch", [("torch", False)]),
        ("class A:\n    import torch", [("torch", True)]),
        ("if TYPE_CHECKING:\n    import torch", [("torch", False)]),
        ("try:\n    import torch\nexcept ImportError:\n    pass", [("torch", True)]),
        ("x = {'a': 'modelglue.cli.merge:merge'}", [("modelglue.cli.merge.merge", True)]),
        ("x = importlib.import_module(f'modelglue.methods.{name}')", [("modelglue.methods", True)]),
        ("'''modelglue.cli.merge'''", []),
        ("x = 'modelglue.cli is a package'", []),
    ],
)
def test_reads_every_kind_of_import(text: str, expected: list[tuple[str, bool]]) -> None:
    assert read(text) == expected


def test_reads_relative_imports_of_a_package() -> None:
    assert read("from .schema import Zoo", "modelglue.zoo", package=True) == [("modelglue.zoo.schema.Zoo", True)]
    assert read("from . import schema", "modelglue.zoo", package=True) == [("modelglue.zoo.schema", True)]


# -- the floors -------------------------------------------------------------------------------------------------------------------


def test_everything_has_a_floor() -> None:
    homes = {home_of(module_name(path)) for path in PACKAGE.rglob("*.py")}
    unknown = homes - set(FLOORS) - set(BESIDE) - DOOR
    assert not unknown, f"{sorted(unknown)} stands on no floor: give it one in FLOORS"


def upward(imports: list[Import]) -> list[str]:
    """The imports among `imports` that lead to the same floor or a higher one."""
    found = []
    for one in imports:
        ours, theirs = home_of(one.importer), one.home
        if ours in DOOR or ours == theirs or {ours, theirs} <= GROUND:
            continue
        if one.name == "modelglue.__version__":  # the one thing that the door itself has
            continue
        below = BESIDE.get(ours, FLOORS.get(ours, -1) - 1)
        if FLOORS.get(theirs, 99) > below:
            found.append(str(one))
    return found


def test_imports_point_downwards() -> None:
    faults = upward(OURS)
    assert not faults, "imports that do not point downwards:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("importer", "name", "allowed"),
    [
        ("modelglue.search.select", "modelglue.recipe.Scores", True),
        ("modelglue.search.select", "modelglue.zoo.Similarity", False),
        ("modelglue.search.select", "modelglue.search.ranking", True),
        ("modelglue.search.select", "modelglue.glue", False),
        ("modelglue.checkpoint.output.writer", "modelglue.methods.get", False),
        ("modelglue.checkpoint.output.writer", "modelglue", False),
        ("modelglue.report.page", "modelglue.__version__", True),
        ("modelglue.settings", "modelglue.errors.UserError", True),
        ("modelglue.errors", "modelglue.checkpoint.save", False),
        ("modelglue.testing.conformance", "modelglue.methods.get", True),
        ("modelglue.testing.conformance", "modelglue.recipe.build", False),
        ("modelglue", "modelglue.cli", True),
    ],
)
def test_what_counts_as_downwards(importer: str, name: str, allowed: bool) -> None:
    assert (upward([Import(importer, name, 1, True)]) == []) is allowed


def test_the_door_imports_nothing_when_it_is_opened() -> None:
    assert [str(one) for one in OURS if one.importer == "modelglue" and one.at_import_time] == []


def test_nothing_in_the_house_imports_the_conformance_suite() -> None:
    assert [str(one) for one in OURS if one.home in BESIDE and home_of(one.importer) not in BESIDE] == []


def test_commands_are_references_of_floor_8() -> None:
    """The command table is strings; they are seen by the reader above, and each names a module of the command line."""
    for path, _ in COMMANDS.values():
        assert path.startswith("modelglue.cli."), path
        assert any(one.importer == "modelglue.cli.app" and one.name == path.replace(":", ".") for one in OURS), path


def test_names_of_imports_are_computed_in_few_places() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            if called and not (isinstance(node.args[0], ast.Constant)):  # type: ignore[attr-defined]
                found.add(module_name(path))
    assert found == COMPUTED


# -- floor 2 ----------------------------------------------------------------------------------------------------------------------


def test_methods_import_the_registry_and_nothing_else_of_ours() -> None:
    """A method file: the registry and floor 2's private arithmetic. Those two alone may reach for the floors below, for these names."""
    faults = []
    for one in OURS:
        package, _, file = one.importer.rpartition(".")
        if package != "modelglue.methods" or one.name.startswith(("modelglue.methods.registry.", "modelglue.methods._")):
            continue
        home = ".".join(one.name.split(".")[:2])
        if file == "registry" and (home in REGISTRY_NEEDS or one.name == "modelglue.methods"):
            continue
        if file.startswith("_") and (home in SHARED_ARITHMETIC_NEEDS or one.name in SHARED_ARITHMETIC_NEEDS):
            continue
        faults.append(str(one))
    assert not faults, "methods import what they should not:\n" + "\n".join(faults)


def test_methods_import_third_parties_when_they_are_called() -> None:
    """`modelglue methods` lists everything without importing torch, and so would a method that brings another library."""
    early = [
        str(one)
        for one in FOREIGN
        if home_of(one.importer) == "methods" and one.at_import_time and one.name.split(".")[0] not in sys.stdlib_module_names
    ]
    assert early == []
    late = {one.name.split(".")[0] for one in FOREIGN if home_of(one.importer) == "methods" and not one.at_import_time}
    assert late - set(sys.stdlib_module_names) <= {"torch", "numpy"}


# -- heavy libraries --------------------------------------------------------------------------------------------------------------


def test_transformers_is_not_known_below_floor_4() -> None:
    low = [str(one) for one in FOREIGN if one.name.split(".")[0] == "transformers" and FLOORS.get(home_of(one.importer), 9) < 4]
    assert low == []
    assert {home_of(one.importer) for one in FOREIGN if one.name.split(".")[0] == "transformers"} >= {"models"}


def test_light_floors_import_heavy_libraries_when_they_need_them() -> None:
    early = [str(one) for one in FOREIGN if home_of(one.importer) in LIGHT and one.at_import_time and one.name.split(".")[0] in HEAVY]
    assert early == []


#: run one after the other in one process; after each, what heavy things have been imported so far
_PROBE = """
import contextlib, io, json, sys
def heavy():
    return sorted(name for name in %r if name in sys.modules)
import modelglue
seen = {"import modelglue": heavy()}
from modelglue.cli.app import main
for tokens in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(tokens)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    assert code == 0, (tokens, code)
    assert out.getvalue(), tokens
    seen[" ".join(tokens)] = heavy()
print(json.dumps(seen))
"""


def test_what_answers_at_once_imports_nothing_heavy(tiny_zoo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    models = tiny_zoo / "models"
    recipe.write_text(
        f"method: ties\nbase: {models / 'base'}\n"
        f"models:\n  - {{model: {models / 'sort'}, weight: 1}}\n  - {{model: {models / 'next'}, weight: 1, density: 0.5}}\n"
    )
    tokens = [
        ["--help"], ["--version"], ["methods"], ["methods", "ties"], ["methods", "--json"], ["check", str(recipe)],
        ["check", str(recipe), "--json"], ["inspect", str(models / "base")], ["inspect", str(models / "base"), "--json"],
        *([name, "--help"] for name in COMMANDS),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _PROBE % (HEAVY,), json.dumps(tokens)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == len(tokens) + 1
    assert {what: found for what, found in seen.items() if found} == {}
