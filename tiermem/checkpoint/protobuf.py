"""The wire format of Protocol Buffers: a message's fields, and where in the file they are. Knows no message.

After https://protobuf.dev/programming-guides/encoding: a field is a key (number << 3 | wire type) and a value, which is
a varint, 4 or 8 bytes, or a length and that many bytes. Groups, which proto2 deprecated, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tiermem.checkpoint.cursor import Cursor, Span

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field of a message: `span` is where its value lies; `value` is the number of a varint, and 0 otherwise."""

    number: int
    wire: int
    span: Span
    value: int


def fields(cursor: Cursor, message: Span) -> Iterator[Field]:
    """The fields of the message at `message`, in order; values are passed over. The cursor may be moved meanwhile.

    Raises ValueError for what is no message.
    """
    at = message.start
    while at < message.end:
        cursor.at = at
        key = _varint(cursor, message.end)
        number, wire = key >> 3, key & 7
        start, value = cursor.at, 0
        if number == 0 or number >= 1 << 29:
            raise ValueError(f"byte {at}: a protobuf field has the number {number}, which none may have")
        if wire == VARINT:
            value = _varint(cursor, message.end)
            at = cursor.at
        elif wire == BYTES:
            length = _varint(cursor, message.end)
            start = cursor.at
            at = start + length
        elif wire in _FIXED:
            at = start + _FIXED[wire]
        else:
            raise ValueError(f"byte {at}: a protobuf field has the wire type {wire}, which is not used any more")
        if at > message.end:
            raise ValueError(f"byte {start}: protobuf field {number} ends at {at}, but its message at {message.end}")
        yield Field(number, wire, Span(start, at), value)


def text(cursor: Cursor, field: Field, most: int) -> str:
    """A field's value as UTF-8 of at most `most` bytes. Raises ValueError."""
    if field.wire != BYTES or field.span.length > most:
        raise ValueError(
            f"byte {field.span.start}: protobuf field {field.number} should be text of at most {most} bytes, but has "
            f"{field.span.length} bytes of wire type {field.wire}"
        )
    cursor.at = field.span.start
    return cursor.take(field.span.length).decode()


def integers(cursor: Cursor, field: Field, most: int) -> list[int]:
    """The signed 64-bit numbers of a repeated field, packed or one by one; at most `most`. Raises ValueError."""
    if field.wire == VARINT:
        return [_signed(field.value)]
    found: list[int] = []
    if field.wire == BYTES:
        cursor.at = field.span.start
        while cursor.at < field.span.end:
            if len(found) == most:
                raise ValueError(f"byte {cursor.at}: more than {most} numbers in protobuf field {field.number}")
            found.append(_signed(_varint(cursor, field.span.end)))
        return found
    raise ValueError(f"byte {field.span.start}: protobuf field {field.number} has wire type {field.wire}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varint(cursor: Cursor, end: int) -> int:
    value = 0
    for i, byte in enumerate(cursor.peek(min(_MAX_VARINT_BYTES, end - cursor.at))):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if value >> 64:
                break
            cursor.at += i + 1
            return value
    raise ValueError(f"byte {cursor.at}: a protobuf number is cut off or longer than 64 bits")
