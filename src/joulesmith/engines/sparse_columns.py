"""Products by matrices in which tiles of rows share their columns: the C kernel on what is left.

Zeros of whole columns, 64 rows at a time, are the ones that save time and not only bytes: a
tile's columns of the input are gathered once, and nothing is spread out. Knows no models.
"""

from __future__ import annotations

import ctypes as C

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.sparse.layouts import spans
from joulesmith.compress.sparse.tensor import SparseTensor, check, read_tile
from joulesmith.engines.packed_store import working_dtype
from joulesmith.engines.sparse_native import BLOCK, FEW, NativeSparse, share, takes
from joulesmith.errors import JoulesmithError


class NativeColumns(NativeSparse):
    """Tiles of rows that share their columns (blocks of 16, 32 or 64 rows by 1): the columns
    are gathered once a tile, and what is multiplied shrinks as the zeros grow.

    For floats, and for codes with a scale a row. Raises as `NativeSparse`, and
    `JoulesmithError` for another layout.
    """

    def __init__(self, packed: SparseTensor, *, exact: bool = False) -> None:
        if not takes_columns(packed):
            raise JoulesmithError(f"{packed.layout} {packed.kind} has no tiles of columns")
        self._height = _height(packed.layout)
        self._found: list[NDArray[np.int64]] = []
        super().__init__(packed, exact=exact)
        columns = np.zeros((len(self._found), self._blocks * BLOCK), np.int32)
        for i, found in enumerate(self._found):
            columns[i, : len(found)] = found
        self.register_buffer("at", torch.from_numpy(columns))
        self._at = columns
        self.kind = f"{packed.layout} {packed.kind}"

    def _width(self, packed: SparseTensor) -> int:
        check(packed)
        for tile in range(len(spans(packed.rows, packed.columns))):
            weight = read_tile(packed, tile)
            for strip in weight.split(self._height):  # type: ignore[no-untyped-call]
                self._found.append(np.flatnonzero((strip != 0).any(0).numpy()))
        self._next = 0
        return max(1, *(len(f) for f in self._found), 1)

    def _narrow(self, level: NDArray[np.int16]) -> NDArray[np.int16]:
        out = np.zeros((len(level), self._blocks * BLOCK), np.int16)
        for start in range(0, len(level), self._height):
            found = self._found[self._next]
            self._next += 1
            at = slice(start, start + self._height)
            out[at, : len(found)] = level[at][:, found]
        return out

    def decode(self, at: slice | Tensor) -> Tensor:
        """The weights of these rows, (n, columns) float32."""
        rows = np.arange(self.rows)[at if isinstance(at, slice) else at.numpy()]
        wide = self._blocks * BLOCK
        narrow = torch.empty(len(rows), wide)
        if isinstance(at, slice):
            self._run(at.start, at.stop, 0, 0, narrow.data_ptr())
        else:
            for i, row in enumerate(rows.tolist()):
                self._run(row, row + 1, 0, 0, narrow.data_ptr() + 4 * wide * i)
        out = torch.zeros(len(rows), self.columns)
        # places that are filled up stand for column 0: added, as they hold zeros
        where = torch.from_numpy(self._at[rows // self._height].astype(np.int64))
        return out.scatter_add_(1, where, narrow)

    def product(self, x: Tensor) -> Tensor:
        """x (n, columns) -> ``x @ weight.T`` (n, rows), in x's dtype and place."""
        if len(x) > FEW or not len(x):
            return self._many(x.cpu()).to(x.device)
        given = x.to("cpu", torch.float32).contiguous()
        out = torch.empty(len(x), self.rows)
        parts = self._parts(len(self._at))
        for first in range(0, len(x), 4):
            count = min(4, len(x) - first)
            a, b = given[first].data_ptr(), out[first].data_ptr()
            share(self._columns, parts, count, a, b)
        return out.to(x.device, x.dtype)

    def _many(self, x: Tensor) -> Tensor:
        """As `product`, a tile at a time by torch: its kernels are best at many inputs."""
        dtype = working_dtype(x)
        given = x.to(dtype)
        out = x.new_empty(len(x), self.rows)
        narrow = torch.empty(self._height, self._blocks * BLOCK)
        for tile, columns in enumerate(torch.from_numpy(self._at)):
            first = tile * self._height
            last = min(first + self._height, self.rows)
            self._run(first, last, 0, 0, narrow.data_ptr())
            weight = narrow[: last - first].to(dtype)
            out[:, first:last] = torch.nn.functional.linear(given[:, columns], weight)
        return out

    def _columns(self, start: int, stop: int, count: int, x: int, out: int) -> None:
        room = np.empty(count * 100 * self._blocks + self._groups + 4 * self._blocks, np.float32)
        self._library.joulesmith_columns(
            C.addressof(self._matrix), self._at.ctypes.data, self._height, start, stop, count, x,
            self.columns, out, self.rows, room.ctypes.data, int(self._rounds),
        )  # fmt: skip


def takes_columns(packed: SparseTensor) -> bool:
    """Whether `NativeColumns` holds such weights."""
    tall = _height(packed.layout) > 0 and takes(packed)
    return tall and (packed.grid is None or packed.grid.group == packed.columns)


def _height(name: str) -> int:
    """Rows of blocks of one column; 0 for other layouts."""
    return next((h for h in (16, 32, 64) if name == f"blocks-{h}x1"), 0)
