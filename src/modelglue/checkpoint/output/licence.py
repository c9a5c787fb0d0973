"""Under which licences a merge's parents stand, read from their folders, and where those do not go together. No legal advice."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modelglue.checkpoint.formats.folder import hub_id_of
from modelglue.checkpoint.output.record import RECORD_FILE
from modelglue.checkpoint.protocol import Checkpoint

#: characters of a README or LICENSE that are looked at
_LOOKED_AT = 200_000
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
#: what the texts of well-known licences say -> what the hub calls them; the first that matches wins
_TEXTS = (
    (r"llama\s+4\s+community\s+licen[sc]e", "llama4"), (r"llama\s+3\.3\s+community\s+licen[sc]e", "llama3.3"),
    (r"llama\s+3\.2\s+community\s+licen[sc]e", "llama3.2"), (r"llama\s+3\.1\s+community\s+licen[sc]e", "llama3.1"),
    (r"llama\s+3\s+community\s+licen[sc]e", "llama3"), (r"llama\s+2\s+community\s+licen[sc]e", "llama2"),
    (r"gemma\s+terms\s+of\s+use", "gemma"), (r"responsible\s+ai\s+licen[sc]e|\bopenrail\b", "openrail"),
    (r"gnu\s+affero\s+general\s+public\s+licen[sc]e\s+version\s+3", "agpl-3.0"),
    (r"gnu\s+lesser\s+general\s+public\s+licen[sc]e\s+version\s+3", "lgpl-3.0"),
    (r"gnu\s+general\s+public\s+licen[sc]e\s+version\s+3", "gpl-3.0"), (r"gnu\s+general\s+public\s+licen[sc]e\s+version\s+2", "gpl-2.0"),
    (r"attribution-noncommercial-sharealike\s+4\.0", "cc-by-nc-sa-4.0"),
    (r"attribution-noncommercial-noderiv\w*\s+4\.0", "cc-by-nc-nd-4.0"),
    (r"attribution-noncommercial\s+4\.0", "cc-by-nc-4.0"), (r"attribution-sharealike\s+4\.0", "cc-by-sa-4.0"),
    (r"creative\s+commons\s+attribution\s+4\.0", "cc-by-4.0"), (r"apache\s+licen[sc]e,?\s+version\s+2\.0", "apache-2.0"),
    (r"permission\s+is\s+hereby\s+granted,\s+free\s+of\s+charge", "mit"),
    (r"redistribution\s+and\s+use\s+in\s+source\s+and\s+binary\s+forms", "bsd"),
)  # fmt: skip

_PERMISSIVE = re.compile(r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-\d\.\d|unlicense|wtfpl|zlib|odc-by|pddl|cdla-permissive.*|0bsd")
_NON_COMMERCIAL = re.compile(r"(?:^|-)nc(?:-|$)|non-?commercial|research|\bmrl\b|\bmnpl\b")
_NO_DERIVATIVES = re.compile(r"(?:^|-)nd(?:-|$)")
_COPYLEFT = re.compile(r"(?:^|-)[al]?gpl(?:-|$)|(?:^|-)sa(?:-|$)|^eupl|^osl|^mpl")
#: licences of the Apache and GPL 3 kind that the one with a share-alike clause may take in
_MAY_ENTER = {"gpl-3.0": _PERMISSIVE, "agpl-3.0": _PERMISSIVE, "lgpl-3.0": _PERMISSIVE}


@dataclass(frozen=True)
class Licence:
    """`id` as the hub writes it ("apache-2.0", "other", None if nothing says it); `name` and `link` are the front matter's, for "other"."""

    id: str | None = None
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        if self.id is None:
            return "unknown"
        return f"{self.id} ({self.name})" if self.name else self.id

    @property
    def known(self) -> bool:
        """Whether it is one of which anything is known beyond that there is one."""
        return self.id is not None and (self.id not in ("other", "unknown") or self.name is not None)


@dataclass(frozen=True)
class Parent:
    """A folder that the merge reads."""

    reference: str
    """As the recipe calls it."""
    hub_id: str | None
    licence: Licence
    revision: str | None = None
    """The commit, of what came out of the hub's cache."""
    record: str | None = None
    """SHA-256 of the record, which holds the hash of every tensor, of what we wrote ourselves."""


