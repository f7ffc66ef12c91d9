"""Super-blocks of 256 weights with small-integer scales: Q2_K ... Q6_K and IQ4_XS.

A super-block stores one float16 scale (and one for minima); each of its groups
stores an integer that multiplies it. Both roundings happen here before any code
is chosen. Layouts: ggml's ``block_q2_K`` ... ``block_q6_K``, ``block_iq4_xs``.
"""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice
from joulesmith.compress.quantize.legacy import (
    HALF_MAX,
    IQ4_NL,
    half_bytes,
    pair_nibbles,
    read_half,
    split_nibbles,
)

Raw = NDArray[Any]  # uint8 throughout; numpy's stubs lose the width on shifts
ROUNDS = 2
"""Passes of polishing the integers, then the two float16 scales."""


class _KGrid(Grid):
    """``step = d * s`` with integer s, and ``offset = -dmin * m`` where minima exist.

    stored: (d, s) or (d, s, dmin, m); d, dmin (rows, blocks); s, m (rows, blocks, groups).
    """

    block = 256
    has_minimum: ClassVar[bool]
    scale_range: ClassVar[tuple[int, int]]
    landings: ClassVar[tuple[float, ...]] = ()

    @property
    def affine(self) -> bool:
        return self.has_minimum

    # -- scales ---------------------------------------------------------------

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        n = self.block // self.group
        shape = (x.shape[0], -1, n)
        flat = x.reshape(-1, self.group)
        importance = weight.reshape(-1, self.group)
        keep = _as_is
        if self.has_minimum:
            step, offset = scales.search_affine(
                flat, importance, self.levels[-1], keep, keep, offset_at_most=0.0
            )
            start = self.snap(step.view(x.shape[0], -1), offset.view(x.shape[0], -1))
        else:
            step = scales.search_step(flat, importance, self.nearest_level, self.landings, keep)
            start = self.snap(step.view(x.shape[0], -1), None)
        stored = [s.reshape(-1, *s.shape[2:]) for s in start.stored]
        tall = (flat.view(-1, n, self.group), importance.view(-1, n, self.group))
        for _ in range(ROUNDS):
            stored = self._polish_integers(*tall, stored)
            stored = self._polish_halves(*tall, stored)
        return self._lattice([s.view(*shape[:2], *s.shape[1:]) for s in stored])

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        n = self.block // self.group
        low, high = self.scale_range
        step = step.view(step.shape[0], -1, n)
        if self.has_minimum:
            assert offset is not None
            d, s = _two_level(step.clamp(min=0), high)
            dmin, m = _two_level((-offset.view(step.shape)).clamp(min=0), high)
            return self._lattice([d, s, dmin, m])
        # the largest step lands on the end of the range that reaches furthest
        peak = step.gather(2, step.abs().argmax(2, keepdim=True))
        d = scales.half(peak / low)
        s = scales.safe_ratio(step, d).round().clamp(low, high)
        return self._lattice([d.squeeze(2), s])

    def _lattice(self, stored: list[Tensor]) -> Lattice:
        rows = stored[0].shape[0]
        step = (stored[0][..., None] * stored[1]).reshape(rows, -1)
        offset = -(stored[2][..., None] * stored[3]).reshape(rows, -1) if self.has_minimum else None
        return Lattice(step, offset, tuple(stored))

    def _losses(
        self, x: Tensor, weight: Tensor, stored: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> levels (blocks, groups, group), errors (blocks, groups), step-free offset."""
        step = (stored[0][:, None] * stored[1])[..., None]
        offset = torch.zeros_like(step)
        if self.has_minimum:
            offset = -(stored[2][:, None] * stored[3])[..., None]
        level = self.nearest_level(scales.safe_ratio(x - offset, step))
        return level, (weight * (x - step * level - offset).square()).sum(-1), offset

    def _polish_integers(self, x: Tensor, weight: Tensor, stored: list[Tensor]) -> list[Tensor]:
        """Each group takes the best of its integers' neighbours."""
        low, high = self.scale_range
        best = self._losses(x, weight, stored)[1]
        start = list(stored)
        moves = product((-1, 0, 1), (-1, 0, 1) if self.has_minimum else (0,))
        for ds, dm in moves:
            if ds == dm == 0:
                continue
            tried = list(start)
            tried[1] = (start[1] + ds).clamp(low, high)
            if self.has_minimum:
                tried[3] = (start[3] + dm).clamp(0, high)
            error = self._losses(x, weight, tried)[1]
            better = error < best
            best = torch.where(better, error, best)
            for i in (1, 3) if self.has_minimum else (1,):
                stored[i] = torch.where(better, tried[i], stored[i])
        return stored

    def _polish_halves(self, x: Tensor, weight: Tensor, stored: list[Tensor]) -> list[Tensor]:
        """Least squares for d (and dmin) given codes and integers; kept where it helps."""
        level, error, _ = self._losses(x, weight, stored)
        a = stored[1][..., None] * level
        axes = (1, 2)
        aa = (weight * a * a).sum(axes)
        ax = (weight * a * x).sum(axes)
        tried = list(stored)
        if self.has_minimum:
            b = stored[3][..., None].expand_as(a)
            ab, bb = (weight * a * b).sum(axes), (weight * b * b).sum(axes)
            bx = (weight * b * x).sum(axes)
            det = aa * bb - ab * ab
            sound = det > 1e-6 * aa * bb
            d = torch.where(
                sound, scales.safe_ratio(ax * bb - bx * ab, det), scales.safe_ratio(ax, aa)
            )
            dmin = torch.where(
                sound, scales.safe_ratio(ax * ab - bx * aa, det), torch.zeros_like(d)
            )
            tried[0], tried[2] = scales.half(d.clamp(min=0)), scales.half(dmin.clamp(min=0))
        else:
            tried[0] = scales.half(scales.safe_ratio(ax, aa))
        better = self._losses(x, weight, tried)[1].sum(1) < error.sum(1)
        for i in (0, 2) if self.has_minimum else (0,):
            stored[i] = torch.where(better, tried[i], stored[i])
        return stored

    # -- bytes ----------------------------------------------------------------

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = codes.numpy().reshape(codes.shape[0], -1, self.block)
        return self._write(c, *lattice.stored).reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        codes, stored = self._read(packed.reshape(packed.shape[0], -1, self.block_bytes))
        flat = np.ascontiguousarray(codes).reshape(packed.shape[0], columns)
        return torch.from_numpy(flat), self._lattice(stored)

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        raise NotImplementedError

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        raise NotImplementedError


def _as_is(x: Tensor) -> Tensor:
    return x


def _two_level(x: Tensor, high: int) -> tuple[Tensor, Tensor]:
    d = scales.half(x.amax(2, keepdim=True) / high)
    return d.squeeze(2), scales.safe_ratio(x, d).round().clamp(0, high)


def _small(x: Tensor) -> Raw:
    return x.numpy().astype(np.int16).astype(np.uint8)


def _floats(x: Raw) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))


