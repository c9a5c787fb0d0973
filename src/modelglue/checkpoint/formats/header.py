"""The header of a safetensors file, believed only after it has been checked against the file it stands in.

Layout: 8 bytes little-endian length, a JSON object {name: {dtype, shape, data_offsets}}, then the tensors' bytes. Nothing is
allocated on the header's word: every claim is compared with the size of the file first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelglue.checkpoint.protocol import ITEM_SIZE, PACKED_BITS, TensorInfo
from modelglue.errors import CheckpointError

#: the format's own limit on the header
MAX_HEADER_BYTES = 100_000_000
_LARGEST = 2**63
#: characters of a found value that a message shows
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: what it is and where its bytes stand (absolute offsets in the file)."""

    info: TensorInfo
    begin: int
    end: int


def read_header(path: Path) -> Mapping[str, Entry]:
    """Parse and check the header of `path`. Reads 8 bytes plus the header. Raises CheckpointError naming file and tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            return parse_header(str(path), size, stream.read)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def parse_header(place: str, size: int, read: Callable[[int], bytes]) -> Mapping[str, Entry]:
    """The checked header of a file of `size` bytes, which `place` calls in messages; `read` hands out its first bytes in order."""
    prefix = read(8)
    if len(prefix) < 8:
        raise _bad(place, f"is {size} bytes long, too short for a safetensors file (at least 10)")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(place, f"claims a header of {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}")
    if length > size - 8:
        raise _bad(place, f"claims a header of {length:,} bytes, but the whole file has {size:,}")
    text = read(length)
    if not text.startswith(b"{"):
        raise _bad(place, "has a header that does not start with '{'")
    try:
        header = parse_object(text)
    except ValueError as error:
        raise _bad(place, f"has a header that is not valid: {error}") from error
    _check_metadata(place, header.pop("__metadata__", None))
    entries = {name: _entry(place, name, value, 8 + length, size) for name, value in header.items()}
    _check_coverage(place, entries, 8 + length, size)
    return entries


def parse_object(text: bytes, *, unique: bool = True) -> dict[str, Any]:
    """A JSON object that a stranger wrote. ValueError, with words for the message, if it is not UTF-8, not JSON, not an object,
    nested too deeply, or if it is to be unique and a key stands twice in one object: two readers could see two different files.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {shown(twice)} twice")
    return value


def _check_metadata(place: str, value: Any) -> None:
    if value is not None and not (
        isinstance(value, dict) and all(isinstance(t, str) and is_text(t) for pair in value.items() for t in pair)
    ):
        raise _bad(place, "has a __metadata__ that is not an object of strings")


def _entry(place: str, name: str, value: Any, data_start: int, size: int) -> Entry:
    if not is_text(name):
        raise _bad(place, "has a name that is not Unicode text", name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(place, "needs exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in ITEM_SIZE and dtype not in PACKED_BITS):
        known = ", ".join([*ITEM_SIZE, *PACKED_BITS])
        raise CheckpointError(
            f"{place}: tensor {shown(name)} has dtype {shown(dtype)}; known are {known}. Convert the model to one of them."
        )
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise _bad(place, f"has shape {shown(shape)}; allowed is a list of whole numbers from 0", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise _bad(place, f"has data_offsets {shown(offsets)}; allowed are two whole numbers", name)
    begin, end = offsets
    if begin > end or data_start + end > size:
        raise _bad(place, f"stands at bytes {begin:,} to {end:,}, but the file holds {size - data_start:,} bytes of data", name)
    if not _is_product_small(shape):
        raise _bad(place, f"has shape {shown(shape)}, which is more elements than can be counted", name)
    info = TensorInfo(tuple(shape), dtype)
    if dtype in PACKED_BITS and info.numel * PACKED_BITS[dtype] % 8:
        raise _bad(place, f"has shape {shown(shape)} in {dtype}, which does not fill whole bytes", name)
    if info.nbytes != end - begin:
        raise _bad(place, f"has shape {shown(shape)} in {dtype}, that is {info.nbytes:,} bytes, but its offsets span {end - begin:,}", name)
    return Entry(info, data_start + begin, data_start + end)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_product_small(shape: Sequence[int]) -> bool:
    """Whether the sizes multiply to less than 2^63. Stops at the first overflow: the product of a long hostile list takes hours.

    A zero does not excuse the others, because readers multiply from the left.
    """
    product = 1
    for count in shape:
        product *= count or 1
        if product >= _LARGEST:
            return False
    return True


def _check_coverage(place: str, entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    """The tensors must fill the data part exactly: bytes that belong to nobody, or to two, hide something."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise _bad(place, "overlaps the tensor before it", name)
        if entry.begin > position:
            raise _bad(place, f"leaves a hole of {entry.begin - position:,} bytes before it", name)
        position = entry.end
    if position != size:
        raise _bad(place, f"ends with {size - position:,} bytes that belong to no tensor")


def is_text(name: str) -> bool:
    """Whether `name` can be written down: JSON escapes can spell halves of characters, which no file and no terminal takes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """`value` as a message may show it: printable, and short whatever a hostile file holds."""
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _bad(place: str, what: str, name: str | None = None) -> CheckpointError:
    tensor = f"tensor {shown(name)} " if name is not None else ""
    return CheckpointError(f"{place}: {tensor}{what}. The file is damaged or hostile; fetch or write it again.")
