"""Which weights are stored: one bit each, in row order.

At half zeros that is what the positions are worth, log2 C(n, nonzero) bits; at other shares
it is more (`gaps`). Knows no values.
"""

from __future__ import annotations

import numpy as np

from joulesmith.compress.sparse.bits import Bytes, Mask
from joulesmith.errors import JoulesmithError


class Bitmask:
    """``rows * columns`` bits, little end first, filled up to a byte."""

    name = "bitmask"
    exact = True

    def keep(self, mask: Mask) -> Mask:
        """The weights that will be stored: those that are not zero."""
        return mask

    def encode(self, kept: Mask) -> Bytes:
        """kept (rows, columns) -> ceil(rows columns / 8) bytes."""
        return np.packbits(kept.reshape(-1), bitorder="little")

    def decode(self, raw: Bytes, rows: int, columns: int) -> Mask:
        """The inverse of `encode`. Raises `JoulesmithError` for another length, or bits
        behind the last weight."""
        n = rows * columns
        if len(raw) != -(-n // 8):
            raise JoulesmithError(f"a mask of {len(raw)} bytes for {n} weights")
        found = np.unpackbits(raw, bitorder="little")
        if found[n:].any():
            raise JoulesmithError(f"a mask with bits behind its {n} weights")
        return found[:n].view(np.bool_).reshape(rows, columns)
