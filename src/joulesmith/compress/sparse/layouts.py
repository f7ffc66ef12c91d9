"""The layouts by name, and which of them stores a mask in the fewest bytes.

A layout codes which weights of a matrix are stored, a few rows at a time. Knows no values.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from joulesmith.compress.sparse import blocks, nm
from joulesmith.compress.sparse.bitmask import Bitmask
from joulesmith.compress.sparse.bits import Bytes, Mask
from joulesmith.compress.sparse.gaps import Gaps
from joulesmith.errors import JoulesmithError

TILE = 1 << 16
"""Weights coded at a time, about: what packing and unpacking hold beside the matrix."""
_ROWS = 64
"""Rows of a tile are a multiple of this, so that blocks are not cut."""
GROUPED = ((1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (8, 16))
BLOCKED = ((1, 16), (16, 1), (32, 1), (64, 1), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64))


class Layout(Protocol):
    """exact: whether only weights that are not zero are stored."""

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    def keep(self, mask: Mask) -> Mask: ...
    def encode(self, kept: Mask) -> Bytes: ...
    def decode(self, raw: Bytes, rows: int, columns: int) -> Mask: ...


class Dense:
    """Every weight is stored, and no places."""

    name = "dense"
    exact = False

    def keep(self, mask: Mask) -> Mask:
        """All of them."""
        return np.ones_like(mask)

    def encode(self, kept: Mask) -> Bytes:
        """Nothing."""
        return np.empty(0, np.uint8)

    def decode(self, raw: Bytes, rows: int, columns: int) -> Mask:
        """All of them. Raises `JoulesmithError` where ``raw`` is not empty."""
        if len(raw):
            raise JoulesmithError(f"{len(raw)} bytes of places in a dense matrix")
        return np.ones((rows, columns), np.bool_)


def layout(name: str) -> Layout:
    """ "dense", "bitmask", "gaps", "2:4" and other N:M, "blocks-4x4" and other blocks.

    Raises `JoulesmithError` for another name.
    """
    for plain in (Dense, Bitmask, Gaps):
        if name == plain.name:
            return plain()
    found: Layout | None = nm.by_name(name) or blocks.by_name(name)
    if found is None:
        raise JoulesmithError(
            f"unknown sparse layout {name[:40]!r}: give dense, bitmask, gaps, 2:4 ... or "
            "blocks-4x4 ..."
        )
    return found


def tile_rows(columns: int) -> int:
    """Rows that are coded together."""
    return max(_ROWS, TILE // max(1, columns) // _ROWS * _ROWS)


def spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of each tile."""
    step = tile_rows(columns)
    return [(at, min(at + step, rows)) for at in range(0, rows, step)]


def choose(mask: Mask, bits: int) -> str:
    """Name of the layout in which ``mask`` and values of ``bits`` bits take fewest bytes.

    mask (rows, columns): which weights are not zero. Bitmask, gaps and dense are weighed
    always; N:M and blocks where the mask is of that kind.
    """
    n, count = mask.size, int(np.count_nonzero(mask))
    if not n:
        return "dense"
    tried: list[Layout] = [Gaps()]
    for pair in GROUPED:
        group = nm.NM(*pair)
        # where groups have fewer than N, the zeros that fill them up cost more than they save
        if group.fits(mask) and n // group.m * group.n <= 1.1 * count:
            tried.append(group)
    for sides in BLOCKED:
        block = blocks.Blocks(*sides)
        if int(np.count_nonzero(block.full(mask))) * sides[0] * sides[1] <= 1.1 * count:
            tried.append(block)
    found = {"dense": n * bits, "bitmask": n + count * bits}
    for one in tried:
        total = 0
        for start, stop in spans(*mask.shape):
            kept = one.keep(mask[start:stop])
            total += 8 * len(one.encode(kept)) + bits * int(np.count_nonzero(kept))
        found[one.name] = total
    return min(found, key=lambda name: found[name])
