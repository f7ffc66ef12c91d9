"""Four-bit floats (e2m1) under shared scales, as llama.cpp stores them: MXFP4 and NVFP4.

MXFP4: the OCP Microscaling Formats specification v1.0, section 5. NVFP4: NVIDIA's format with
a scale for 16 weights, without the second scale of the tensor. Layouts: ggml's ``block_mxfp4``
and ``block_nvfp4``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice
from joulesmith.compress.quantize.legacy import pair_nibbles, split_nibbles, spread


class MXFP4(Grid):
    """4-bit floats (e2m1) under a power of two. Codes here are ordered by value."""

    name = "MXFP4"
    ggml_type = 39
    block = 32
    group = 32
    block_bytes = 17
    levels = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
    largest = 1e18  # the type reaches further, but squares must fit float32 here

    # sign and magnitude nibble of each of our ordered codes, and back; -0 reads as 0
    _nibble = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], np.uint8)
    _order = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0], np.uint8)

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        flat, importance = x.reshape(-1, 32), weight.reshape(-1, 32)
        step = scales.search_power(flat, importance, self.nearest_level, self.levels[-1])
        return self.snap(step.view(len(x), -1), None)

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        # a byte b stands for 2^(b - 128): levels are doubled, the step is halved
        exponent = torch.log2(step.abs().clamp(min=2.0**-126)).round().clamp(-126, 126)
        return Lattice(torch.exp2(exponent), None, ((exponent + 128).to(torch.uint8),))

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = self._nibble[codes.numpy().reshape(codes.shape[0], -1, 32)]
        raw = np.concatenate([lattice.stored[0].numpy()[..., None], pair_nibbles(c)], axis=-1)
        return raw.reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(packed.shape[0], -1, 17)
        codes = self._order[split_nibbles(raw[..., 1:])].reshape(packed.shape[0], columns)
        byte = torch.from_numpy(raw[..., 0].copy())
        step = torch.ldexp(torch.ones(byte.shape), byte.to(torch.int32) - 128)
        return torch.from_numpy(codes), Lattice(step, None, (byte,))


class NVFP4(MXFP4):
    """4-bit floats, 16 of them under an unsigned 8-bit one (e4m3), four such groups a block.

    No scale of the tensor stands above the groups', so small weights lose more: below a
    hundredth steps get coarse, and below 2^-11 everything is 0. MXFP4 has no such floor.
    """

    name = "NVFP4"
    ggml_type = 40
    block = 64
    group = 16
    block_bytes = 36
    free_scales = True
    largest = 448 / 2 * 12
    landings = spread((6.6, 14.0, 16))

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        flat, importance = x.reshape(-1, 16), weight.reshape(-1, 16)
        step = scales.search_step(
            flat, importance, self.nearest_level, self.landings, self.storable, positive=True
        )
        return self.snap(step.view(len(x), -1), None)

    def storable(self, scale: Tensor) -> Tensor:
        return _step(_byte(scale))

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        byte = _byte(step)
        return Lattice(_step(byte), None, (byte,))

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        rows = codes.shape[0]
        c = pair_nibbles(self._nibble[codes.numpy().reshape(rows, -1, 4, 16)])
        heads = lattice.stored[0].numpy().reshape(rows, -1, 4)
        return np.concatenate([heads, c.reshape(rows, -1, 32)], axis=-1).reshape(rows, -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        rows = packed.shape[0]
        raw = packed.reshape(rows, -1, 36)
        codes = self._order[split_nibbles(raw[..., 4:].reshape(rows, -1, 4, 8))]
        byte = torch.from_numpy(raw[..., :4].reshape(rows, -1).copy())
        return torch.from_numpy(codes.reshape(rows, columns)), Lattice(_step(byte), None, (byte,))


def _byte(step: Tensor) -> Tensor:
    """The nearest scale, uint8: levels are doubled, so twice the step is stored."""
    small = (2 * step).clamp(0.0, 448.0).contiguous().to(torch.float8_e4m3fn)
    return small.view(torch.uint8) & 127  # a negative zero is none


def _step(byte: Tensor) -> Tensor:
    """What a byte stands for as ggml reads it: the sign not at all, NaN as 0 (and 480 under a
    sign)."""
    value = (byte & 127).contiguous().view(torch.float8_e4m3fn).float() / 2
    value = torch.where(byte == 127, torch.zeros_like(value), value)
    return torch.where(byte == 255, torch.full_like(value, 240.0), value)


GRIDS: dict[str, Grid] = {g.name: g for g in (MXFP4(), NVFP4())}
