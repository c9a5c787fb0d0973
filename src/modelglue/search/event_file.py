"""TensorBoard's event files, written by hand: records of protocol buffers with checksums. Nothing needs to be installed for it.

A record is its length, a checksum of that, the data, and a checksum of those (CRC-32C, rotated and shifted as TensorFlow does it). The data
is an `Event` (time, step, file version or summary) whose summary holds pairs of tag and number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

_VERSION = b"brain.Event:2"
#: CRC-32C: the reversed polynomial, and what TensorFlow adds to its rotated sums
_POLYNOMIAL, _DELTA = 0x82F63B78, 0xA282EAD8
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5


def event_file(points: Iterable[tuple[int, Mapping[str, float]]], time: float) -> bytes:
    """The content of an event file: numbers by tag at steps, all at one `time` (seconds since 1970)."""
    found = [_record(_key(1, _DOUBLE) + struct.pack("<d", time) + _text(3, _VERSION))]
    for step, values in points:
        summary = b"".join(_text(1, _text(1, tag.encode()) + _key(2, _FLOAT) + struct.pack("<f", value)) for tag, value in values.items())
        found.append(_record(_key(1, _DOUBLE) + struct.pack("<d", time) + _key(2, _VARINT) + _varint(step) + _text(5, summary)))
    return b"".join(found)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _DELTA) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Castagnoli's cyclic redundancy check."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = [_entry(value) for value in range(256)]


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _text(field: int, data: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
