"""A matrix with many zeros, packed: places of the weights that are stored, and their values.

Values are floats in two or four bytes, or codes of an integer grid in as many bits as there
are levels, with the grid's scales beside them: pruned and quantized is
``bits * nonzero + places``. Places are coded by a layout (`layouts`), tile by tile of some
rows, so that rows can be read alone and nothing of the matrix's size is held beside it.
Functions of tensors: inputs stay as they are. Knows no models and no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from joulesmith.compress.quantize import integers
from joulesmith.compress.quantize.grids import Lattice, check_packed
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.compress.sparse.bits import Bytes, Mask, pack_bits, unpack_bits
from joulesmith.compress.sparse.layouts import choose, layout, spans, tile_rows
from joulesmith.errors import JoulesmithError

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
WIDEST = 1 << 22
"""Columns at most: a tile of rows has to fit in memory, whatever a file says."""


@dataclass(frozen=True)
class SparseTensor:
    """A packed matrix (`pack`, `pack_codes`).

    rows, columns: of the matrix. layout: its name. kind: "F16", "BF16", "F32" or the name of
    an `IntGrid`. index (tiles, 2) int32: bytes of places and stored values of each tile.
    places, values: uint8, one tile after the other. steps (rows, groups) float16 and zeros
    (rows, groups) uint8: of the grid, None where it has none.
    """

    rows: int
    columns: int
    layout: str
    kind: str
    index: NDArray[np.int32]
    places: Bytes
    values: Bytes
    steps: NDArray[np.float16] | None = None
    zeros: NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (getattr(self, f.name) for f in fields(self))
        return sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))

    @property
    def stored(self) -> int:
        """How many values are stored."""
        return int(self.index[:, 1].sum(dtype=np.int64))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(tiles + 1, 2): where each tile's places and values begin, in bytes."""
        count = self.index[:, 1].astype(np.int64)
        ends = np.cumsum(np.stack([self.index[:, 0], -(-count * self.bits // 8)], 1), 0)
        return np.concatenate([np.zeros((1, 2), np.int64), ends])

    @cached_property
    def grid(self) -> IntGrid | None:
        """The integer grid of the values; None for floats."""
        return None if self.kind in FLOATS else _grid(self.kind)

    @cached_property
    def bits(self) -> int:
        """Of one stored value."""
        if self.grid is None:
            return FLOATS[self.kind].itemsize * 8
        return value_bits(self.grid, exact=layout(self.layout).exact)


def information_bytes(size: int, nonzero: int, bits: float) -> float:
    """What a matrix is worth whose zeros are anywhere: log2 C(size, nonzero) bits for the
    places, and ``bits`` for each of ``nonzero`` values. In bytes; scales come on top."""
    logs = gammaln(size + 1) - gammaln(nonzero + 1) - gammaln(size - nonzero + 1)
    return float(logs / math.log(2) + nonzero * bits) / 8


def value_bits(grid: IntGrid, *, exact: bool = True) -> int:
    """Bits of a stored code: where zeros are not stored, no code is needed for zero."""
    levels = len(grid.levels) - (1 if exact else 0)
    return max(1, (levels - 1).bit_length())


def least_kind(weight: Tensor) -> str:
    """The smallest of F16, BF16, F32 that holds these float weights exactly; their own first."""
    for kind in ("BF16", "F16") if weight.dtype == torch.bfloat16 else ("F16", "BF16"):
        if torch.equal(weight.to(FLOATS[kind]).float(), weight.float()):
            return kind
    return "F32"


def pack(weight: Tensor, name: str | None = None, *, kind: str | None = None) -> SparseTensor:
    """weight (rows, columns), float, on any device -> packed.

    name: the layout; None: the smallest (`layouts.choose`). kind: F16, BF16 or F32; None: the
    smallest that is exact. Zeros lose their sign; all else reads back bit for bit in ``kind``.
    Raises `JoulesmithError` for weights that are no matrix, not finite, not exact in
    ``kind``, or not of the layout's pattern (N:M).
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise JoulesmithError(f"a sparse matrix has two dimensions, not {tuple(weight.shape)}")
    w = weight.detach().cpu()
    kind = kind or least_kind(w)
    if kind not in FLOATS:
        raise JoulesmithError(f"unknown float type {kind[:20]!r}: give F16, BF16 or F32")
    cast = w.to(FLOATS[kind])
    if not bool(torch.isfinite(cast).all()) or not torch.equal(cast.to(w.dtype), w):
        raise JoulesmithError(f"weights that {kind} does not hold exactly")
    mask: Mask = (cast != 0).numpy()
    rows, columns = mask.shape
    _bounded(rows, columns)
    name = name or choose(mask, cast.element_size() * 8)
    # as integers: numpy has no bfloat16
    raw = cast.contiguous().view(torch.int32 if kind == "F32" else torch.int16).numpy()
    raw = np.where(mask, raw, 0)
    index, places, values = _tiles(mask, name, lambda at, kept: raw[at][kept].view(np.uint8))
    return SparseTensor(rows, columns, name, kind, index, places, values)


def pack_codes(grid: IntGrid, packed: Bytes, columns: int, name: str | None = None) -> SparseTensor:
    """packed (rows, bytes a row) of an integer grid -> the same codes without the zeros.

    A weight is zero where its code is: the middle one, or its group's zero point. name: as
    `pack`. Raises `JoulesmithError` where the bytes are not ``columns`` wide, or the codes
    not of the layout's pattern.
    """
    check_packed(packed, columns, grid)
    codes, lattice = grid.read(np.asarray(packed), columns)
    level = codes.numpy()
    steps = lattice.stored[0].numpy().astype(np.float16)
    zeros = None if grid.symmetric else lattice.stored[1].numpy().astype(np.uint8)
    zero = _zero_codes(grid, zeros, len(level), columns)
    mask: Mask = level != zero
    exact_bits = value_bits(grid)
    name = name or choose(mask, exact_bits)
    exact = layout(name).exact
    bits = value_bits(grid, exact=exact)
    if exact:
        level = level - (level > zero)
    index, places, values = _tiles(mask, name, lambda at, kept: pack_bits(level[at][kept], bits))
    return SparseTensor(len(mask), columns, name, grid.name, index, places, values, steps, zeros)


def _bounded(rows: int, columns: int) -> None:
    if rows < 0 or not 0 < columns <= WIDEST:
        raise JoulesmithError(f"a matrix of {rows} x {columns} is not packed here")


def _tiles(mask: Mask, name: str, read: object) -> tuple[NDArray[np.int32], Bytes, Bytes]:
    """(index, places, values) of all tiles; read: (rows, kept) -> bytes of the values."""
    form, take = layout(name), read
    assert callable(take)
    index, places, values = [], [np.empty(0, np.uint8)], [np.empty(0, np.uint8)]
    for start, stop in spans(*mask.shape):
        kept = form.keep(mask[start:stop])
        places.append(form.encode(kept))
        values.append(take(slice(start, stop), kept))
        index.append((len(places[-1]), int(np.count_nonzero(kept))))
    table = np.array(index, np.int32).reshape(-1, 2)
    return table, np.concatenate(places), np.concatenate(values)


def unpack(p: SparseTensor) -> Tensor:
    """The matrix, (rows, columns), in the float type of ``kind``; float32 for a grid.

    Raises `JoulesmithError` for a packed matrix that cannot be (`check`, `read_tile`).
    """
    check(p)
    out = torch.empty(p.rows, p.columns, dtype=FLOATS.get(p.kind, torch.float32))
    for i, (start, stop) in enumerate(spans(p.rows, p.columns)):
        out[start:stop] = read_tile(p, i)
    return out


def unpack_codes(p: SparseTensor) -> Bytes:
    """The grid's own packed rows, as `pack_codes` was given them.

    Raises `JoulesmithError` for floats, and as `unpack` does.
    """
    check(p)
    if p.grid is None:
        raise JoulesmithError(f"{p.kind} weights have no codes")
    parts = [
        p.grid.write(torch.from_numpy(_codes(p, i)), _lattice(p, start, stop))
        for i, (start, stop) in enumerate(spans(p.rows, p.columns))
    ]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.uint8)


def check(p: SparseTensor) -> None:
    """Raises `JoulesmithError` where sizes do not belong together or scales are not finite.

    What is inside the places is checked as it is read.
    """
    _bounded(p.rows, p.columns)
    # counted, not listed: rows may be anything yet
    form, tiles = layout(p.layout), -(-p.rows // tile_rows(p.columns))
    if p.index.shape != (tiles, 2) or p.index.dtype != np.int32 or (p.index < 0).any():
        raise JoulesmithError(f"an index of {p.index.shape} for {tiles} tiles")
    # the layout's columns fit, before any memory is taken by them
    if hasattr(form, "m") and p.columns % form.m:
        raise JoulesmithError(f"{p.columns} columns do not cut into groups of {form.m}")
    rows = np.array([stop - start for start, stop in spans(p.rows, p.columns)], np.int64)
    if (p.index[:, 1] > rows * p.columns).any():
        raise JoulesmithError("more values in a tile than it has weights")
    want = tuple(p.starts[-1])
    if (len(p.places), len(p.values)) != want:
        raise JoulesmithError(
            f"{len(p.places)} and {len(p.values)} bytes of places and values, not {want[0]} and "
            f"{want[1]}"
        )
    if p.grid is None:
        if p.steps is not None or p.zeros is not None:
            raise JoulesmithError(f"{p.kind} weights with scales")
        return
    if p.columns % p.grid.group:
        raise JoulesmithError(f"{p.columns} columns do not cut into {p.kind} groups")
    shape = (p.rows, p.columns // p.grid.group)
    if p.steps is None or p.steps.shape != shape or not np.isfinite(p.steps).all():
        raise JoulesmithError(f"{p.kind} without {shape} finite scales")
    if (p.zeros is None) != p.grid.symmetric:
        raise JoulesmithError(f"{p.kind} with zeros missing, or where it has none")
    if p.zeros is not None and (
        p.zeros.shape != shape or p.zeros.max(initial=0) > p.grid.levels[-1]
    ):
        raise JoulesmithError(f"zeros that {p.kind} does not have")


def read_tile(p: SparseTensor, tile: int) -> Tensor:
    """The weights of one tile (`layouts.tile_rows` rows of a checked matrix), as `unpack`.

    Raises `JoulesmithError` for places or values that cannot be.
    """
    start, stop = _span(p, tile)
    if p.grid is not None:
        level = torch.from_numpy(read_levels(p, tile)).float()
        step = _lattice(p, start, stop).step[:, :, None]
        # at most 9 bits times 11: float32 holds the product exactly
        return (level.view(stop - start, -1, p.grid.group) * step).view(stop - start, p.columns)
    kept, raw = _kept(p, tile)
    kind = FLOATS[p.kind]
    out = np.zeros(kept.shape, np.int32 if p.kind == "F32" else np.int16)
    out[kept] = raw.view(out.dtype)
    found = torch.from_numpy(out).view(kind)
    if not bool(torch.isfinite(found).all()):
        raise JoulesmithError("weights that are NaN or infinite")
    return found


def read_levels(p: SparseTensor, tile: int) -> NDArray[np.int16]:
    """(rows of the tile, columns): how many steps each weight of a grid is, 0 for zeros.

    Raises `JoulesmithError` as `read_tile` does.
    """
    assert p.grid is not None
    start, stop = _span(p, tile)
    zeros = None if p.zeros is None else p.zeros[start:stop]
    zero = _zero_codes(p.grid, zeros, stop - start, p.columns)
    return _codes(p, tile).astype(np.int16) - zero


def _span(p: SparseTensor, tile: int) -> tuple[int, int]:
    step = tile_rows(p.columns)
    return tile * step, min((tile + 1) * step, p.rows)


def _kept(p: SparseTensor, tile: int) -> tuple[Mask, Bytes]:
    """Which weights of a tile are stored, and the bytes of their values."""
    start, stop = _span(p, tile)
    begin, end = p.starts[tile], p.starts[tile + 1]
    kept = layout(p.layout).decode(p.places[begin[0] : end[0]], stop - start, p.columns)
    count = int(p.index[tile, 1])
    if int(np.count_nonzero(kept)) != count:
        raise JoulesmithError(f"{int(np.count_nonzero(kept))} places for {count} values")
    return kept, p.values[begin[1] : end[1]]


def _codes(p: SparseTensor, tile: int) -> NDArray[np.uint8]:
    """(rows of the tile, columns): the grid's codes, zeros put back."""
    assert p.grid is not None
    kept, raw = _kept(p, tile)
    start, stop = _span(p, tile)
    zeros = None if p.zeros is None else p.zeros[start:stop]
    zero = _zero_codes(p.grid, zeros, stop - start, p.columns)
    given = unpack_bits(raw, p.bits, int(p.index[tile, 1])).astype(np.uint8)
    out = np.broadcast_to(zero, kept.shape).astype(np.uint8)
    if layout(p.layout).exact:
        given = given + (given >= out[kept])
    if len(given) and int(given.max()) >= len(p.grid.levels):
        raise JoulesmithError(f"a code that {p.kind} does not have")
    out[kept] = given
    return out


def _zero_codes(
    grid: IntGrid, zeros: NDArray[np.uint8] | None, rows: int, columns: int
) -> NDArray[np.uint8]:
    """The code of weight zero, for each weight or for all: shapes (rows, columns) or (1, 1)."""
    if zeros is None:
        return np.array([[-grid.levels[0]]], np.uint8)
    return zeros.repeat(grid.group, 1).reshape(rows, columns)


def _lattice(p: SparseTensor, start: int, stop: int) -> Lattice:
    assert p.steps is not None
    step = torch.from_numpy(p.steps[start:stop].astype(np.float32))
    if p.zeros is None:
        return Lattice(step, None, (step,))
    zero = torch.from_numpy(p.zeros[start:stop].astype(np.float32))
    return Lattice(step, -zero * step, (step, zero))


def _grid(kind: str) -> IntGrid:
    found = integers.by_name(kind)
    if found is None:
        raise JoulesmithError(f"unknown type of weights {kind[:40]!r}")
    return found
