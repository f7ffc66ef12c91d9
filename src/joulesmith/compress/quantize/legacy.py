"""Blocks of 32 weights under one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL.

These fit any row that is a multiple of 32. Layouts: ggml's ``block_q4_0`` and its kin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice

HALF_MAX = 65504.0


def pair_nibbles(codes: NDArray[Any]) -> NDArray[Any]:
    """(..., 2 n) codes -> (..., n) bytes: first half low, second half high nibbles."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] & 15) | (codes[..., half:] << 4)


def split_nibbles(raw: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `pair_nibbles`."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def half_bytes(x: Tensor) -> Bytes:
    """(...,) float32 that are float16 values -> (..., 2) little-endian bytes."""
    return np.ascontiguousarray(x.numpy().astype("<f2"))[..., None].view(np.uint8)


def read_half(raw: Bytes) -> Tensor:
    """(..., 2) bytes -> (...,) float32."""
    h = np.ascontiguousarray(raw).view("<f2")[..., 0]
    return torch.from_numpy(h.astype(np.float32))


class Plain(Grid):
    """One block, one group, one float16 step and maybe a float16 offset."""

    block = 32
    group = 32
    free_scales = True
    has_offset: ClassVar[bool] = False

    @property
    def affine(self) -> bool:
        return self.has_offset

    code_bits: ClassVar[int] = 4
    landings: ClassVar[Sequence[float]] = ()

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        flat, importance = x.reshape(-1, self.group), weight.reshape(-1, self.group)
        if self.has_offset:
            step, offset = scales.search_affine(flat, importance, self.levels[-1])
            return self._lattice(step.view(len(x), -1), offset.view(len(x), -1))
        step = scales.search_step(flat, importance, self.nearest_level, self.landings)
        return self._lattice(step.view(len(x), -1), None)

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        return self._lattice(scales.half(step), None if offset is None else scales.half(offset))

    def _lattice(self, step: Tensor, offset: Tensor | None) -> Lattice:
        return Lattice(step, offset, (step,) if offset is None else (step, offset))

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = codes.numpy().reshape(codes.shape[0], -1, 32)
        head: list[NDArray[Any]] = [half_bytes(s) for s in lattice.stored]
        body: list[NDArray[Any]]
        if self.code_bits == 8:
            body = [c ^ 128]  # code 0 is level -128: two's complement by flipping the sign bit
        elif self.code_bits == 5:
            body = [np.packbits(c >> 4, axis=-1, bitorder="little"), pair_nibbles(c)]
        else:
            body = [pair_nibbles(c)]
        return np.concatenate(head + body, axis=-1).reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(packed.shape[0], -1, self.block_bytes)
        step = read_half(raw[..., :2])
        offset = read_half(raw[..., 2:4]) if self.has_offset else None
        body = raw[..., 4 if self.has_offset else 2 :]
        codes: NDArray[Any]
        if self.code_bits == 8:
            codes = body ^ 128
        elif self.code_bits == 5:
            high = np.unpackbits(body[..., :4], axis=-1, bitorder="little")
            codes = split_nibbles(body[..., 4:]) | (high << 4)
        else:
            codes = split_nibbles(body)
        flat = torch.from_numpy(codes.reshape(packed.shape[0], columns).copy())
        return flat, self._lattice(step, offset)


def spread(*spans: tuple[float, float, int]) -> tuple[float, ...]:
    """(low, high, count) spans -> evenly spaced values of each, ends included."""
    return tuple(float(v) for low, high, n in spans for v in np.linspace(low, high, n))


class Q4_0(Plain):  # noqa: N801
    """``step * (code - 8)``."""

    name = "Q4_0"
    ggml_type = 2
    block_bytes = 18
    levels = tuple(range(-8, 8))
    largest = HALF_MAX * 8
    landings = spread((-9.4, -6.6, 15), (6.2, 8.2, 9))


class Q4_1(Plain):  # noqa: N801
    """``step * code + offset``."""

    name = "Q4_1"
    ggml_type = 3
    block_bytes = 20
    levels = tuple(range(16))
    has_offset = True
    largest = HALF_MAX


class Q5_0(Plain):  # noqa: N801
    """``step * (code - 16)``."""

    name = "Q5_0"
    ggml_type = 6
    block_bytes = 22
    code_bits = 5
    levels = tuple(range(-16, 16))
    largest = HALF_MAX * 16
    landings = spread((-17.5, -14.1, 18), (14.2, 16.4, 8))


class Q5_1(Plain):  # noqa: N801
    """``step * code + offset``."""

    name = "Q5_1"
    ggml_type = 7
    block_bytes = 24
    code_bits = 5
    levels = tuple(range(32))
    has_offset = True
    largest = HALF_MAX


class Q8_0(Plain):  # noqa: N801
    """``step * (code - 128)``. Level -128 is readable but never written, as in ggml."""

    name = "Q8_0"
    ggml_type = 8
    block_bytes = 34
    code_bits = 8
    levels = tuple(range(-128, 128))
    first = 1
    largest = HALF_MAX * 127
    landings = (125.4, 126.0, 126.6, 127.0, 127.4)


class IQ4_NL(Plain):  # noqa: N801
    """``step * levels[code]``: 16 levels, denser near zero."""

    name = "IQ4_NL"
    ggml_type = 20
    block_bytes = 18
    levels = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    largest = HALF_MAX * 113
    landings = spread((-140.0, -104.0, 13), (90.0, 122.0, 10))


GRIDS: dict[str, Grid] = {g.name: g for g in (Q8_0(), Q4_0(), Q4_1(), Q5_0(), Q5_1(), IQ4_NL())}
