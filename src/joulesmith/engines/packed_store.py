"""A quantized matrix kept packed in memory, and products with it.

Three layouts. `Planes`: codes of an integer grid in their own width, decoded a tile of rows
at a time in plain torch operations, on any device; float32 results are those of
``grid.unpack``. `Blocks`: the bytes of any other type (GGUF's), decoded a tile at a time
by the type itself. `Kernel4`: the layout of torch's four-bit CPU kernel
(``_weight_int4pack_mm_for_cpu``, which torchao's CPU tensors call as well), for bfloat16
activations; eight-bit codes go through it as two nibbles. Never is a whole matrix decoded.

The kernel holds steps and offsets in bfloat16, so its weights are those of the grid with
steps rounded to 8 bits of mantissa: 0.2 % at worst, as a model cast to bfloat16 has.

Scales are kept as raw bits, so that ``module.to(dtype)`` leaves them alone. For
inference: no gradients. Knows no models and no files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.quantize.grids import Bytes, Format, Grid, Lattice, check_packed
from joulesmith.compress.quantize.integers import IntGrid
from joulesmith.errors import JoulesmithError

Prefer = Literal["bytes", "speed", "exact"]
"""bytes: a kernel only where it holds codes in no more bits than they have; speed: also
where codes of 2 to 7 bits must be widened to 4 or 8; exact: no kernel."""

Reader = Callable[[int, int], tuple[Tensor, Lattice]]
"""(start, stop) -> codes (rows, columns) uint8 and their lattice, of these rows."""

TILE = 1 << 18
"""Weights decoded at a time: 1 MiB of float32 stays in the processor's cache."""
_FEW = 16
"""Up to so many rows of activations, 16-bit products on a CPU are faster in float32."""
_KERNEL_ROWS = 64
"""Above so many, decoding a tile and a bfloat16 product beat the four-bit kernel."""
_KERNEL_GROUPS = (256, 128, 64, 32)
_KERNEL_BLOCK = 64


class Store(torch.nn.Module):
    """A matrix of ``rows`` by ``columns`` weights, of the type called ``kind``."""

    def __init__(self, kind: str, rows: int, columns: int) -> None:
        super().__init__()
        self.kind, self.rows, self.columns = kind, rows, columns

    def decode(self, at: slice | Tensor) -> Tensor:
        """The weights of these rows, (n, columns) float32."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x (n, columns) -> ``x @ weight.T`` (n, rows), in x's dtype."""
        dtype = working_dtype(x)
        given = x.to(dtype)
        out = x.new_empty(x.shape[0], self.rows)
        step = self._tile_rows()
        for start in range(0, self.rows, step):
            at = slice(start, min(start + step, self.rows))
            out[:, at] = torch.nn.functional.linear(given, self.decode(at).to(dtype))
        return out

    def _tile_rows(self) -> int:
        return max(1, TILE // self.columns)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.rows}, {self.columns}"


def working_dtype(x: Tensor) -> torch.dtype:
    """What a tile is multiplied in: half floats are slow on CPUs, bfloat16 for a few rows."""
    if x.device.type == "cpu" and (
        x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and x.shape[0] <= _FEW)
    ):
        return torch.float32
    return x.dtype


# -- any device: bit planes -----------------------------------------------------


