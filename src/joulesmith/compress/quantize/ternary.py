"""Large blocks under one scale: of -1, 0 and 1 (TQ1_0, TQ2_0), and of -1 and 1 (Q1_0).

Made for models that were trained so; others lose too much at this size. Layouts: ggml's
``block_tq1_0``, ``block_tq2_0`` and ``block_q1_0``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice
from joulesmith.compress.quantize.legacy import HALF_MAX, Plain, half_bytes, read_half
from joulesmith.compress.quantize.scales import safe_ratio

_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)
_RUNS = ((5, 32), (5, 16), (4, 4))
"""(digits of a byte, bytes) of the three runs of TQ1_0; a byte's weights are not neighbours."""


class _Ternary(Plain):
    block = 256
    group = 256
    largest = HALF_MAX
    # a ternary model's peak is its step; a normal distribution's is more than twice its best one
    landings = (1.0, 1.25, 1.55, 1.85, 2.15, 2.5, 2.9, 3.4)

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = codes.numpy().reshape(codes.shape[0], -1, 256)
        packed = np.concatenate([self._digits(c), half_bytes(lattice.stored[0])], axis=-1)
        return packed.reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(packed.shape[0], -1, self.block_bytes)
        codes = self._undigits(raw[..., :-2]).reshape(packed.shape[0], columns)
        return torch.from_numpy(codes), self._lattice(read_half(raw[..., -2:]), None)

    def _digits(self, c: NDArray[Any]) -> NDArray[Any]:
        raise NotImplementedError

    def _undigits(self, raw: NDArray[Any]) -> NDArray[Any]:
        raise NotImplementedError


class TQ1_0(_Ternary):  # noqa: N801
    """Five weights a byte, as the digits of a fraction of 256 in base 3."""

    name, ggml_type, block_bytes = "TQ1_0", 34, 54
    levels = (-1, 0, 1)

    def _digits(self, c: NDArray[Any]) -> NDArray[Any]:
        found, start = [], 0
        for digits, width in _RUNS:
            run = c[..., start : start + digits * width].reshape(*c.shape[:2], digits, width)
            found.append((run * _POWERS[:digits, None]).sum(-2))
            start += digits * width
        # rounded up, so that a multiplication by 3 brings the next digit into the high byte
        fraction = (np.concatenate(found, axis=-1) * 256 + 242) // 243
        return fraction.astype(np.uint8)

    def _undigits(self, raw: NDArray[Any]) -> NDArray[Any]:
        found, start = [], 0
        for digits, width in _RUNS:
            run = raw[..., None, start : start + width].astype(np.uint16)
            shifted = (run * _POWERS[::-1][:digits, None]) & 255
            found.append((shifted * 3 >> 8).reshape(*raw.shape[:2], -1))
            start += width
        return np.concatenate(found, axis=-1).astype(np.uint8)


class TQ2_0(_Ternary):  # noqa: N801
    """Four weights a byte. Level 2 is readable but never written, as in ggml."""

    name, ggml_type, block_bytes = "TQ2_0", 35, 66
    levels = (-1, 0, 1, 2)
    last = 2

    def _digits(self, c: NDArray[Any]) -> NDArray[Any]:
        four = c.reshape(*c.shape[:2], 2, 4, 32)
        bits = four << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        out: NDArray[Any] = np.bitwise_or.reduce(bits, axis=-2).reshape(*c.shape[:2], 64)
        return out

    def _undigits(self, raw: NDArray[Any]) -> NDArray[Any]:
        halves = raw.reshape(*raw.shape[:2], 2, 1, 32)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        codes: NDArray[Any] = ((halves >> shifts) & 3).reshape(*raw.shape[:2], 256)
        return codes


class Q1_0(Plain):  # noqa: N801
    """The signs of 128 weights, eight a byte, and what they are times."""

    name, ggml_type, block_bytes = "Q1_0", 41, 18
    block = group = 128
    levels = (-1, 1)
    largest = HALF_MAX

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        """Closed form: the weighted mean magnitude."""
        flat, importance = x.reshape(-1, 128), weight.reshape(-1, 128)
        mean = safe_ratio((importance * flat.abs()).sum(1), importance.sum(1))
        return self.snap(mean.view(len(x), -1), None)

    def nearest_level(self, u: Tensor) -> Tensor:
        return torch.where(u > 0, 1.0, -1.0)

    def nearest_code(self, u: Tensor) -> Tensor:
        return (u > 0).byte()

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        c = codes.numpy().reshape(codes.shape[0], -1, 128)
        bits = np.packbits(c, axis=-1, bitorder="little")
        packed = np.concatenate([half_bytes(lattice.stored[0]), bits], axis=-1)
        return packed.reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(packed.shape[0], -1, 18)
        codes = np.unpackbits(raw[..., 2:], axis=-1, bitorder="little")
        flat = torch.from_numpy(codes.reshape(packed.shape[0], columns))
        return flat, self._lattice(read_half(raw[..., :2]), None)


GRIDS: dict[str, Grid] = {g.name: g for g in (TQ1_0(), TQ2_0(), Q1_0())}
