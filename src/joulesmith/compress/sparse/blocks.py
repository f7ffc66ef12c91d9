"""Which weights are stored: whole blocks of rows by columns that hold one at least.

The places of blocks are coded as those of weights are (`gaps`). Knows no values.
"""

from __future__ import annotations

import re

import numpy as np

from joulesmith.compress.sparse.bits import Bytes, Mask
from joulesmith.compress.sparse.gaps import Gaps
from joulesmith.errors import JoulesmithError

SIDES = (1, 2, 4, 8, 16, 32, 64)


class Blocks:
    """Blocks of ``height`` rows by ``width`` columns; the last ones may stick out.

    Raises `JoulesmithError` for sides other than 1, 2, 4 ... 64.
    """

    exact = False

    def __init__(self, height: int, width: int) -> None:
        if height not in SIDES or width not in SIDES:
            raise JoulesmithError(f"blocks of {height} x {width}: give sides of {SIDES}")
        self.height, self.width, self.name = height, width, f"blocks-{height}x{width}"

    def full(self, mask: Mask) -> Mask:
        """mask (rows, columns) -> which blocks hold a weight."""
        rows, columns = mask.shape
        down, across = -(-rows // self.height), -(-columns // self.width)
        wide = np.zeros((down * self.height, across * self.width), np.bool_)
        wide[:rows, :columns] = mask
        cut = wide.reshape(down, self.height, across, self.width)
        return np.asarray(cut.any((1, 3)), np.bool_)

    def _spread(self, full: Mask, rows: int, columns: int) -> Mask:
        wide = full.repeat(self.height, 0).repeat(self.width, 1)
        return np.ascontiguousarray(wide[:rows, :columns])

    def keep(self, mask: Mask) -> Mask:
        """mask (rows, columns) -> all weights of the blocks that hold one."""
        return self._spread(self.full(mask), *mask.shape)

    def encode(self, kept: Mask) -> Bytes:
        """kept (rows, columns), of whole blocks -> bytes."""
        return Gaps().encode(self.full(kept))

    def decode(self, raw: Bytes, rows: int, columns: int) -> Mask:
        """The inverse of `encode`. Raises `JoulesmithError` as `Gaps.decode` does."""
        down, across = -(-rows // self.height), -(-columns // self.width)
        return self._spread(Gaps().decode(raw, down, across), rows, columns)


def by_name(name: str) -> Blocks | None:
    """The layout "blocks-16x1" ...; None for another name."""
    match = re.fullmatch(r"blocks-(\d{1,2})x(\d{1,2})", name)
    return None if match is None else Blocks(int(match[1]), int(match[2]))
