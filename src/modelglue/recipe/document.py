"""YAML to a validated model, with line numbers: the one reader of recipes, zoo files and glue files.

All errors of a document are reported together, each with file, line, place, what was found, what is allowed and the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from modelglue.checkpoint import SHORT_FLOAT
from modelglue.errors import RecipeError, did_you_mean

M = TypeVar("M", bound=BaseModel)
Place = tuple[str | int, ...]


class Document:
    """Parsed YAML that remembers on which line every key and item stands.

    A document that was made from others (another dialect, several in one file) has a `trace`: place here -> where that was written.
    Faults then speak of what was written.
    """

    def __init__(
        self, source: str, value: Any, lines: Mapping[Place, int], trace: Mapping[Place, tuple[Document, Place]] | None = None
    ) -> None:
        self.source = source
        self.value = value
        self._lines = lines
        self._trace = trace or {}

    @property
    def lines(self) -> Mapping[Place, int]:
        """Line of every key and item, by its path."""
        return self._lines

    def written(self, place: Place) -> tuple[Document, Place]:
        """The document and place that `place` was made from."""
        for end in range(len(place), -1, -1):
            if place[:end] in self._trace:
                document, start = self._trace[place[:end]]
                return document.written((*start, *place[end:]))
        return self, place

    def where(self, place: Place) -> str:
        """`file:line` of the nearest thing at or around `place`."""
        document, place = self.written(place)
        for end in range(len(place), -1, -1):
            line = document.lines.get(place[:end])
            if line is not None:
                return f"{document.source}:{line}"
        return document.source

    def fault(self, place: Place, what: str) -> str:
        """One line of an error message."""
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.written(place)[1]).lstrip(".")
        return f"{self.where(place)}: {path + ': ' if path else ''}{what}"


def load_document(source: str | Path | Mapping[str, Any]) -> Document:
    """Read a file (or take a mapping made in Python). YAML is loaded safely: no tag makes an object."""
    return _only(load_documents(source))


def load_documents(source: str | Path | Mapping[str, Any]) -> list[Document]:
    """The same for a file that may hold several YAML documents; an empty file is one empty document."""
    if isinstance(source, Mapping):
        return [Document("<recipe>", dict(source), {})]
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = _near(path) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).{near} Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Give a YAML file.") from error
    return parse_documents(text, str(path))


def _only(documents: Sequence[Document]) -> Document:
    if len(documents) > 1:
        raise RecipeError(f"{documents[0].source}: holds {len(documents)} YAML documents, one is allowed here.")
    return documents[0]


def _near(path: Path) -> str:
    """A hint at the files that are called nearly like the one that is not there."""
    try:
        return did_you_mean(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""


def parse_document(text: str, source: str) -> Document:
    """The one document of a text that is already in memory; `source` is what messages call it."""
    return _only(parse_documents(text, source))


def parse_documents(text: str, source: str) -> list[Document]:
    """All documents of a text. Empty ones (a last line of dashes) do not count."""
    documents = []
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            lines: dict[Place, int] = {}
            documents.append(Document(source, _build(node, (), lines, source), lines))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{source}{line}: is not valid YAML: {problem}.") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: is nested too deeply.") from error
    return [document for document in documents if document.value is not None] or [Document(source, None, {})]


#: nodes that one document may expand to; aliases of aliases could otherwise fill the memory from a few lines
_MOST_NODES = 200_000
#: keys and positions on the way to a value; some thirty merges within each other, well within Python's own limit
_DEEPEST = 100
#: what YAML may hold; every other tag would make an object or change a value's type behind the reader's back
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp"))


def _build(node: yaml.Node, place: Place, lines: dict[Place, int], source: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if len(lines) > _MOST_NODES:
        raise RecipeError(f"{source}: expands to more than {_MOST_NODES:,} values. Write it without nested aliases.")
    if len(place) > _DEEPEST:
        raise RecipeError(f"{source}:{line}: is nested more than {_DEEPEST} levels deep.")
    if node.tag not in _TAGS:
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise RecipeError(f"{source}:{line}: the tag {shown} is not allowed here. Write plain text, numbers, lists and mappings.")
    if isinstance(node, yaml.MappingNode):
        pairs = _pairs(node, source, {})
        lines.update({(*place, key): pair[0].start_mark.line + 1 for key, pair in pairs.items()})
        return {key: _build(value_node, (*place, key), lines, source) for key, (_, value_node) in pairs.items()}
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*place, i), lines, source) for i, child in enumerate(node.value)]
    try:
        return _scalar(node)
    except ValueError as error:  # a tag that does not fit its text, or more digits than Python converts
        raise RecipeError(f"{source}:{line}: '{str(node.value)[:40]}' cannot be read as a value ({error}).") from error


_Pairs = dict[str, tuple[yaml.Node, yaml.Node]]


def _pairs(node: yaml.MappingNode, source: str, known: dict[int, _Pairs | None]) -> _Pairs:
    """The keys of a mapping with their nodes. What merge keys (<<) bring in comes last, and only where the mapping is silent.

    `known`: mappings that are done, by the identity of their nodes; None while one is at work.
    """
    own: _Pairs = {}
    brought: list[_Pairs] = []
    known[id(node)] = None
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            for one in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(one, yaml.MappingNode):
                    raise RecipeError(f"{source}:{line}: a merge key (<<) takes a mapping or a list of mappings, such as <<: *anchor.")
                if id(one) not in known:
                    _pairs(one, source, known)
                found = known[id(one)]
                if found is None:
                    raise RecipeError(f"{source}:{line}: the mapping merges itself (<<). Name another anchor.")
                brought.append(found)
            continue
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
        if not key:
            raise RecipeError(f"{source}:{line}: keys must be plain words; empty and nested keys are not allowed.")
        if key in own:
            first = own[key][0].start_mark.line + 1
            raise RecipeError(f"{source}:{line}: key '{key}' is given twice (first on line {first}). Keep one of them.")
        own[key] = (key_node, value_node)
    for pairs in brought:
        own = {**own, **{key: pair for key, pair in pairs.items() if key not in own}}
    known[id(node)] = own
    return own


#: YAML 1.1 readings that no recipe means: yes/no/on/off as booleans, 12:30 as 750, 010 as 8
_PLAIN_BOOLEANS = ("true", "false")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if node.tag == "tag:yaml.org,2002:bool" and text.lower() not in _PLAIN_BOOLEANS:
        return text
    if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in text:
        return text
    if node.tag == "tag:yaml.org,2002:int" and _OCTAL.fullmatch(text):
        return int(text.replace("_", ""))
    if node.tag == "tag:yaml.org,2002:timestamp":
        return text
    if node.tag == "tag:yaml.org,2002:str":
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return float(text) if plain and SHORT_FLOAT.fullmatch(text) else text
    return yaml.SafeLoader("").construct_object(node, deep=True)


def validate(document: Document, model: type[M]) -> M:
    """Check the document against a pydantic model; RecipeError lists all faults."""
    if not isinstance(document.value, dict):
        raise RecipeError(f"{document.source}: is {shown(document.value)}, allowed is a mapping of keys to values.")
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        faults = [_explain(document, model, detail) for detail in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(faults))) from error


def read_document(source: str | Path | Mapping[str, Any], model: type[M]) -> M:
    """Read and check in one step."""
    return validate(load_document(source), model)


def _explain(document: Document, model: type[BaseModel], detail: Any) -> str:
    kind, found = detail["type"], detail.get("input")
    place = _real_place(document.value, detail["loc"], names_a_key=kind in ("missing", "extra_forbidden"))
    if kind == "extra_forbidden":
        known = _known_keys(model, detail["loc"][:-1])
        return document.fault(place, f"unknown key.{did_you_mean(str(place[-1]), known)} Allowed: {', '.join(known)}.")
    if kind == "missing":
        return document.fault(place, "is required and missing.")
    if kind in _ALLOWED:
        return document.fault(place, f"is {shown(found)}, allowed is {_ALLOWED[kind]}.")
    if kind in _BOUNDS:
        name, sign = _BOUNDS[kind]
        return document.fault(place, f"is {shown(found)}, allowed is a number {sign} {detail['ctx'][name]:g}.")
    if kind == "too_long":
        return document.fault(place, f"holds {detail['ctx']['actual_length']} items, allowed are {detail['ctx']['max_length']} at most.")
    if kind == "too_short":
        return document.fault(place, f"holds {detail['ctx']['actual_length']} items, allowed are {detail['ctx']['min_length']} or more.")
    if kind == "literal_error":
        return document.fault(place, f"is {shown(found)}, allowed is {detail['ctx']['expected']}.")
    message = str(detail["msg"]).removeprefix("Value error, ")
    what = "" if kind == "value_error" else f", found {shown(found)}"
    return document.fault(place, f"{message[:1].lower() + message[1:]}{what}.")


#: pydantic's names of wrong types, in our words
_ALLOWED = {
    "string_type": "text (put quotes around it if it is meant as text)",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_LONGEST = 80


def shown(found: Any) -> str:
    """A value as it stands in an error message."""
    if found is None:
        return "empty"
    if isinstance(found, bool):
        return str(found).lower()
    text = "a mapping" if isinstance(found, dict) else "a list" if isinstance(found, list) else repr(found)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _real_place(value: Any, location: Sequence[str | int], *, names_a_key: bool) -> Place:
    """The parts of pydantic's location that are in the document (it also names union members).

    `names_a_key`: the last part is a key, whether the document has it or not.
    """
    place: list[str | int] = []
    for number, part in enumerate(location):
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif not (names_a_key and number == len(location) - 1):
            continue
        place.append(part)
    return tuple(place)


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Keys that are allowed at a location, by walking the model's JSON schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def open_(node: Any) -> list[dict[str, Any]]:
        if "$ref" in node:
            return open_(definitions[node["$ref"].rsplit("/", 1)[1]])
        branches = [*node.get("anyOf", []), *node.get("oneOf", [])]
        return [inner for branch in branches for inner in open_(branch)] or [node]

    nodes = open_(schema)
    for part in location:
        children = []
        for node in nodes:
            if isinstance(part, int):
                children += open_(node["items"]) if "items" in node else []
            elif part in node.get("properties", {}):
                children += open_(node["properties"][part])
            elif isinstance(node.get("additionalProperties"), dict):
                children += open_(node["additionalProperties"])
        nodes = children or nodes
    return list(dict.fromkeys(key for node in nodes for key in node.get("properties", {})))
