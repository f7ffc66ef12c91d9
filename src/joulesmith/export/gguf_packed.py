"""A model with packed matrices as a GGUF file, integer grids included where ggml has their values.

Symmetric integers by groups of 32, 64, 128 ... are GGUF's Q4_0, Q5_0 and Q8_0 with a scale
written once for each 32 weights: the same numbers to the bit, a little larger. So one recipe
serves llama.cpp and the engines that run integers by group. Knows no calibration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from joulesmith.compress.quantize.grids import Bytes, Grid, grid
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.errors import JoulesmithError
from joulesmith.export.gguf import TensorEntry, extra_entries, float_entry, write_gguf

if TYPE_CHECKING:
    from joulesmith.models import Model

REST = "F16"
"""Type of matrices that are not packed: what the other formats store them in."""
_INTEGERS = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
_BLOCK = 32


def stored_type(kind: str) -> str | None:
    """The GGUF type that holds the values of ``kind`` exactly, None where there is none."""
    g = grid(kind)
    if g.ggml_type >= 0:
        return g.name
    if isinstance(g, IntGrid) and g.symmetric and g.name[:3] == "INT" and g.group % _BLOCK == 0:
        return _INTEGERS.get(g.bits)
    return None


def to_blocks(kind: str, packed: Bytes, columns: int) -> tuple[str, Bytes]:
    """Packed rows of ``kind`` -> the GGUF type that holds them, and its packed rows.

    Raises `JoulesmithError` for a type that GGUF has no place for, and for scales that are
    NaN or infinite.
    """
    name = stored_type(kind)
    if name is None:
        raise JoulesmithError(f"GGUF has no type for {kind}: {ADVICE}")
    if name == kind:
        return name, packed
    g, blocks = grid(kind), grid(name)
    assert isinstance(g, IntGrid) and isinstance(blocks, Grid)
    out = np.empty((len(packed), blocks.row_bytes(columns)), np.uint8)
    for start in range(0, len(packed), 1024):
        codes, lattice = g.read(packed[start : start + 1024], columns)
        if not bool(lattice.step.isfinite().all()):
            raise JoulesmithError("scales are NaN or infinite: round it again")
        step = lattice.step.repeat_interleave(g.group // _BLOCK, dim=1)
        out[start : start + 1024] = blocks.write(codes, blocks.snap(step, None))
    return name, out


ADVICE = (
    "give a GGUF type (Q4_K, Q5_0, IQ4_NL ...), or INT4, INT5 or INT8 without zeros in groups of "
    "32, 64 ..., which become Q4_0, Q5_0 and Q8_0"
)


def write_packed(
    model: Model,
    packed: Mapping[str, tuple[str, Bytes]],
    path: str | os.PathLike[str],
    *,
    provenance: Mapping[str, str] | None = None,
) -> int:
    """Write ``model`` with these matrices packed; returns the file's bytes.

    packed: GGUF name -> (type, packed rows in GGUF's order), embedding and head included. All
    other matrices are `REST`, vectors F32. Raises `JoulesmithError` as `write_gguf`, for a type
    that GGUF does not have and for weights beyond float16.
    """
    from joulesmith.models import check_dense

    check_dense(model)
    entries: list[TensorEntry] = []
    for name in model.tensors:
        if name not in packed:
            entries.append(float_entry(model, name, REST))
            continue
        kind, rows = packed[name]
        shape, stored = model.ref(name).shape, stored_type(kind)
        if stored is None:
            raise JoulesmithError(f"{name} is {kind}, which GGUF does not have: {ADVICE}")
        entries.append((name, stored, shape, _rows(kind, rows, shape[1])))
    if stray := sorted(set(packed) - set(model.tensors)):
        raise JoulesmithError(f"the model has no tensor {stray[0]!r}")
    return write_gguf(path, model.metadata, entries + extra_entries(model), provenance=provenance)


def _rows(kind: str, rows: Bytes, columns: int) -> Callable[[], Bytes]:
    return lambda: to_blocks(kind, rows, columns)[1]