class Planes(Store):
    """Codes of an `IntGrid` as planes of 8, 4, 2 and 1 bits, float16 steps, uint8 zeros.

    A plane of b bits holds column j of 8/b stretches of columns in one byte, so that
    decoding is one shift and one mask for a whole stretch.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None

    def __init__(self, grid: IntGrid, read: Reader, rows: int, columns: int) -> None:
        super().__init__(grid.name, rows, columns)
        self.bits, self.group, self.lowest = grid.bits, grid.group, grid.levels[0]
        self.widths = [w for w in (8, 4, 2, 1) if grid.bits & w]
        self._padded = -(-columns // 8) * 8
        groups = columns // grid.group
        codes = torch.empty(rows, self._padded * grid.bits // 8, dtype=torch.uint8)
        steps = torch.empty(rows, groups, dtype=torch.float16)
        zeros = None if grid.symmetric else torch.empty(rows, groups, dtype=torch.uint8)
        for start, stop in _spans(rows, columns):
            given, lattice = read(start, stop)
            codes[start:stop] = self._encode(given)
            steps[start:stop] = lattice.stored[0].reshape(stop - start, groups)
            if zeros is not None:
                zeros[start:stop] = lattice.stored[1].reshape(stop - start, groups)
        self.register_buffer("codes", codes)
        self.register_buffer("steps", steps.view(torch.int16))
        self.register_buffer("zeros", zeros)

    def _encode(self, codes: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(codes, (0, self._padded - codes.shape[1]))
        planes, taken = [], 0
        for width in self.widths:
            part = (wide >> taken) & ((1 << width) - 1)
            cut = part.view(len(codes), 8 // width, -1)
            packed = cut[:, 0].clone()
            for i in range(1, 8 // width):
                packed |= cut[:, i] << (i * width)
            planes.append(packed)
            taken += width
        return torch.cat(planes, 1)

    def _codes(self, packed: Tensor) -> Tensor:
        """Packed rows -> codes (n, columns) uint8."""
        out: Tensor | None = None
        begin = taken = 0
        for width in self.widths:
            end = begin + self._padded * width // 8
            plane, mask = packed[:, begin:end], (1 << width) - 1
            if width < 8:
                last = 8 - width
                parts = [(plane >> s) & mask for s in range(0, last, width)]
                plane = torch.cat([*parts, plane >> last], 1)
            out = plane if out is None else out.bitwise_or_(plane << taken)
            begin, taken = end, taken + width
        assert out is not None
        return out[:, : self.columns]

    def decode(self, at: slice | Tensor) -> Tensor:
        codes = self._codes(self.codes[at])
        step = self.steps[at].view(torch.float16).float()
        if self.zeros is None:
            # in the narrow type, where the subtraction costs least; it wraps as it should
            levels = (codes + self.lowest % 256).view(torch.int8)
            value = levels.float().view(len(step), -1, self.group)
        else:
            value = codes.float().view(len(step), -1, self.group)
            value -= self.zeros[at][:, :, None]
        # (code - zero) has at most 9 bits and the step 11: float32 holds the product exactly
        return value.mul_(step[:, :, None]).view(-1, self.columns)


# -- any type: its own bytes ------------------------------------------------------


class Blocks(Store):
    """Packed rows of any `Format`, decoded by the format itself on the CPU."""

    raw: Tensor

    def __init__(self, grid: Format, packed: Bytes, columns: int) -> None:
        super().__init__(grid.name, len(packed), columns)
        self._grid = grid
        own = torch.empty(packed.shape, dtype=torch.uint8)
        own.copy_(torch.from_numpy(np.asarray(packed)))
        self.register_buffer("raw", own)

    def decode(self, at: slice | Tensor) -> Tensor:
        raw = self.raw[at]
        values = self._grid.unpack(raw.cpu().numpy(), self.columns)
        return torch.from_numpy(values).to(raw.device)


# -- the CPU's four-bit kernel ------------------------------------------------------


class Kernel4(Store):
    """Codes of a uniform grid in the layout of torch's four-bit kernel.

    A weight is ``(nibble - 8) * step + offset``. Codes of more than four bits are two
    nibbles, high ones first: twice the columns, and the activations are given twice.
    Fewer levels than nibbles have are put in the middle, where offsets are least.
    """

    nibbles: Tensor
    scales: Tensor

    def __init__(self, grid: Grid, read: Reader, rows: int, columns: int) -> None:
        super().__init__(grid.name, rows, columns)
        self.parts = 1 if len(grid.levels) <= 16 else 2
        self._shift = (16**self.parts + 1 - len(grid.levels)) // 2
        self.group = next(g for g in _KERNEL_GROUPS if grid.group % g == 0)
        self._lanes = _lanes()
        padded = -(-rows // _KERNEL_BLOCK) * _KERNEL_BLOCK
        wide = self.parts * columns
        nibbles = torch.empty(padded, wide // 2, dtype=torch.uint8)
        scales = torch.zeros(wide // self.group, padded, 2, dtype=torch.bfloat16)
        for start, stop in _spans(rows, 4 * wide, multiple=_KERNEL_BLOCK):
            codes, lattice = read(start, stop)
            count = -(-(stop - start) // _KERNEL_BLOCK) * _KERNEL_BLOCK
            room = torch.zeros(count, wide, dtype=torch.int32)
            low = codes.to(torch.int32) + self._shift
            if self.parts == 2:
                room[: stop - start, :columns] = low >> 4
                low &= 15
            room[: stop - start, wide - columns :] = low
            nibbles[start : start + count] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                room, 1
            ).view(count, -1)
            scales[:, start:stop] = self._scales(grid, lattice)
        self.register_buffer("nibbles", nibbles)
        self.register_buffer("scales", scales.view(torch.int16))

    def _scales(self, grid: Grid, lattice: Lattice) -> Tensor:
        """-> (groups, rows, 2) bfloat16: steps and offsets for each run of columns."""
        step = lattice.step.float()
        middle = 8 if self.parts == 1 else 16 * 8 + 8
        offset = step * (grid.levels[0] - self._shift + middle)
        if lattice.offset is not None:
            offset = offset + lattice.offset
        if self.parts == 1:
            both = torch.stack([step, offset], -1)
        else:
            # two bfloat16 hold the offset to 16 bits: it can be larger than the weights
            first = offset.bfloat16().float()
            both = torch.cat(
                [torch.stack([16 * step, first], -1), torch.stack([step, offset - first], -1)], 1
            )
        each = both.repeat_interleave(grid.group // self.group, 1)
        return each.transpose(0, 1).bfloat16()

    def decode(self, at: slice | Tensor) -> Tensor:
        if isinstance(at, slice):
            assert at.start % _KERNEL_BLOCK == 0
            stop = -(-at.stop // _KERNEL_BLOCK) * _KERNEL_BLOCK
            cut = self.nibbles[at.start : stop].view(-1, self.nibbles.shape[1] * 2, self._lanes)
            # (blocks, columns, lanes): both halves of a block, rows brought to the front
            codes = torch.cat([cut & 15, cut >> 4], -1).transpose(1, 2)
            codes = codes.reshape(stop - at.start, -1)[: at.stop - at.start]
        else:
            block, lane = at // (2 * self._lanes), at % (2 * self._lanes)
            cut = self.nibbles.view(-1, self.nibbles.shape[1] * 2, self._lanes)
            picked = cut[block, :, lane % self._lanes]
            codes = (picked >> (4 * (lane // self._lanes))[:, None].byte()) & 15
        scales = self.scales[:, at].view(torch.bfloat16).float().transpose(0, 1)
        value = (codes.view(torch.int8) - 8).float().view(len(codes), -1, self.group)
        value = value.mul_(scales[:, :, :1]).add_(scales[:, :, 1:]).view(len(codes), -1)
        if self.parts == 1:
            return value
        return value[:, : self.columns] + value[:, self.columns :]

    def _tile_rows(self) -> int:
        return max(1, TILE // self.columns // _KERNEL_BLOCK) * _KERNEL_BLOCK

    def product(self, x: Tensor) -> Tensor:
        few = x.shape[0] <= _KERNEL_ROWS // self.parts
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not few:
            return super().product(x)
        given = (x if self.parts == 1 else torch.cat([x, x], 1)).contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            given, self.nibbles, self.group, self.scales.view(torch.bfloat16)
        )
        return out[:, : self.rows]


def kernel_takes(grid: Format, columns: int, prefer: Prefer) -> bool:
    """Whether the four-bit kernel holds this type, and ``prefer`` wants it to."""
    if prefer == "exact" or not isinstance(grid, Grid) or grid.group % _KERNEL_GROUPS[-1]:
        return False
    levels = grid.levels
    if levels[-1] - levels[0] != len(levels) - 1 or columns % grid.group:
        return False
    bits = (len(levels) - 1).bit_length()
    return (bits in (4, 8) or (prefer == "speed" and bits <= 8)) and _lanes() > 0


@functools.cache
def _lanes() -> int:
    """Rows in one half of a block of the kernel's layout here; 0 where it is of no use.

    Found by trying: the layout is torch's own affair and differs between processors. Zero
    too where the kernel does not give what its layout says, or runs without vectors.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return 0
    maker = torch.Generator().manual_seed(0)
    rows, columns = 2 * _KERNEL_BLOCK, 64
    codes = torch.randint(0, 16, (rows, columns), generator=maker, dtype=torch.int32)
    scales = torch.rand(2, rows, 2, generator=maker).bfloat16()
    x = torch.randn(3, columns, generator=maker).bfloat16()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        got = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales).float()
    except (RuntimeError, AttributeError):
        return 0
    each = scales.float().transpose(0, 1)[:, :, None]
    weight = (codes.view(rows, 2, 32) - 8) * each[..., 0] + each[..., 1]
    want = x.float() @ weight.view(rows, columns).T
    if not torch.allclose(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max())):
        return 0
    for lanes in (32, 16):
        cut = packed.view(-1, columns, lanes)
        back = torch.cat([cut & 15, cut >> 4], -1).transpose(1, 2).reshape(rows, columns)
        if torch.equal(back.int(), codes):
            return lanes
    return 0


