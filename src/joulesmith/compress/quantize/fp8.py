"""FP8 weights: E4M3 with one scale a row, as vLLM and `transformers` run them.

A value is ``scale * e4m3``; scales are float16, as all of such a folder is (`floats` has the
FP8 grids whose scales are not). It is a `Grid` whose levels are the E4M3
numbers in units of the smallest, 2^-9, so that every way of rounding works on it. Bytes are
those of ``torch.float8_e4m3fn``.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import Bytes, Grid, Lattice
from joulesmith.compress.quantize.legacy import HALF_MAX, half_bytes, read_half
from joulesmith.errors import JoulesmithError

UNIT = 512.0
"""Levels to one: the smallest E4M3 number is 2^-9."""


def _patterns() -> tuple[list[int], list[int]]:
    """Levels in ascending order, and the byte of each (NaN and -0 left out)."""
    every = torch.arange(256, dtype=torch.uint8)
    value = every.view(torch.float8_e4m3fn).float() * UNIT
    found = {int(v): b for b, v in enumerate(value.tolist()) if v == v and b != 0x80}
    levels = sorted(found)
    return levels, [found[v] for v in levels]


_LEVELS, _BYTES = _patterns()
_BYTE_OF_CODE = np.array(_BYTES, np.uint8)
_CODE_OF_BYTE = np.full(256, _LEVELS.index(0), np.uint8)
_CODE_OF_BYTE[_BYTE_OF_CODE] = np.arange(len(_BYTES), dtype=np.uint8)


class Fp8Grid(Grid):
    """group: columns that share a scale, usually the whole row.

    Raises `JoulesmithError` for an empty group.
    """

    def __init__(self, group: int) -> None:
        if group < 1:
            raise JoulesmithError(f"a group has 1 column or more, not {group}")
        vars(self).update(
            name=f"FP8-G{group}",
            ggml_type=-1,
            group=group,
            block=group,
            block_bytes=group + 2,
            levels=tuple(_LEVELS),
            largest=HALF_MAX,
            free_scales=True,
        )
        super().__init__()
        # A float grid looks the same an octave further: only the position inside one counts.
        self._landings = tuple((448 * UNIT * np.linspace(0.52, 1.03, 9)).tolist())

    @property
    def bits_per_weight(self) -> float:
        """Codes and float16 scales."""
        return 8 + 16 / self.group

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        rows = x.shape[0]
        flat, importance = x.reshape(-1, self.group), weight.reshape(-1, self.group)
        step = scales.search_step(
            flat, importance, self.nearest_level, self._landings, _snap, positive=True
        )
        return self._lattice(step.view(rows, -1))

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        return self._lattice(_snap(step))

    def _lattice(self, step: Tensor) -> Lattice:
        return Lattice(step, None, (step * UNIT,))

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        body = _BYTE_OF_CODE[codes.numpy()].reshape(codes.shape[0], -1, self.group)
        head = half_bytes(lattice.stored[0])
        return np.concatenate([head, body], axis=-1).reshape(codes.shape[0], -1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        raw = packed.reshape(packed.shape[0], -1, self.block_bytes)
        codes = _CODE_OF_BYTE[raw[..., 2:]].reshape(packed.shape[0], columns)
        return torch.from_numpy(np.ascontiguousarray(codes)), self._lattice(
            read_half(raw[..., :2]) / UNIT
        )

    def stored(self, packed: Bytes, columns: int) -> tuple[Tensor, Tensor]:
        """Packed rows -> float8_e4m3fn (rows, columns) and scales (rows, groups)."""
        codes, lattice = self.read(packed, columns)
        raw = torch.from_numpy(_BYTE_OF_CODE[codes.numpy()])
        return raw.view(torch.float8_e4m3fn), lattice.stored[0]


def _snap(step: Tensor) -> Tensor:
    return scales.half(step * UNIT) / UNIT


_NAME = re.compile(r"FP8-G(\d{1,6})")


def by_name(name: str) -> Fp8Grid | None:
    """The grid "FP8-G576"; None for another name. Raises as `Fp8Grid` does."""
    match = _NAME.fullmatch(name)
    return None if match is None else Fp8Grid(int(match[1]))
