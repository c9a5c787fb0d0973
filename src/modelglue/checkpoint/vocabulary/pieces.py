"""The pieces of a sentencepiece model, read and appended by hand: a protocol buffer of which only field 1 concerns us.

Layout (sentencepiece_model.proto): ModelProto { repeated SentencePiece pieces = 1; ... }, SentencePiece { string piece = 1;
float score = 2; Type type = 3 }. A piece's id is its position. Repeated fields may stand anywhere, so pieces are appended at the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


def read_pieces(data: bytes) -> list[Piece]:
    """All pieces in the order of their ids. ValueError for anything that is not such a file; memory is bounded by the file."""
    pieces = [_piece(value) for number, value in _fields(data) if number == 1 and isinstance(value, bytes)]
    if not pieces:
        raise ValueError("it is not a sentencepiece model: it has no pieces")
    return pieces


def append_pieces(data: bytes, pieces: Sequence[Piece]) -> bytes:
    """The model with further pieces; what stood there is not touched."""
    return data + b"".join(_message(1, _encoded(piece)) for piece in pieces)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire == _FIXED32:
            length = 4
        elif wire == _FIXED64:
            length = 8
        else:
            raise ValueError(f"it is not a sentencepiece model: wire type {wire} at byte {position:,}")
        if length > len(data) - position:
            raise ValueError(f"it is not a sentencepiece model: a field at byte {position:,} leads out of the file")
        field = data[position : position + length]
        position += length
        yield number, struct.unpack("<f", field)[0] if wire == _FIXED32 else field


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it is not a sentencepiece model: it ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"it is not a sentencepiece model: a number at byte {position:,} has no end")


def _encoded(piece: Piece) -> bytes:
    text = piece.text.encode()
    kind = b"" if piece.kind == NORMAL else bytes([3 << 3 | _VARINT, piece.kind])
    return _message(1, text) + bytes([2 << 3 | _FIXED32]) + struct.pack("<f", piece.score) + kind


def _message(number: int, data: bytes) -> bytes:
    length, prefix = len(data), bytearray([number << 3 | _BYTES])
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + data
