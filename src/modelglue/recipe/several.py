"""Several recipes in one file: a document may name another's result as a model. They become one recipe, nested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelglue.errors import RecipeError, did_you_mean
from modelglue.recipe.document import Document, Place
from modelglue.recipe.mergekit_reader import Converted

#: merges that one file may expand to: every use of a document is written out
_MOST_MERGES = 1000


def assemble(documents: Sequence[Converted]) -> Converted:
    """The final result as one recipe, in which every document that it names is nested, rounded to its stored dtype.

    The result is the document without a name, else the one that no other uses. RecipeError for names that are missing or given
    twice, for cycles, and for documents that the result does not need.
    """
    if len(documents) == 1:
        return documents[0]
    return _Assembly(documents).run()


class _Assembly:
    def __init__(self, documents: Sequence[Converted]) -> None:
        self._documents = documents
        self._named: dict[str, Converted] = {}
        self._faults = [fault for document in documents for fault in document.faults]
        self._used: set[str] = set()
        self._merges = 0

    def run(self) -> Converted:
        unnamed = [document for document in self._documents if document.name is None]
        for document in unnamed[1:]:
            self._faults.append(document.document.fault((), "has no name; at most one document, the result, may go without."))
        for document in self._documents:
            if document.name in self._named:
                self._faults.append(document.document.fault(("name",), f"'{document.name}' is the name of another document as well."))
            elif document.name is not None:
                self._named[document.name] = document
        if self._faults:
            raise RecipeError("\n".join(self._faults))
        users = {name for document in self._documents for name in document.references.values() if name in self._named}
        results = unnamed or [document for document in self._documents if document.name not in users]
        if not results:
            raise RecipeError(f"{self._source()}: every document is an input of another, so there is no result: they form a circle.")
        result = results[-1]
        whole = Converted(result.document, None, result.value, dict(result.trace))
        whole.value = self._nest(result, (), whole.trace, ())
        for document in self._documents:
            whole.warnings += document.warnings
            whole.notes += document.notes
            if document is not result and document.name not in self._used:
                hint = did_you_mean(str(document.name), [name for one in self._documents for name in one.references.values()])
                text = f"the result does not use the document '{document.name}'; it is not merged.{hint}"
                whole.warnings.append(document.document.fault(("name",), text))
        return whole

    def _source(self) -> str:
        return self._documents[0].document.source

    def _nest(self, document: Converted, prefix: Place, trace: dict[Place, tuple[Document, Place]], path: tuple[str, ...]) -> Any:
        """The value of a document with every name of another replaced by that document's value."""
        value = _copy(document.value)
        for place, name in document.references.items():
            if name not in self._named:
                continue
            inner = self._named[name]
            if name in path:
                circle = " -> ".join((*path[path.index(name) :], name))
                raise RecipeError(inner.document.fault(("name",), f"the documents form a circle: {circle}."))
            self._used.add(name)
            self._merges += 1
            if self._merges > _MOST_MERGES:
                raise RecipeError(f"{self._source()}: the documents use each other more than {_MOST_MERGES:,} times when written out.")
            here = (*prefix, *place)
            for ours, theirs in inner.trace.items():
                trace[(*here, *ours)] = theirs
            nested = self._nest(inner, here, trace, (*path, name))
            if "store" not in nested.get("dtype", {}):
                nested["dtype"] = {"store": "donor"}
            _put(value, place, nested)
        return value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _put(value: Any, place: Place, new: Any) -> None:
    for part in place[:-1]:
        value = value[part]
    value[place[-1]] = new
