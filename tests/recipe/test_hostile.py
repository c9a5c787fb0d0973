"""Whatever stands in a recipe, in either dialect: a recipe comes out of it, or one clear error."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import RecipeError
from modelglue.recipe import Recipe, canonical, read_recipe

WORDS = """
    model models slices sources modules base_model base parameters weight t normalize density filter value layer_range layers
    dtype out_dtype tokenizer tokenizer_source tokens source kind force token chat_template name path lora revision seed missing
    into part store encoder union zero model_token a b bfloat16 linear ties slerp passthrough
"""
words = st.sampled_from([*WORDS.split(), ""])
leaves = st.one_of(words, st.none(), st.booleans(), st.integers(-2, 5), st.floats(allow_nan=True), st.just(10**400))
values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=4)), max_leaves=8)
methods = st.sampled_from(["linear", "ties", "slerp", "passthrough", "nuslerp", "nothing"])
entry = st.dictionaries(words, values, max_size=3).map(lambda found: {"model": "a", "parameters": {"weight": 1}, **found})
part = st.dictionaries(words, values, max_size=3).map(
    lambda found: {"sources": [{"model": "a", "layer_range": [0, 1], "parameters": {"weight": 1}}], **found}
)


def read(value: Any) -> None:
    try:
        recipe = read_recipe(value)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)
    assert read_recipe(canonical(recipe)) == recipe


@settings(max_examples=30, deadline=None)
@given(methods, st.dictionaries(words, values, max_size=5), st.lists(entry, max_size=2), st.lists(part, max_size=2))
def test_anything_in_mergekits_dialect(method: str, rest: dict[str, Any], entries: list[Any], parts: list[Any]) -> None:
    read({"merge_method": method, **({"models": entries} if entries else {}), **rest})
    read({"merge_method": method, **({"slices": parts} if parts else {}), **rest})


@settings(max_examples=30, deadline=None)
@given(methods, st.dictionaries(words, values, max_size=5), st.lists(st.dictionaries(words, values, max_size=4), max_size=2))
def test_anything_in_ours(method: str, rest: dict[str, Any], entries: list[Any]) -> None:
    read({"method": method, **({"models": [{"model": "a", "weight": 1, **one} for one in entries]} if entries else {}), **rest})
