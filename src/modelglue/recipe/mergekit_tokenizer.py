"""The tokenizer section of mergekit's recipes, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.recipe.document import Place
from modelglue.recipe.mergekit_reader import TOKEN, TOKENIZER, Reader, whole


def vocabulary_of(reader: Reader, ours: Place, theirs: Place, given: Any) -> Any:
    """`union`, `base`, or a model (which older recipes write as `model:PATH`)."""
    reader.trace(ours, theirs)
    if given in ("union", "base"):
        return given
    reference = reader.reference(theirs, given.removeprefix("model:") if isinstance(given, str) else given)
    reader.trace((*ours, "model"), theirs)
    return {"model": reference.name if reference is not None else ""}


def tokenizer_section(reader: Reader, given: Any) -> dict[str, Any]:
    section = reader.mapping(("tokenizer",), given, "{source, tokens, pad_to_multiple_of}")
    if section is None:
        return {}
    reader.keys(("tokenizer",), section, TOKENIZER)
    value: dict[str, Any] = {}
    source = section.get("source")
    value["source"] = "union" if source is None else vocabulary_of(reader, ("tokenizer", "source"), ("tokenizer", "source"), source)
    tokens = section.get("tokens") if section.get("tokens") is not None else {}
    rules = reader.mapping(("tokenizer", "tokens"), tokens, "a mapping of tokens to {source, force}")
    found = {token: _token(reader, token, rule) for token, rule in (rules or {}).items()}
    if found:
        value["tokens"] = found
    if section.get("pad_to_multiple_of") is not None:
        given = section["pad_to_multiple_of"]
        value["pad_to_multiple_of"] = given if whole(given) is None else whole(given)
    return value


def _token(reader: Reader, token: str, given: Any) -> dict[str, Any]:
    place: Place = ("tokenizer", "tokens", token)
    rule = reader.mapping(place, {} if given is None else given, "{source, force}")
    if rule is None:
        return {}
    reader.keys(place, rule, TOKEN)
    value: dict[str, Any] = {"force": rule["force"]} if rule.get("force") is not None else {}
    source = rule.get("source")
    here = (*place, "source")
    if isinstance(source, dict) and "kind" in source:
        if source["kind"] == "zero":
            value["source"] = "zero"
        elif source["kind"] == "model_token":
            value["source"] = _row(reader, here, source)
        else:
            reader.fault((*here, "kind"), f"is {source['kind']!r}, allowed is zero or model_token.")
    elif source is not None:
        reference = reader.reference(here, source)
        value["source"] = {"model": reference.name if reference is not None else ""}
    return value


def _row(reader: Reader, place: Place, source: Mapping[str, Any]) -> dict[str, Any]:
    reader.keys(place, source, ("kind", "model", "token", "token_id"))
    named = [key for key in ("token", "token_id") if source.get(key) is not None]
    if len(named) != 1:
        reader.fault(place, "needs exactly one of token and token_id.")
    reference = reader.reference((*place, "model"), source.get("model"))
    return {"model": reference.name if reference is not None else "", **{key: source[key] for key in named}}
