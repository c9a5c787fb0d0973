"""The directory of a zip archive whose records are stored as they are, as torch writes them: where each record's bytes stand.

Nothing is unpacked and nothing is allocated on the archive's word: every claim is compared with the size of the file. What another
reader could understand otherwise (compression, encryption, two records of one name, records over each other) is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelglue.checkpoint.formats.header import MAX_HEADER_BYTES, shown
from modelglue.errors import CheckpointError

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_RECORD = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 2**16
#: what stands in the short end record where the number is in the long one
_ONES = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
_ENCRYPTED = 0x2041  # plain and strong encryption, and a masked directory


@dataclass(frozen=True, slots=True)
class Record:
    """One record: where its bytes stand in the archive, and their check sum."""

    begin: int
    end: int
    crc: int


def read_directory(path: Path) -> Mapping[str, Record]:
    """Record name -> place. Reads the directory and 30 bytes at each record. Raises CheckpointError naming file and record."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            begin, length, count = _end(path, stream, size)
            stream.seek(begin)
            return _records(path, stream, stream.read(length), count, begin)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


def _end(path: Path, stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Offset and length of the directory, and how many records it lists."""
    tail = min(size, _END.size + _LONGEST_COMMENT)
    stream.seek(size - tail)
    text = stream.read(tail)
    place = text.rfind(b"PK\5\6")
    if place < 0 or place + _END.size > len(text):
        raise _bad(path, "is cut off: it begins as a zip archive and has no end record")
    _, disk, first_disk, here, count, length, begin, comment = _END.unpack_from(text, place)
    if place + _END.size + comment != len(text):
        raise _bad(path, "has bytes after the end of its zip archive")
    end = size - tail + place
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (length, begin) or text[place - _LOCATOR_64.size :][:4] == b"PK\6\7":
        short = (here, count, length, begin)
        end, disk, first_disk, here, count, length, begin = _end_64(path, stream, end)
        if any(value not in (wide, ones) for value, wide, ones in zip(short, (here, count, length, begin), _ONES, strict=True)):
            raise _bad(path, "has two end records that differ")
    if disk or first_disk or here != count:
        raise _bad(path, "is one part of a zip archive that was split")
    if begin + length != end:
        raise _bad(path, f"has a zip directory of {length:,} bytes at {begin:,}, which does not reach its end record at {end:,}")
    if length > MAX_HEADER_BYTES:
        raise _bad(path, f"has a zip directory of {length:,} bytes; allowed are {MAX_HEADER_BYTES:,}")
    return begin, length, count


def _end_64(path: Path, stream: BinaryIO, end: int) -> tuple[int, int, int, int, int, int, int]:
    where = end - _LOCATOR_64.size
    if where < 0:
        raise _bad(path, "lacks the 64-bit end record of its zip archive")
    stream.seek(where)
    magic, _, offset, _ = _LOCATOR_64.unpack(stream.read(_LOCATOR_64.size))
    if magic != b"PK\6\7" or offset + _END_64.size != where:
        raise _bad(path, "lacks the 64-bit end record of its zip archive")
    stream.seek(offset)
    magic, _, _, _, disk, first_disk, here, count, length, begin = _END_64.unpack(stream.read(_END_64.size))
    if magic != b"PK\6\6":
        raise _bad(path, "lacks the 64-bit end record of its zip archive")
    return offset, disk, first_disk, here, count, length, begin


def _records(path: Path, stream: BinaryIO, text: bytes, count: int, limit: int) -> dict[str, Record]:
    found: dict[str, Record] = {}
    spans: list[tuple[int, int, str]] = []  # with the header before each record
    position = 0
    while position < len(text):
        if position + _RECORD.size > len(text):
            raise _bad(path, "has a zip directory that is cut off")
        magic, _, _, flags, method, _, _, crc, packed, plain, *lengths, _, _, _, offset = _RECORD.unpack_from(text, position)
        begin = position + _RECORD.size
        after = begin + sum(lengths)
        if magic != b"PK\1\2" or after > len(text):
            raise _bad(path, "has a zip directory that is damaged")
        raw, extra = text[begin : begin + lengths[0]], text[begin + lengths[0] : begin + lengths[0] + lengths[1]]
        name = _name(path, raw)
        if name in found:
            raise _bad(path, f"has two records {shown(name)}")
        plain, packed, offset = _wide(path, name, extra, (plain, packed, offset))
        if flags & _ENCRYPTED:
            raise _bad(path, f"has the record {shown(name)} encrypted")
        if method or packed != plain:
            raise CheckpointError(
                f"{path}: has the record {shown(name)} compressed; weights are read where they stand. "
                "Load the file with torch and save it again, best as safetensors."
            )
        found[name] = record = Record(*_span(path, stream, raw, name, offset, plain, limit), crc)
        spans.append((offset, record.end, name))
        position = after
    if len(found) != count:
        raise _bad(path, f"has a zip directory of {len(found)} records, and its end record says {count}")
    _check_apart(path, spans)
    return found


def _name(path: Path, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(path, f"has a record with the name {shown(raw)}, which is not Unicode text") from None
    if not name or "\\" in name or "\0" in name or name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
        raise _bad(path, f"has a record with the name {shown(name)}, which leads elsewhere")
    return name


def _wide(path: Path, name: str, extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sizes and offset beyond 4 GB stand in an extra field, in order, where the short ones are all ones."""
    wide: list[int] = []
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if kind == 1:
            wide = [int.from_bytes(body[at : at + 8], "little") for at in range(0, len(body) - 7, 8)]
        position += 4 + length
    given = list(values)
    for number, value in enumerate(values):
        if value == 0xFFFFFFFF:
            if not wide:
                raise _bad(path, f"lacks the 64-bit size of the record {shown(name)}")
            given[number] = wide.pop(0)
    return given[0], given[1], given[2]


def _span(path: Path, stream: BinaryIO, raw: bytes, name: str, offset: int, size: int, limit: int) -> tuple[int, int]:
    """Where the bytes of a record stand; the header before them must say the same name."""
    if offset + _LOCAL.size > limit:
        raise _bad(path, f"has the record {shown(name)} at {offset:,}, beyond its {limit:,} bytes")
    stream.seek(offset)
    magic, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(stream.read(_LOCAL.size))
    if magic != b"PK\3\4" or method or name_length != len(raw) or stream.read(name_length) != raw:
        raise _bad(path, f"has another record where its directory says that {shown(name)} stands")
    begin = offset + _LOCAL.size + name_length + extra_length
    if begin + size > limit:
        raise _bad(path, f"has the record {shown(name)} at {begin:,} to {begin + size:,}, beyond its {limit:,} bytes")
    return begin, begin + size


def _check_apart(path: Path, spans: list[tuple[int, int, str]]) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin < position:
            raise _bad(path, f"has the record {shown(name)} over another one")
        position = end


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}. The file is damaged or hostile; fetch or write it again.")
