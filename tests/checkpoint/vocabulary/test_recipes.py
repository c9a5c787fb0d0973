"""Tokenizer sections of recipes reach the alignment."""

from __future__ import annotations

from pathlib import Path

import torch

from modelglue.checkpoint import save
from modelglue.checkpoint.vocabulary import vocabulary
from modelglue.recipe import merge
from tests.checkpoint.vocabulary.models import EMBEDDING, model, table


def test_averaged_rows_are_rounded_once_when_the_recipe_names_what_is_stored(tmp_path: Path) -> None:
    """Parents in bfloat16, output in float32: padding rows are the means themselves, not means that went through bfloat16."""
    parents = [model(words, seed=seed, dtype=torch.bfloat16) for seed, words in enumerate(("abc", "abd"), 1)]
    for number, parent in enumerate(parents):
        save(parent, tmp_path / f"m{number}")
    recipe = {
        "merge_method": "linear", "dtype": "float32", "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
        "models": [{"model": str(tmp_path / f"m{number}"), "parameters": {"weight": 0.5}} for number in range(2)],
    }  # fmt: skip
    merged = merge(recipe)
    a, b = (table(parent).double() for parent in parents)
    rows = torch.stack([(a[0] + b[0]) / 2, (a[1] + b[1]) / 2, a[2], b[2]])
    torch.testing.assert_close(merged.tensor(EMBEDDING)[:4].double(), rows, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged.tensor(EMBEDDING)[4:].double(), rows.mean(0).expand(4, -1), rtol=1e-6, atol=1e-7)
    assert merged.config["vocab_size"] == 8
    assert vocabulary(merged).ids == {"a": 0, "b": 1, "c": 2, "d": 3}  # type: ignore[union-attr]
