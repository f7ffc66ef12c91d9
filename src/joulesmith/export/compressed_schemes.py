"""What the compressed-tensors format says of one layer: its tensors and its scheme.

Three layouts: integers packed into words by group ("pack-quantized", inputs left as they
are); int8 and float8 with a scale for each row, whose inputs are rounded as well
("int-quantized", "float-quantized"). Names and defaults are those that llm-compressor
writes and that the compressed-tensors library validates. Knows no models and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize.activations import InputQuantizer
from joulesmith.compress.quantize.floats import FloatGrid
from joulesmith.compress.quantize.grids import Bytes, grid
from joulesmith.compress.quantize.integers import IntGrid, pack_codes
from joulesmith.errors import JoulesmithError

ENGINE_BITS = (4, 8)
"""Widths of packed integers that all engines share, and for which they have kernels."""

Loadable = IntGrid | FloatGrid


@dataclass(frozen=True)
class Packed:
    """One matrix in torch's row order, and what rounds its inputs (None: nothing).

    packed: as its grid packs it.
    """

    grid: Loadable
    packed: Bytes
    shape: tuple[int, int]
    inputs: InputQuantizer | None

    @property
    def format(self) -> str:
        """The format's name."""
        if isinstance(self.grid, FloatGrid):
            return "float-quantized"
        return "pack-quantized" if self.inputs is None else "int-quantized"

    @property
    def by_row(self) -> bool:
        """Whether a row has one scale."""
        return self.grid.group == self.shape[1]


def loadable(kind: str) -> Loadable | None:
    """The grid of that name where engines have kernels for it, else None."""
    g = grid(kind)
    if (isinstance(g, FloatGrid) and g.in_folders) or (
        isinstance(g, IntGrid) and g.bits in ENGINE_BITS
    ):
        return g
    return None


def check(name: str, p: Packed) -> None:
    """Raises `JoulesmithError` for what no engine loads."""
    q = p.inputs
    if isinstance(p.grid, FloatGrid):
        if not p.by_row:
            raise JoulesmithError(
                f"{name} is {p.grid.name}: engines load FP8 with a scale a row: give FP8"
            )
        if q is None or q.scheme.kind != "fp8":
            raise JoulesmithError(f"{name} is {p.grid.name}: its inputs must be FP8 too")
    elif q is not None:
        if not (p.by_row and p.grid.bits == 8 and p.grid.symmetric):
            raise JoulesmithError(
                f"{name} is {p.grid.name}: with rounded inputs engines load INT8 with a scale a "
                f"row and no zeros (INT8-G{p.shape[1]})"
            )
        if q.scheme.kind != "int8":
            raise JoulesmithError(f"{name} is {p.grid.name}: its inputs must be int8 too")


def tensors_of(p: Packed) -> dict[str, Tensor]:
    """What the file holds of one layer, by the name behind the module's."""
    if isinstance(p.grid, FloatGrid):
        weight, scale = p.grid.stored(p.packed, p.shape[1])
        parts = {"weight": weight.contiguous(), "weight_scale": _half(scale)}
    else:
        codes, lattice = p.grid.read(p.packed, p.shape[1])
        zero = None if p.grid.symmetric else lattice.stored[1]
        if p.inputs is None:
            parts = _words_of(p.grid, codes.numpy(), lattice.step, zero)
        else:
            signed = (codes.to(torch.int16) - 128).to(torch.int8)
            parts = {"weight": signed, "weight_scale": _half(lattice.step)}
    q = p.inputs
    if q is not None and q.scale is not None:
        parts["input_scale"] = _half(torch.tensor([q.scale]))
        if q.zero is not None:
            parts["input_zero_point"] = torch.tensor([q.zero]).to(torch.int8)
    return parts


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).contiguous()


def _words_of(
    g: IntGrid, codes: NDArray[np.uint8], step: Tensor, zero: Tensor | None
) -> dict[str, Tensor]:
    parts = {
        "weight_packed": words(codes, g.bits),
        "weight_scale": _half(step),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        rows = words(np.ascontiguousarray(zero.numpy().astype(np.uint8).T), g.bits)
        parts["weight_zero_point"] = rows.T.contiguous()
    return parts


def words(codes: NDArray[np.uint8], bits: int) -> Tensor:
    """(rows, n) codes -> (rows, ceil(n bits / 32)) int32, from the low bits up."""
    n = -(-codes.shape[1] * bits // 32) * 32 // bits
    wide = np.zeros((codes.shape[0], n), np.uint8)
    wide[:, : codes.shape[1]] = codes
    raw = np.ascontiguousarray(pack_codes(wide, bits))
    return torch.from_numpy(raw.view("<i4").astype(np.int32))


def scheme_of(p: Packed) -> dict[str, Any]:
    """One entry of ``config_groups``, without its targets."""
    weights: dict[str, Any] = {
        "num_bits": 8 if isinstance(p.grid, FloatGrid) else p.grid.bits,
        "type": "float" if isinstance(p.grid, FloatGrid) else "int",
        "symmetric": not isinstance(p.grid, IntGrid) or p.grid.symmetric,
        "dynamic": False,
    }
    if p.format == "pack-quantized":
        weights |= {"strategy": "group", "group_size": p.grid.group}
    else:
        weights |= {"strategy": "channel", "group_size": None}
    return {
        "weights": weights,
        "input_activations": None if p.inputs is None else _input_scheme(p.inputs),
        "output_activations": None,
    }


def _input_scheme(q: InputQuantizer) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float" if q.scheme.kind == "fp8" else "int",
        "symmetric": q.scheme.symmetric,
        "strategy": "token" if q.scheme.dynamic else "tensor",
        "group_size": None,
        "dynamic": q.scheme.dynamic,
    }