# -- making them ------------------------------------------------------------------


def from_bytes(
    grid: Format, packed: Bytes, columns: int, dtype: torch.dtype, prefer: Prefer = "bytes"
) -> Store:
    """packed (rows, bytes a row) of any type -> the best `Store` for activations of ``dtype``.

    Raises `JoulesmithError` when the bytes are not ``columns`` weights wide, or a scale
    is not finite.
    """
    check_packed(packed, columns, grid)
    rows = len(packed)

    def read(start: int, stop: int) -> tuple[Tensor, Lattice]:
        assert isinstance(grid, Grid)
        return grid.read(packed[start:stop], columns)

    if not isinstance(grid, IntGrid) and not (
        dtype == torch.bfloat16 and kernel_takes(grid, columns, prefer)
    ):
        return Blocks(grid, packed, columns)
    assert isinstance(grid, Grid)
    return from_codes(grid, read, rows, columns, dtype, prefer)


def from_codes(
    grid: Grid,
    read: Reader,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    prefer: Prefer = "bytes",
) -> Store:
    """A `Store` of the codes that ``read`` gives, which is asked for a few rows at a time.

    Raises `JoulesmithError` for a scale that is not finite, and for a grid that is no
    `IntGrid` where the kernel does not take it.
    """

    def checked(start: int, stop: int) -> tuple[Tensor, Lattice]:
        codes, lattice = read(start, stop)
        if not bool(torch.isfinite(lattice.step).all()):
            raise JoulesmithError(f"a scale of {grid.name} is NaN or infinite: the file is damaged")
        return codes, lattice

    if dtype == torch.bfloat16 and kernel_takes(grid, columns, prefer):
        return Kernel4(grid, checked, rows, columns)
    if not isinstance(grid, IntGrid):
        raise JoulesmithError(f"{grid.name} is no integer grid: give its bytes")
    grid.row_bytes(columns)
    return Planes(grid, checked, rows, columns)


def _spans(rows: int, columns: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Row ranges of about `TILE` weights, cut at multiples of ``multiple``."""
    step = max(1, TILE // max(1, columns) // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
