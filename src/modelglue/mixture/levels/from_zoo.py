"""A zoo file, or a glue file, read as a mixture: its models are the experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.recipe import Document

#: keys of the group `mixture` that stand at the top of a mixture's own file
_SETTINGS = ("level", "routing", "top_k", "shared", "merged", "merged_layers", "share_io", "combine", "pack", "store", "compat", "export")
_ROUTER = ("gate_mode", "router_layer", "temperature", "route_span", "encoder", "seed")
#: how a router is learned: a mixture's own words, which a glue file has in part and means for itself
_LEARNING = ("tasks", "include", "store", "source", "kind", "objective", "hidden")
#: what a zoo knows of a model and no mixture asks for
_BESIDE = ("scores", "dtype", "id", "alias", "revision", "adapter")


def from_zoo(document: Document) -> Document:
    """The document in the words of a mixture's own file, remembering where each was written; others are left as they are.

    What a glue file says besides (tasks, similarity, how members are selected) is not looked at.
    """
    value = document.value
    if not isinstance(value, Mapping) or not isinstance(value.get("zoo"), Mapping) or not isinstance(value["zoo"].get("models"), list):
        return document
    made: dict[str, Any] = {key: value[key] for key in ("format",) if key in value}
    trace: dict[tuple[str | int, ...], tuple[Document, tuple[str | int, ...]]] = {(): (document, ())}
    for group, keys, here in (("mixture", _SETTINGS, ()), ("router", _ROUTER, ("router",))):
        given = value.get(group)
        if not isinstance(given, Mapping):
            continue
        target = made if not here else made.setdefault("router", {})
        for key in (*keys, *(_LEARNING if group == "router" and "tasks" in given else ())):
            if key in given:
                target[key] = given[key]
                trace[(*here, key)] = (document, (group, key))
    experts = []
    for number, model in enumerate(value["zoo"]["models"]):
        experts.append(_expert(model) if isinstance(model, Mapping) else model)
        trace["experts", number] = (document, ("zoo", "models", number))
    return Document(document.source, {**made, "experts": experts}, {}, trace)


def _expert(model: Mapping[str, Any]) -> dict[str, Any]:
    reference = str(model.get("id"))
    name = model.get("alias") or reference.rstrip("/").rpartition("/")[2].partition("@")[0]
    if model.get("revision"):
        reference += f"@{model['revision']}"
    if model.get("adapter"):
        reference += f"+{model['adapter']}"
    return {"model": reference, "name": name, **{key: given for key, given in model.items() if key not in _BESIDE}}
