"""What a config says about the vocabulary: how many rows, and which ids have a special meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelglue.checkpoint.vocabulary.surgery import ROLES
from modelglue.checkpoint.vocabulary.tables import LANGUAGE_CONFIGS

_ID_FIELD = re.compile(r"_token_ids?$|_token_index$")
_IDS_FIELD = re.compile(r"suppress_tokens$")


def rows_update(config: Mapping[str, Any], rows: int, before: int) -> dict[str, Any]:
    """The fields that must say `rows`: wherever vocab_size stands. If it stands nowhere and the number changes, the language model's."""
    changes: dict[str, Any] = {}
    if isinstance(config.get("vocab_size"), int):
        changes["vocab_size"] = rows
    for key in LANGUAGE_CONFIGS:
        part = config.get(key)
        if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int):
            changes[key] = {"vocab_size": rows}
    if not changes and config and rows != before:
        inner = next((key for key in LANGUAGE_CONFIGS if isinstance(config.get(key), Mapping)), None)
        changes = {"vocab_size": rows} if inner is None else {inner: {"vocab_size": rows}}
    return {key: value for key, value in changes.items() if _differs(config.get(key), value)}


def special_ids_update(
    config: Mapping[str, Any],
    source: Mapping[str, Any],
    donor_tokens: Mapping[int, str],
    output: Mapping[str, int],
    roles: Mapping[str, str],
    place: str,
) -> tuple[dict[str, Any], list[str]]:
    """New values of the id fields (bos_token_id, image_token_index, suppress_tokens, ...) of a config whose tokenizer came from elsewhere.

    `config` is the donor's, `source` the config that came with the tokenizer, whose ids are the output's. A role that the tokenizer
    names decides, unless the source's config knows more of it (a list); else the source's value; else the donor's token is looked up.
    """
    warnings: list[str] = []

    def look_up(number: Any) -> int | None:
        return output.get(donor_tokens.get(number, "")) if isinstance(number, int) and not isinstance(number, bool) else None

    def new_value(key: str, value: Any) -> Any:
        role = key.removesuffix("_id") if key.endswith("_token_id") else ""
        wanted = output.get(roles.get(role, "")) if role in ROLES else None
        theirs = _field(source, key)
        if theirs is not None and (wanted is None or wanted == theirs or (isinstance(theirs, list) and wanted in theirs)):
            return theirs
        if wanted is not None:
            return wanted
        if isinstance(value, list):
            found = [number for number in map(look_up, value) if number is not None]
            lost = len(found) < len(value)
            new: Any = found
        else:
            new = look_up(value)
            lost = new is None
        if lost:
            warnings.append(f"{place}: {key} was {value}, a token that the output's vocabulary does not have; check it.")
        return new

    return _over_id_fields(config, new_value), warnings


def lost_ids_update(config: Mapping[str, Any], rows: int, place: str) -> tuple[dict[str, Any], list[str]]:
    """Id fields that point beyond the output's rows become null."""
    warnings: list[str] = []

    def new_value(key: str, value: Any) -> Any:
        kept = [number for number in value if not isinstance(number, int) or number < rows] if isinstance(value, list) else value
        if kept != value or (isinstance(value, int) and value >= rows):
            warnings.append(f"{place}: {key} is {value}, but the output has only {rows:,} rows; it is left out.")
            return kept if isinstance(value, list) else None
        return value

    return _over_id_fields(config, new_value), warnings


def _over_id_fields(config: Mapping[str, Any], new_value: Callable[[str, Any], Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key in LANGUAGE_CONFIGS:
            if inner := _over_id_fields(value, new_value):
                changes[key] = inner
        elif value is not None and (_ID_FIELD.search(key) or _IDS_FIELD.search(key)) and _are_ids(value):
            new = new_value(key, value)
            if new != value:
                changes[key] = new
    return changes


def _field(config: Mapping[str, Any], key: str) -> Any:
    parts = [config, *(config[part] for part in LANGUAGE_CONFIGS if isinstance(config.get(part), Mapping))]
    return next((part[key] for part in parts if part.get(key) is not None), None)


def _are_ids(value: Any) -> bool:
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values)


def _differs(old: Any, new: Any) -> bool:
    if isinstance(new, Mapping):
        return any(_differs(old.get(key), value) for key, value in new.items())
    return bool(old != new)
