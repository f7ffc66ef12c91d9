"""Integer grids with a scale for each group of a row, as torch kernels and vLLM run them.

``weight = scale * (code - zero)``: symmetric (zero fixed at the middle) or asymmetric
(zero an integer of its own for each group), 2 to 8 bits, or ternary; a group is 32, 64,
128 ... neighbouring columns, or the whole row ("channel"). Scales are float16.

They are `Grid`s, so that every way of rounding works on them. No GGUF type: `write`
packs codes densely, little end first, with scales and zeros before them; exporters lay
`read`'s codes out as their engine wants them.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice
from joulesmith.compress.quantize.legacy import HALF_MAX, half_bytes, read_half
from joulesmith.errors import JoulesmithError

TERNARY = 0
"""``bits`` of the grid -1, 0, 1, which is stored in 2."""


class IntGrid(Grid):
    """bits: 2 to 8, or `TERNARY`. group: columns that share a scale. symmetric: no zeros.

    Raises `JoulesmithError` for other bits, an empty group, or asymmetric ternary.
    """

    def __init__(self, bits: int, group: int, *, symmetric: bool = True) -> None:
        if bits != TERNARY and not 2 <= bits <= 8:
            raise JoulesmithError(f"integers have 2 to 8 bits, or 0 for ternary, not {bits}")
        if group < 1:
            raise JoulesmithError(f"a group has 1 column or more, not {group}")
        if bits == TERNARY and not symmetric:
            raise JoulesmithError("ternary weights are -1, 0 and 1: symmetric only")
        self.bits = bits or 2
        self.symmetric = symmetric
        kind = f"INT{bits}" if bits else "TERNARY"
        half = 1 << (self.bits - 1)
        levels = range(-half, half) if symmetric else range(1 << bits)
        # Class variables of a GGUF type; here they are the instance's.
        vars(self).update(
            name=f"{kind}-G{group}" + ("" if symmetric else "-ZP"),
            ggml_type=-1,
            group=group,
            block=group,
            block_bytes=-(-group * self.bits // 8) + (2 if symmetric else 3),
            levels=(-1, 0, 1) if bits == TERNARY else tuple(levels),
            largest=HALF_MAX,
            free_scales=symmetric,
        )
        super().__init__()
        top = float(self.levels[-1])
        low, high = (0.55, 1.75) if self.bits <= 3 else (0.82, 1.1)
        self._landings = tuple(np.linspace(low * top, high * (top + 1), 28).tolist())

    @property
    def affine(self) -> bool:
        return not self.symmetric

    @property
    def bits_per_weight(self) -> float:
        """Codes, float16 scales, and zeros of ``bits`` bits."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group

    # -- scales ---------------------------------------------------------------

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        rows = x.shape[0]
        flat, importance = x.reshape(-1, self.group), weight.reshape(-1, self.group)
        if self.symmetric:
            step = scales.search_step(
                flat, importance, self.nearest_level, self._landings, positive=True
            )
            return self._lattice(step.view(rows, -1), None)
        step, offset = scales.search_affine(
            flat, importance, self.levels[-1], scales.half, lambda o: o, offset_at_most=None
        )
        step, zero = scales.search_zero(flat, importance, step, offset, self.levels[-1])
        return self._lattice(step.view(rows, -1), zero.view(rows, -1))

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        step = scales.half(step)
        if self.symmetric:
            return self._lattice(step, None)
        assert offset is not None
        zero = scales.safe_ratio(-offset, step).round().clamp(0, self.levels[-1])
        return self._lattice(step, zero)

    def _lattice(self, step: Tensor, zero: Tensor | None) -> Lattice:
        if zero is None:
            return Lattice(step, None, (step,))
        return Lattice(step, -zero * step, (step, zero))

    # -- bytes ----------------------------------------------------------------

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = codes.numpy().reshape(codes.shape[0], -1, self.group)
        head: list[NDArray[np.uint8]] = [half_bytes(lattice.stored[0])]
        if not self.symmetric:
            head.append(lattice.stored[1].numpy().astype(np.uint8)[..., None])
        body = pack_codes(c, self.bits)
        return np.concatenate([*head, body], axis=-1).reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(packed.shape[0], -1, self.block_bytes)
        step = read_half(raw[..., :2])
        zero = None if self.symmetric else torch.from_numpy(raw[..., 2].astype(np.float32))
        body = raw[..., 2 if self.symmetric else 3 :]
        codes = unpack_codes(body, self.bits, self.group)
        flat = np.ascontiguousarray(codes).reshape(packed.shape[0], columns)
        return torch.from_numpy(flat), self._lattice(step, zero)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> Bytes:
    """(..., n) codes below 2^bits -> (..., ceil(n bits / 8)) bytes, little end first."""
    if bits == 8:
        return codes
    apart = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(apart.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_codes(raw: Bytes, bits: int, n: int) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`: (..., bytes) -> (..., n)."""
    if bits == 8:
        return raw
    apart = np.unpackbits(raw, axis=-1, count=n * bits, bitorder="little")
    apart = apart.reshape(*raw.shape[:-1], n, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes: NDArray[np.uint8] = (apart * weights).sum(-1, dtype=np.uint8)
    return codes


_NAME = re.compile(r"(?:INT([2-8])|(TERNARY))-G(\d{1,6})(-ZP)?")


def by_name(name: str) -> IntGrid | None:
    """The grid "INT4-G128", "INT4-G128-ZP", "TERNARY-G64" ...; None for another name.

    A scale for a whole row is a group of as many columns as the row has. Raises
    `JoulesmithError` as `IntGrid` does.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    bits = TERNARY if match[2] else int(match[1])
    return IntGrid(bits, int(match[3]), symmetric=match[4] is None)
