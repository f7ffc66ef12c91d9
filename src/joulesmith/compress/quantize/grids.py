"""The block grids of GGUF: what values a tensor may take when stored in a given type.

A *grid* cuts every row into blocks. A block stores a few scales and one small
code per weight; a weight reads back as ``step * levels[code] + offset`` with one
step (and offset) per *group* of weights. `Grid.fit` chooses the scales,
`Grid.codes` rounds to them, `Grid.write` lays the bits out, and `pack` does all
three. Scales are always those that the file stores (float16, or the small
integers of the K-types), so an error computed here is the error of the file.

Knows no layers and no calibration. Layouts are those of ggml's ``block_*``
structures; `unpack` agrees with ``gguf.quants.dequantize`` to the bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize.scales import half
from joulesmith.errors import JoulesmithError

Bytes = NDArray[np.uint8]
Array = NDArray[np.float32] | Tensor

CHUNK = 1 << 18
"""Weights handled at a time: temporaries of this size stay in the processor's cache."""
CELLS = 1 << 12
"""Cells of a table of borders between levels, at most."""


@dataclass(frozen=True)
class Lattice:
    """The scales of a tensor, and the values that they put on offer.

    step, offset: (rows, columns / group) float32; offset is None where the type
    has none. stored: what the type writes besides codes, each (rows, blocks, ...).
    """

    step: Tensor
    offset: Tensor | None
    stored: tuple[Tensor, ...]

    def rows(self, start: int, stop: int) -> Lattice:
        """The same lattice for rows ``start:stop`` only."""
        part = None if self.offset is None else self.offset[start:stop]
        return Lattice(self.step[start:stop], part, tuple(s[start:stop] for s in self.stored))


def join(parts: list[Lattice]) -> Lattice:
    """Lattices of consecutive rows -> one lattice."""
    offsets = [p.offset for p in parts if p.offset is not None]
    return Lattice(
        torch.cat([p.step for p in parts]),
        torch.cat(offsets) if offsets else None,
        tuple(torch.cat(s) for s in zip(*(p.stored for p in parts), strict=True)),
    )


F = TypeVar("F", bound="Format")


