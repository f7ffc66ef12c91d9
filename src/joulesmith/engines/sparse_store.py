"""A pruned matrix kept packed in memory (`compress.sparse`), and products with it.

`SparseStore` saves memory, not time: a tile of rows is decoded for each product, on the CPU.
`fastest` takes `sparse_native` instead where that runs. Knows no models and no files.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.sparse.layouts import spans, tile_rows
from joulesmith.compress.sparse.tensor import SparseTensor, check, read_tile
from joulesmith.engines import sparse_columns, sparse_native
from joulesmith.engines.packed_store import Store


class SparseStore(Store):
    """A `SparseTensor` as a `Store` of the packed torch modules.

    Raises `JoulesmithError` for a packed matrix that cannot be: every tile is read once, so
    that damage is told when a model loads and not while it runs.
    """

    def __init__(self, packed: SparseTensor) -> None:
        super().__init__(f"{packed.layout} {packed.kind}", packed.rows, packed.columns)
        check(packed)
        for tile in range(len(spans(packed.rows, packed.columns))):
            read_tile(packed, tile)
        given = {f.name: getattr(packed, f.name) for f in fields(packed)}
        # buffers, so that they are counted; their numpy views are what is read
        for name in ("index", "places", "values", "steps", "zeros"):
            array = given[name]
            if array is not None and name == "steps":
                array = array.view(np.int16)  # module.to(dtype) leaves integers alone
            self.register_buffer(name, None if array is None else torch.from_numpy(array))
        self._packed = packed

    def _apply(self, fn: object, recurse: bool = True) -> SparseStore:
        """Packed bytes stay on the CPU as they are, whatever the model is moved to."""
        return self

    def decode(self, at: slice | Tensor) -> Tensor:
        """The weights of these rows, (n, columns) float32."""
        step = tile_rows(self.columns)
        if isinstance(at, slice):
            assert at.start % step == 0
            tiles = range(at.start // step, -(-at.stop // step))
            found = [read_tile(self._packed, t) for t in tiles]
            return (found[0] if len(found) == 1 else torch.cat(found)).float()
        out = torch.empty(len(at), self.columns)
        place = torch.div(at, step, rounding_mode="floor")
        for tile in sorted(set(place.tolist())):
            here = place == tile
            out[here] = read_tile(self._packed, tile)[at[here] - tile * step].float()
        return out

    def product(self, x: Tensor) -> Tensor:
        """x (n, columns) -> ``x @ weight.T`` (n, rows), in x's dtype and place."""
        return super().product(x.cpu()).to(x.device)

    def _tile_rows(self) -> int:
        return tile_rows(self.columns)


def fastest(packed: SparseTensor) -> Store:
    """The store whose products are fastest here and hold few bytes.

    That is the kernel for codes and 16-bit floats where it can be built, unless its bitmask
    takes more than the layout by half; else `SparseStore`. Raises `JoulesmithError` for a
    packed matrix that cannot be.
    """
    mask = packed.rows * packed.columns // 8
    heavy = 2 * (len(packed.values) + mask) > 3 * (len(packed.values) + len(packed.places))
    if sparse_columns.takes_columns(packed) and sparse_native.why_not() is None:
        return sparse_columns.NativeColumns(packed)
    if sparse_native.takes(packed) and not heavy and sparse_native.why_not() is None:
        return sparse_native.NativeSparse(packed)
    return SparseStore(packed)