def _planes(c: Raw, bits: int) -> Raw:
    """(..., n, width) small codes -> (..., width): code k shifted left by k * bits."""
    out = np.zeros(c.shape[:-2] + c.shape[-1:], np.uint8)
    for k in range(c.shape[-2]):
        out |= c[..., k, :] << np.uint8(k * bits)
    return out


def _unplanes(raw: Raw, bits: int) -> Raw:
    """The inverse of `_planes`: (..., width) -> (..., 8 / bits, width)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes: Raw = (raw[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)
    return planes


def _write_six(s: Tensor, m: Tensor) -> Raw:
    """Eight 6-bit scales and minima -> 12 bytes (Q4_K, Q5_K)."""
    a, b = _small(s), _small(m)
    return np.concatenate(
        [
            a[..., :4] | (a[..., 4:] >> 4 << 6),
            b[..., :4] | (b[..., 4:] >> 4 << 6),
            (a[..., 4:] & 15) | (b[..., 4:] << 4),
        ],
        axis=-1,
    )


def _read_six(raw: Raw) -> tuple[Tensor, Tensor]:
    a, b, low = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    s = np.concatenate([a & 63, (low & 15) | (a >> 6 << 4)], axis=-1)
    m = np.concatenate([b & 63, (low >> 4) | (b >> 6 << 4)], axis=-1)
    return _floats(s), _floats(m)


class Q2_K(_KGrid):  # noqa: N801
    """2-bit codes, groups of 16, 4-bit scales and minima."""

    name, ggml_type, block_bytes = "Q2_K", 10, 84
    group, levels = 16, tuple(range(4))
    has_minimum, scale_range = True, (0, 15)
    largest = HALF_MAX

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        dmin, m = minimum
        small = _small(s) | (_small(m) << 4)
        q = _planes(c.reshape(*c.shape[:2], 2, 4, 32), 2).reshape(*c.shape[:2], 64)
        return np.concatenate([small, q, half_bytes(d), half_bytes(dmin)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        small = raw[..., :16]
        q = _unplanes(raw[..., 16:80].reshape(*raw.shape[:2], 2, 32), 2)
        d, dmin = read_half(raw[..., 80:82]), read_half(raw[..., 82:84])
        return q, [d, _floats(small & 15), dmin, _floats(small >> 4)]


class Q3_K(_KGrid):  # noqa: N801
    """3-bit signed codes, groups of 16, 6-bit signed scales."""

    name, ggml_type, block_bytes = "Q3_K", 11, 110
    group, levels = 16, tuple(range(-4, 4))
    has_minimum, scale_range = False, (-32, 31)
    largest = HALF_MAX * 4
    landings = (-5.2, -4.7, -4.3, -4.0, -3.7, -3.4, -3.1, 2.7, 3.0, 3.3, 3.6, 4.0)

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        high = _planes((c >> 2).reshape(*c.shape[:2], 8, 32), 1)
        q = _planes((c & 3).reshape(*c.shape[:2], 2, 4, 32), 2).reshape(*c.shape[:2], 64)
        six = _small(s + 32)
        low = (six[..., :8] & 15) | (six[..., 8:] << 4)
        top = _planes((six >> 4).reshape(*six.shape[:2], 4, 4), 2)
        return np.concatenate([high, q, low, top, half_bytes(d)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        blocks = raw.shape[:2]
        high = _unplanes(raw[..., :32], 1).reshape(*blocks, 256)
        q = _unplanes(raw[..., 32:96].reshape(*blocks, 2, 32), 2).reshape(*blocks, 256)
        low, top = raw[..., 96:104], _unplanes(raw[..., 104:108], 2).reshape(*blocks, 16)
        six = np.concatenate([low & 15, low >> 4], axis=-1) | (top << 4)
        return q | (high << 2), [read_half(raw[..., 108:]), _floats(six) - 32]


class Q4_K(_KGrid):  # noqa: N801
    """4-bit codes, groups of 32, 6-bit scales and minima."""

    name, ggml_type, block_bytes = "Q4_K", 12, 144
    group, levels = 32, tuple(range(16))
    has_minimum, scale_range = True, (0, 63)
    largest = HALF_MAX

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        dmin, m = minimum
        q = _planes(c.reshape(*c.shape[:2], 4, 2, 32), 4).reshape(*c.shape[:2], 128)
        return np.concatenate([half_bytes(d), half_bytes(dmin), _write_six(s, m), q], axis=-1)

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        s, m = _read_six(raw[..., 4:16])
        q = _unplanes(raw[..., 16:].reshape(*raw.shape[:2], 4, 32), 4)
        return q, [read_half(raw[..., :2]), s, read_half(raw[..., 2:4]), m]


class Q5_K(_KGrid):  # noqa: N801
    """5-bit codes, groups of 32, 6-bit scales and minima."""

    name, ggml_type, block_bytes = "Q5_K", 13, 176
    group, levels = 32, tuple(range(32))
    has_minimum, scale_range = True, (0, 63)
    largest = HALF_MAX

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        dmin, m = minimum
        high = _planes((c >> 4).reshape(*c.shape[:2], 8, 32), 1)
        q = _planes((c & 15).reshape(*c.shape[:2], 4, 2, 32), 4).reshape(*c.shape[:2], 128)
        return np.concatenate([half_bytes(d), half_bytes(dmin), _write_six(s, m), high, q], axis=-1)

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        s, m = _read_six(raw[..., 4:16])
        high = _unplanes(raw[..., 16:48], 1).reshape(*raw.shape[:2], 256)
        q = _unplanes(raw[..., 48:].reshape(*raw.shape[:2], 4, 32), 4)
        codes = q.reshape(*raw.shape[:2], 256) | (high << 4)
        return codes, [read_half(raw[..., :2]), s, read_half(raw[..., 2:4]), m]


class Q6_K(_KGrid):  # noqa: N801
    """6-bit signed codes, groups of 16, 8-bit signed scales."""

    name, ggml_type, block_bytes = "Q6_K", 14, 210
    group, levels = 16, tuple(range(-32, 32))
    has_minimum, scale_range = False, (-128, 127)
    largest = HALF_MAX * 32
    landings = (-34.0, -33.0, -32.5, -32.0, -31.5, -31.0, -30.0, 29.5, 30.5, 31.0, 31.5, 32.0)

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        blocks = c.shape[:2]
        low = _planes((c & 15).reshape(*blocks, 2, 2, 64), 4).reshape(*blocks, 128)
        high = _planes((c >> 4).reshape(*blocks, 2, 4, 32), 2).reshape(*blocks, 64)
        return np.concatenate([low, high, _small(s), half_bytes(d)], axis=-1)

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        blocks = raw.shape[:2]
        low = _unplanes(raw[..., :128].reshape(*blocks, 2, 64), 4).reshape(*blocks, 256)
        high = _unplanes(raw[..., 128:192].reshape(*blocks, 2, 32), 2).reshape(*blocks, 256)
        s = np.ascontiguousarray(raw[..., 192:208]).view(np.int8).astype(np.float32)
        return low | (high << 4), [read_half(raw[..., 208:]), torch.from_numpy(s)]


class IQ4_XS(_KGrid):  # noqa: N801
    """The levels of IQ4_NL, groups of 32, 6-bit signed scales."""

    name, ggml_type, block_bytes = "IQ4_XS", 23, 136
    group, levels = 32, IQ4_NL.levels
    has_minimum, scale_range = False, (-32, 31)
    largest = HALF_MAX * 113
    landings = tuple(IQ4_NL.landings)

    def _write(self, c: Raw, d: Tensor, s: Tensor, *minimum: Tensor) -> Raw:
        blocks = c.shape[:2]
        six = _small(s + 32)
        # two bits of each scale in one 16-bit number, four in a nibble
        high = _planes((six >> 4).reshape(*blocks, 2, 4).swapaxes(2, 3), 2)
        low = (six[..., 0::2] & 15) | (six[..., 1::2] << 4)
        q = pair_nibbles(c.reshape(*blocks, 8, 32)).reshape(*blocks, 128)
        return np.concatenate([half_bytes(d), high, low, q], axis=-1)

    def _read(self, raw: Raw) -> tuple[Raw, list[Tensor]]:
        blocks = raw.shape[:2]
        high = _unplanes(raw[..., 2:4], 2).swapaxes(2, 3).reshape(*blocks, 8)
        nibbles = np.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], axis=-1).reshape(*blocks, 8)
        q = split_nibbles(raw[..., 8:].reshape(*blocks, 8, 16)).reshape(*blocks, 256)
        return q, [read_half(raw[..., :2]), _floats(nibbles | (high << 4)) - 32]


GRIDS: dict[str, Grid] = {g.name: g for g in (Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K(), IQ4_XS())}