class Format(ABC):
    """A GGUF tensor type: float32 rows in, packed rows out, and back."""

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    block: ClassVar[int]
    block_bytes: ClassVar[int]

    @property
    def affine(self) -> bool:
        """Whether groups have an offset beside their step."""
        return False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

    def fits(self, columns: int) -> bool:
        """Whether rows of this many weights cut into whole blocks."""
        return columns > 0 and columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one packed row. Raises `JoulesmithError` where blocks do not fit."""
        if not self.fits(columns):
            raise JoulesmithError(
                f"rows of {columns} weights do not cut into {self.name} blocks of "
                f"{self.block}: choose a type with a smaller block"
            )
        return columns // self.block * self.block_bytes

    def bind(self: F, w: Array, importance: Array | None = None) -> F:
        """This type with what all rows of a tensor share fixed from the whole of w.

        The type itself where rows share nothing. Whoever packs a tensor in pieces of
        rows binds first; the other methods bind to the rows they are given.
        """
        return self

    @abstractmethod
    def pack(self, w: Array, importance: Array | None = None) -> Bytes:
        """w (rows, columns) float32 -> packed (rows, row_bytes) uint8.

        importance: (columns,) or (rows, columns), >= 0, the weight of each squared
        error in the choice of scales. Raises `JoulesmithError` on NaN, infinity,
        values beyond what the type can hold, or columns that do not fit.
        """

    @abstractmethod
    def unpack(self, packed: Bytes, columns: int) -> NDArray[np.float32]:
        """Packed rows -> (rows, columns) float32, as llama.cpp reads them."""


class Cast(Format):
    """A plain float type: no blocks, no scales; importance is without effect."""

    block = 1

    dtype: ClassVar[torch.dtype]

    def pack(self, w: Array, importance: Array | None = None) -> Bytes:
        t = rows_of(w, self)
        cast = t.to(self.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise too_large(self, t)
        return cast.contiguous().view(torch.uint8).numpy()

    def unpack(self, packed: Bytes, columns: int) -> NDArray[np.float32]:
        check_packed(packed, columns, self)
        raw = torch.from_numpy(np.array(packed, dtype=np.uint8, order="C", copy=True))
        return raw.view(self.dtype).float().numpy()


class F32(Cast):
    """32-bit floats: the reference of everything else."""

    name = "F32"
    ggml_type = 0
    block_bytes = 4
    dtype = torch.float32


class F16(Cast):
    """16-bit IEEE floats."""

    name = "F16"
    ggml_type = 1
    block_bytes = 2
    dtype = torch.float16


class BF16(Cast):
    """The upper half of a 32-bit float, rounded to nearest even."""

    name = "BF16"
    ggml_type = 30
    block_bytes = 2
    dtype = torch.bfloat16


def pick(table: Tensor, index: Tensor) -> Tensor:
    """table (n,), on the processor -> its entry for each index, of any shape and on its device."""
    return table.to(index.device).index_select(0, index.reshape(-1)).view(index.shape)


class Grid(Format):
    """A block type: see the module's head."""

    group: ClassVar[int]
    """Weights that share a step."""
    levels: ClassVar[tuple[float, ...]]
    """Level of each code, ascending."""
    largest: ClassVar[float]
    """The largest magnitude that the type can hold."""
    first: ClassVar[int] = 0
    """The lowest code that rounding may give (readable codes below it stay readable)."""
    last: ClassVar[int] = -1
    """The highest such code, as an index of ``levels``."""
    free_scales: ClassVar[bool] = False
    """Whether each group owns a scale, free of its neighbours', that `storable` can snap."""

    def __init__(self) -> None:
        self._levels = torch.tensor(self.levels, dtype=torch.float32)
        self._uniform = bool(((self._levels[1:] - self._levels[:-1]) == 1).all())
        edges = (self._levels[1:] + self._levels[:-1]) / 2
        self._whole = all(float(level).is_integer() for level in self.levels)
        if self._whole:
            # the border between two whole levels is a multiple of a half: a table over
            # half-steps finds the nearest one exactly, and without a search
            self._low, self._high = int(2 * self.levels[0]), int(2 * self.levels[-1])
            cells = torch.arange(self._low, self._high + 1) / 2 + 0.25
            self._table = torch.bucketize(cells, edges).byte()
            self._level_table = self._levels[self._table.long()]
        else:
            self.set_borders(edges)

    # -- rounding -------------------------------------------------------------

    def nearest_level(self, u: Tensor) -> Tensor:
        """Multiples of the step, any shape -> the nearest level, float32."""
        if self._uniform:
            return u.round().clamp_(self.levels[self.first], self.levels[self.last])
        if not self._whole:
            return pick(self._levels, self._above(u))
        return pick(self._level_table, self._cell(u))

    def nearest_code(self, u: Tensor) -> Tensor:
        """Multiples of the step, any shape -> the nearest code, uint8."""
        if self._uniform:
            low, high = self.levels[self.first], self.levels[self.last]
            return u.round().clamp_(low, high).sub_(self.levels[0]).byte()
        if not self._whole:
            return self._above(u).byte()
        return pick(self._table, self._cell(u))

    def _cell(self, u: Tensor) -> Tensor:
        return (2 * u).floor_().clamp_(self._low, self._high).sub_(self._low).long()

    def set_borders(self, edges: Tensor) -> None:
        """edges (levels - 1,) float32, ascending: a value at a border takes the level below it.

        Cells whose width is a power of two, each with one border at most, find the level
        exactly and several times as fast as a binary search, while there are few of them.
        """
        self._edges = edges
        gap = float((edges[1:] - edges[:-1]).min()) if len(edges) > 1 else 1.0
        self._fine = 2.0 ** math.ceil(-math.log2(gap))
        cell = (edges * self._fine).floor()
        self._first, self._last = float(cell[0]), float(cell[-1])
        self._border = torch.empty(0)
        if self._last - self._first < CELLS:
            every = torch.arange(int(self._first), int(self._last) + 1, dtype=torch.float32)
            self._base = torch.bucketize(every, cell)
            self._border = torch.full_like(every, torch.inf)
            self._border[(cell - self._first).long()] = edges

    def _above(self, u: Tensor) -> Tensor:
        """How many borders lie below each u: its code, int64."""
        if not len(self._border):
            return torch.bucketize(u, self._edges.to(u.device))
        cell = (u * self._fine).floor_().clamp_(self._first, self._last).sub_(self._first).long()
        return pick(self._base, cell) + (u > pick(self._border, cell))

    def codes(self, w: Tensor, lattice: Lattice) -> Tensor:
        """w (rows, columns) -> nearest codes on the lattice, uint8 of the same shape."""
        x = w.view(w.shape[0], -1, self.group)
        if lattice.offset is not None:
            x = x - lattice.offset[:, :, None]
        step = lattice.step[:, :, None]
        u = torch.where(step == 0, torch.zeros_like(x), x / step)
        return self.nearest_code(u).view(w.shape)

    def values(self, codes: Tensor, lattice: Lattice) -> Tensor:
        """codes (rows, columns) uint8 -> float32 weights, rounded as llama.cpp rounds them."""
        flat = (
            codes.float().add_(self.levels[0]) if self._uniform else pick(self._levels, codes.int())
        )
        level = flat.view(codes.shape[0], -1, self.group)
        out = level.mul_(lattice.step[:, :, None])
        if lattice.offset is not None:
            out = out.add_(lattice.offset[:, :, None])
        return out.view(codes.shape)

    # -- scales ---------------------------------------------------------------

    @abstractmethod
    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        """Scales of one chunk of rows; arguments as in `fit`, checked and expanded."""

    def storable(self, scale: Tensor) -> Tensor:
        """The nearest step (or offset) that a group can store, where scales are free."""
        return half(scale)

    @abstractmethod
    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        """The storable lattice nearest to wanted steps and offsets, (rows, groups) each."""

    def fit(self, w: Array, importance: Array | None = None) -> Lattice:
        """Scales for w (rows, columns) that make the weighted squared error least.

        importance and errors: as in `Format.pack`. A block whose importances are
        all zero is fitted as if they were all one.
        """
        t = rows_of(w, self)
        rows, columns = t.shape
        weight = importance_of(importance, t)
        parts = []
        for start in range(0, rows, max(1, CHUNK // columns)):
            stop = min(rows, start + max(1, CHUNK // columns))
            full = balanced(weight, t, start, stop, self.group)
            parts.append(self.search(t[start:stop], full))
        return join(parts)

    # -- bytes ----------------------------------------------------------------

    @abstractmethod
    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        """codes (rows, columns) uint8 and their lattice -> packed rows."""

    @abstractmethod
    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        """Packed rows -> codes and lattice; the inverse of `write`."""

    def pack(self, w: Array, importance: Array | None = None) -> Bytes:
        t = rows_of(w, self)
        if not len(t):
            return np.empty((0, self.row_bytes(t.shape[1])), np.uint8)
        lattice = self.fit(t, importance)
        out = np.empty((t.shape[0], self.row_bytes(t.shape[1])), np.uint8)
        for start in range(0, t.shape[0], max(1, CHUNK // t.shape[1])):
            stop = min(t.shape[0], start + max(1, CHUNK // t.shape[1]))
            part = lattice.rows(start, stop)
            out[start:stop] = self.write(self.codes(t[start:stop], part), part)
        return out

    def unpack(self, packed: Bytes, columns: int) -> NDArray[np.float32]:
        check_packed(packed, columns, self)
        out = np.empty((packed.shape[0], columns), np.float32)
        for start in range(0, len(packed), max(1, CHUNK // columns)):
            stop = start + max(1, CHUNK // columns)
            out[start:stop] = self.values(*self.read(packed[start:stop], columns)).numpy()
        return out


# -- checks shared by all formats ---------------------------------------------


def rows_of(w: Array, grid: Format) -> Tensor:
    """w as a contiguous float32 tensor (rows, columns) that ``grid`` can hold, or an error."""
    t = torch.as_tensor(w).detach()
    if t.ndim != 2:
        raise JoulesmithError(f"{grid.name} packs matrices, not an array of shape {tuple(t.shape)}")
    grid.row_bytes(t.shape[1])
    t = t.to(device="cpu", dtype=torch.float32).contiguous()
    # min and max carry NaN and infinity along and need no mask in memory
    if t.numel():
        low, high = (float(v) for v in torch.aminmax(t))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise JoulesmithError(
                f"weights hold NaN or infinity: {grid.name} cannot store them; "
                "check the source model"
            )
        if max(-low, high) > getattr(grid, "largest", np.inf):
            raise too_large(grid, t)
    return t


def too_large(grid: Format, t: Tensor) -> JoulesmithError:
    """The error for a value beyond what ``grid`` holds."""
    peak = float(t.abs().max())
    return JoulesmithError(
        f"a weight of magnitude {peak:.4g} is beyond what {grid.name} can hold: "
        "keep this tensor in F32 or BF16"
    )


def check_packed(packed: Bytes, columns: int, grid: Format) -> None:
    """Raises `JoulesmithError` unless ``packed`` has the width of ``columns`` weights."""
    want = grid.row_bytes(columns)
    if packed.ndim != 2 or packed.shape[1] != want or packed.dtype != np.uint8:
        raise JoulesmithError(
            f"packed {grid.name} rows of {columns} weights are {want} bytes wide, "
            f"not an array of {packed.dtype} {packed.shape}"
        )


def importance_of(importance: Array | None, w: Tensor) -> Tensor:
    """Weights of squared errors as (1 or rows, columns) float32, checked; None: all one."""
    if importance is None:
        return torch.ones(1, w.shape[1])
    t = torch.as_tensor(importance).detach().to(dtype=torch.float32)
    if t.ndim == 1:
        t = t[None]
    if t.shape[-1] != w.shape[1] or t.shape[0] not in (1, w.shape[0]):
        raise JoulesmithError(
            f"importance of shape {tuple(t.shape)} does not belong to weights {tuple(w.shape)}"
        )
    if not bool(torch.isfinite(t).all()) or bool((t < 0).any()):
        raise JoulesmithError("importance must be finite and not negative")
    return t.contiguous()


def balanced(weight: Tensor, t: Tensor, start: int, stop: int, group: int) -> Tensor:
    """Weights of squared errors for rows ``start:stop`` of t, (rows, columns), at most 1.

    weight: as from `importance_of`. Groups whose weights are all zero count as if all one.
    """
    chunk = weight if weight.shape[0] == 1 else weight[start:stop]
    cut = chunk.view(chunk.shape[0], -1, group)
    cut = torch.where(cut.sum(-1, keepdim=True) > 0, cut, torch.ones_like(cut))
    # only ratios inside a row matter, and float32 has no room for 1e-40
    cut = cut / cut.amax((1, 2), keepdim=True)
    return cut.view(chunk.shape).expand(len(t[start:stop]), -1)


def grid(name: str) -> Format:
    """The grid called ``name`` (``"Q4_0"``, ``"BF16"``, ``"INT4-G128"``, ``"NF4-G64"`` ...).

    Raises `JoulesmithError` naming the known ones.
    """
    from joulesmith.compress.quantize import (
        codebooks,
        floats,
        fp4,
        integers,
        kquants,
        legacy,
        ternary,
    )

    own: Format | None = integers.by_name(name) or floats.by_name(name)
    if own is not None:
        return own

    known: dict[str, Format] = {c.name: c for c in (F32(), F16(), BF16())}
    known |= legacy.GRIDS
    known |= fp4.GRIDS
    known |= kquants.GRIDS
    known |= ternary.GRIDS
    known |= codebooks.GRIDS
    if name not in known:
        raise JoulesmithError(
            f"unknown tensor type {name!r}: known are {', '.join(known)}, INT4-G128, "
            "FP8-E4M3-G128, NF4-G64 and the like"
        )
    return known[name]