def parents(checkpoint: Checkpoint, references: Mapping[str, str] | None = None) -> list[Parent]:
    """Every model and adapter that an expression is made of, once, in order. Reads a README or LICENSE of each; never the network."""
    found: dict[str, Parent] = {}
    for source in checkpoint.sources():
        name = str(source.describe().get("model"))
        reference = (references or {}).get(name, name)
        places = list(source.places)
        halves = reference.split("+") if len(places) > 1 else [reference]
        if len(halves) != len(places):  # in memory, or a path that holds a plus sign
            found.setdefault(reference, Parent(reference, source.hub_id, licence_of(places[0]) if places else Licence()))
            continue
        for half, place in zip(halves, places, strict=True):
            found.setdefault(half, Parent(half, hub_id_of(place), licence_of(place), _revision(place), _record(place)))
    return list(found.values())


def licence_of(place: Path) -> Licence:
    """The licence of a model folder: the front matter of its README.md, else what its LICENSE file reads like."""
    if not place.is_dir():
        return Licence()
    front = _front_matter(place / "README.md")
    given = front.get("license")
    ids = [str(one).strip().lower() for one in (given if isinstance(given, list) else [given]) if one]
    if len(ids) == 1:
        name, link = front.get("license_name"), front.get("license_link")
        other = ids[0] == "other"
        return Licence(ids[0], str(name) if other and name else None, str(link) if other and link else None)
    if ids:
        return Licence("other", " and ".join(ids))
    for file in _FILES:
        if (text := _text(place / file)) is not None:
            known = next((known for pattern, known in _TEXTS if re.search(pattern, text[:3000], re.IGNORECASE)), None)
            return Licence(known) if known else Licence("other")
    return Licence()


def common_licence(found: list[Parent]) -> Licence | None:
    """The licence that all parents have, or None."""
    licences = {parent.licence for parent in found}
    return licences.pop() if len(licences) == 1 and all(parent.licence.known for parent in found) else None


def licence_warnings(found: list[Parent]) -> list[str]:
    """What stands against publishing a merge of these, or ties the hands of whoever does. Empty if nothing is known of any parent."""
    if all(parent.licence.id is None for parent in found):
        return []
    common = common_licence(found)
    warnings = []
    for licence in dict.fromkeys(parent.licence for parent in found):
        under = [parent.reference for parent in found if parent.licence == licence]
        of, one = ", ".join(under), len(under) == 1
        are, it = ("is", "it") if one else ("are", "they")
        has = "has a licence of its own" if one else "have a licence of their own"
        others = list(dict.fromkeys(str(parent.licence) for parent in found if parent.licence not in (licence, Licence())))
        name = (licence.id or "").lower() + (f" {licence.name.lower()}" if licence.name else "")
        if licence.id is None:
            warnings.append(f"{of} {'names' if one else 'name'} no licence: find out whether {it} may be merged and published.")
        elif not licence.known:
            warnings.append(f"{of} {has} ({licence}): read whether {it} may be merged and published.")
        elif _NO_DERIVATIVES.search(name):
            warnings.append(f"{of} {are} under {licence}, which permits no derivatives; a merge is one.")
        elif common is not None:
            continue
        elif _NON_COMMERCIAL.search(name):
            warnings.append(f"{of} {are} under {licence}, for non-commercial use only; {', '.join(others)} beside it does not change that.")
        elif _COPYLEFT.search(name):
            entering = _MAY_ENTER.get(name)
            clash = [other for other in others if entering is None or not entering.fullmatch(other)]
            end = f"; {', '.join(clash)} may not permit that." if clash else ", so the merge falls under it."
            warnings.append(f"{of} {are} under {licence}, which asks that what is made from it be under the same{end}")
        elif not _PERMISSIVE.fullmatch(name):
            warnings.append(
                f"{of} {are} under {licence}, whose terms hold for the merge as well, beside {', '.join(others) or 'the others'}."
            )
    return warnings


def _revision(place: Path) -> str | None:
    """In the hub's cache a snapshot's folder is called by its commit."""
    return place.absolute().name if hub_id_of(place) is not None else None


def _record(place: Path) -> str | None:
    try:
        return hashlib.sha256((place / RECORD_FILE).read_bytes()).hexdigest()
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_LOOKED_AT)
    except OSError:
        return None


def _front_matter(path: Path) -> Mapping[str, Any]:
    """{} where there is none, or none that can be read: a parent's README is nobody's input."""
    text = _text(path) or ""
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, Mapping) else {}
