"""Walks a protocol buffer message without a schema, in place: no copy, no recursion.

Format: https://protobuf.dev/programming-guides/encoding. Groups (long deprecated) are
refused. Knows no message.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TypeAlias

View: TypeAlias = "mmap.mmap | bytes"

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class DamagedError(ValueError):
    """Bytes that are no message."""


class Budget:
    """Fields that may still be met: a gigabyte of two-byte fields would take an hour."""

    def __init__(self, left: int) -> None:
        self.left = left


def fields(view: View, start: int, end: int, budget: Budget) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, a, b) of each field of the message in ``view[start:end]``.

    a, b: the number and 0 for a varint; else where the field's bytes start and end.
    Raises `DamagedError`, also where the budget is spent.
    """
    at = start
    while at < end:
        budget.left -= 1
        if budget.left < 0:
            raise DamagedError("absurdly many fields")
        tag, at = varint(view, at, end)
        kind, number = tag & 7, tag >> 3
        if not 0 < number < 1 << 29:
            raise DamagedError(f"field number {number} at byte {at}")
        if kind == VARINT:
            value, at = varint(view, at, end)
            yield number, kind, value, 0
            continue
        if kind == BYTES:
            n, at = varint(view, at, end)
        elif kind in (FIXED64, FIXED32):
            n = 8 if kind == FIXED64 else 4
        else:
            raise DamagedError(f"wire type {kind} at byte {at}")
        if n > end - at:
            raise DamagedError(f"truncated: {n} bytes wanted at byte {at}")
        yield number, kind, at, at + n
        at += n


def varint(view: View, at: int, end: int) -> tuple[int, int]:
    """An unsigned number of at most 64 bits, and where the next byte lies."""
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise DamagedError(f"truncated number at byte {at}")
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value & ((1 << 64) - 1), at


def signed(value: int) -> int:
    """A varint as int64."""
    return value - (1 << 64) if value >> 63 else value
