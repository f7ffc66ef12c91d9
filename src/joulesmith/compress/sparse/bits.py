"""Whole numbers of any width up to 62 bits, laid end to end. Knows no weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from joulesmith.errors import JoulesmithError

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
MOST = 62


def packed_size(count: int, width: int) -> int:
    """Bytes of ``count`` numbers of ``width`` bits."""
    return -(-count * width // 8)


def pack_bits(values: NDArray[np.integer], width: int) -> Bytes:
    """values (n,), 0 <= value < 2^width -> ceil(n width / 8) bytes, little end first."""
    if width == 0 or not len(values):
        return np.empty(0, np.uint8)
    if width == 8:
        return values.astype(np.uint8)
    octets = values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : -(-width // 8)]
    apart = np.unpackbits(octets, axis=1, count=width, bitorder="little")
    return np.packbits(apart, bitorder="little")


def unpack_bits(raw: Bytes, width: int, count: int) -> NDArray[np.int64]:
    """The inverse of `pack_bits`: (n,) int64.

    Raises `JoulesmithError` unless ``raw`` is exactly as long as that, spare bits zero.
    """
    if not 0 <= width <= MOST or count < 0 or len(raw) != packed_size(count, width):
        raise JoulesmithError(f"{len(raw)} bytes are not {count} numbers of {width} bits")
    if width == 0 or count == 0:
        return np.zeros(count, np.int64)
    if width == 8:
        return np.asarray(raw, np.int64)
    spare = len(raw) * 8 - count * width
    if spare and raw[-1] >> (8 - spare):
        raise JoulesmithError("bits set behind the last number")
    if width in (1, 2, 4):
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        each = (raw[:, None] >> shifts) & np.uint8((1 << width) - 1)
        return np.asarray(each.reshape(-1)[:count], np.int64)
    apart = np.unpackbits(raw, count=count * width, bitorder="little").reshape(count, width)
    if width < 8:
        return np.asarray(np.packbits(apart, axis=1, bitorder="little").reshape(-1), np.int64)
    octets = np.zeros((count, 8), np.uint8)
    octets[:, : -(-width // 8)] = np.packbits(apart, axis=1, bitorder="little")
    return np.asarray(octets.view("<i8").reshape(-1), np.int64)
