"""Small-float and normal-float grids: FP8, FP6, FP4 and NF4, each under several scales.

A name is an element and how its scales are stored:

    FP8-E4M3, FP8-E5M2, FP6-E2M3, FP6-E3M2, FP4-E2M1, NF4
    -G128      a bfloat16 scale for every 128 columns; a whole row is a group as long as it
    FP8-G576   E4M3 under a float16 scale for every 576 columns: usually the whole row, as
               vLLM and `transformers` run it in folders, where all scales are float16
    -G64-DQ    8-bit scales about a mean: two float32 numbers a tensor (QLoRA, section 3)
    -T         one float32 scale for the tensor; columns come in sixteens, as FP8 kernels ask
    -MX        a power of two for every 32 columns (OCP Microscaling Formats v1.0, section 5)
    -NV        an E4M3 scale for every 16 columns under one float32 a tensor

bfloat16 and not float16 otherwise, since weights near 0.01 under levels up to 57344 ask for
scales that float16 has no digits for. All scales are positive. Microscaling FP4 is GGUF's
``MXFP4`` (`legacy`). Packed rows stand alone: what a tensor shares is repeated at the head
of each row, and is not counted as stored bits; then the row's scales, then its codes as
the bit patterns of the type, little end first. `Grid.bind` makes the rows of one tensor
share it where they are packed in pieces.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.elements import E2M1, E4M3, ELEMENTS, NF4, Element
from joulesmith.compress.quantize.grids import (
    CHUNK,
    Array,
    Bytes,
    Grid,
    Lattice,
    importance_of,
    pick,
    rows_of,
)
from joulesmith.compress.quantize.integers import pack_codes, unpack_codes
from joulesmith.compress.quantize.legacy import HALF_MAX
from joulesmith.errors import JoulesmithError

LARGEST = 1e15
"""The scales reach further, but sums of squares must fit float32 in the search."""


# -- how scales are stored ----------------------------------------------------


class _Scales(ABC):
    """One way to store the scales of groups.

    head: (..., shared) float32, what the tensor shares. A scale tensor has the shape of
    head with its last axis replaced by groups, or any shape where head is (shared,).
    """

    shared = 0
    width = 1
    free = True

    @abstractmethod
    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        """Wanted scales (...) -> (..., width) uint8 of the nearest ones."""

    @abstractmethod
    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        """The inverse: (..., width) uint8 -> (...) float32."""

    def nearest(self, step: Tensor, head: Tensor) -> Tensor:
        """The storable scale nearest to each wanted one."""
        return self.decode(self.encode(step, head), head)


class _Own(_Scales):
    """A bfloat16 each."""

    width = 2

    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        return step.clamp(min=0).bfloat16().contiguous().unsqueeze(-1).view(torch.uint8)

    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        return raw.contiguous().view(torch.bfloat16).squeeze(-1).float()


class _Half(_Scales):
    """A float16 each."""

    width = 2

    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        return scales.half(step.clamp(min=0)).half().contiguous().unsqueeze(-1).view(torch.uint8)

    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        return raw.contiguous().view(torch.float16).squeeze(-1).float()


class _Power(_Scales):
    """E8M0: byte b stands for 2^(b - 127)."""

    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        exponent = torch.log2(step.clamp(min=2.0**-126)).round().clamp(-126, 126)
        return (exponent + 127).to(torch.uint8).unsqueeze(-1)

    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        byte = raw.squeeze(-1).to(torch.int32)
        step = torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte - 127)
        return torch.where(byte == 255, torch.full_like(step, torch.nan), step)


class _Whole(_Scales):
    """One float32 for the tensor."""

    shared, width, free = 1, 0, False

    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        return torch.empty((*step.shape, 0), dtype=torch.uint8)

    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        return head.expand(raw.shape[:-1]).contiguous()


class _Nested(_Scales):
    """``head * e4m3``, not negative."""

    shared = 1

    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        return _e4m3(scales.safe_ratio(step.clamp(min=0), head[..., :1].expand_as(step)))

    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        return raw.contiguous().view(torch.float8_e4m3fn).squeeze(-1).float() * head


class _Centred(_Scales):
    """``mean + spread * e4m3``: QLoRA's double quantization, with one mean a tensor."""

    shared = 2

    def encode(self, step: Tensor, head: Tensor) -> Tensor:
        return _e4m3(scales.safe_ratio(step - head[..., :1], head[..., 1:].expand_as(step)))

    def decode(self, raw: Tensor, head: Tensor) -> Tensor:
        small = raw.contiguous().view(torch.float8_e4m3fn).squeeze(-1).float()
        return (head[..., :1] + head[..., 1:] * small).clamp(min=0)


def _e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 of each x, as (..., 1) uint8; negative zero becomes zero."""
    small = x.clamp(-448.0, 448.0).contiguous().unsqueeze(-1).to(torch.float8_e4m3fn)
    raw = small.view(torch.uint8)
    return torch.where(raw == 128, torch.zeros_like(raw), raw)


_KINDS: dict[str, _Scales] = {
    "G": _Own(),
    "H": _Half(),
    "DQ": _Centred(),
    "T": _Whole(),
    "MX": _Power(),
    "NV": _Nested(),
}

G = TypeVar("G", bound="FloatGrid")


class FloatGrid(Grid):
    """element: see `ELEMENTS`. kind: G, DQ, T, MX or NV, see the module's head; H for float16.

    group: columns that share a scale; fixed by the kinds T, MX and NV. Raises
    `JoulesmithError` for an empty group.
    """

    def __init__(self, element: Element, kind: str, group: int = 0) -> None:
        group = {"T": 16, "MX": 32, "NV": 16}.get(kind, group)
        if group < 1:
            raise JoulesmithError(f"a group has 1 column or more, not {group}")
        self.element, self.kind = element, kind
        self._scales = _KINDS[kind]
        self.head: Tensor | None = None
        tail = {"G": f"G{group}", "DQ": f"G{group}-DQ"}.get(kind, kind)
        name = f"FP8-G{group}" if kind == "H" else f"{element.name}-{tail}"
        # Class variables of a GGUF type; here they are the instance's.
        vars(self).update(
            name=name,
            ggml_type=-1,
            group=group,
            block=group,
            block_bytes=-(-group * element.bits // 8) + self._scales.width,
            levels=element.levels,
            largest=HALF_MAX if kind == "H" else LARGEST,
            free_scales=self._scales.free and not self._scales.shared,
        )
        super().__init__()
        # Halfway between two levels, the one of even pattern is nearest (round to even).
        even = torch.tensor([k % 2 == 0 for k in element.patterns[1:]])
        down = torch.nextafter(self._edges, torch.full_like(self._edges, -torch.inf))
        self.set_borders(torch.where(even, down, self._edges))
        self._patterns = np.array(element.patterns, np.uint8)
        self._code_of = np.full(256, -1, np.int16)
        self._code_of[self._patterns] = np.arange(len(element.levels))
        if element is not NF4:  # negative zero is readable, never written
            self._code_of[1 << (element.bits - 1)] = self._code_of[0]

    @property
    def in_folders(self) -> bool:
        """Whether folders hold it, and engines load it from there."""
        return self.kind == "H"

    @property
    def bits_per_weight(self) -> float:
        """Codes and the scales of groups; what a whole tensor shares is not counted."""
        return self.element.bits + 8 * self._scales.width / self.group

    def row_bytes(self, columns: int) -> int:
        return super().row_bytes(columns) + 4 * self._scales.shared

    # -- rounding -------------------------------------------------------------

    def nearest_level(self, u: Tensor) -> Tensor:
        if self.element.dtype is None:
            return super().nearest_level(u)
        top = self.levels[-1]  # torch's cast is ten times as fast as a search here
        return u.clamp(-top, top).to(self.element.dtype).float()

    def nearest_code(self, u: Tensor) -> Tensor:
        if self.element.dtype is None:
            return super().nearest_code(u)
        top = self.levels[-1]
        pattern = u.clamp(-top, top).to(self.element.dtype).contiguous().view(torch.uint8)
        return pick(torch.from_numpy(self._code_of.astype(np.uint8)), pattern.int())

    # -- scales ---------------------------------------------------------------

    def bind(self: G, w: Array, importance: Array | None = None) -> G:
        if not self._scales.shared or self.head is not None:
            return self
        t = rows_of(w, self)
        bound = copy.copy(self)
        bound.head = torch.zeros(self._scales.shared)
        # one group's scale may move where the others' do only once these numbers are fixed
        vars(bound).update(free_scales=self._scales.free)
        if not t.numel():
            return bound
        peak = float(t.abs().max())
        if self.kind == "NV":
            # The largest weight may land on two thirds of the top level: 4 of E2M1.
            bound.head[0] = peak / (448.0 * self.levels[-1] * 2 / 3)
        elif self.kind == "T":
            bound.head[0] = self._whole_step(t, importance, peak)
        else:
            free = FloatGrid(self.element, "G", self.group).fit(t, importance).step.double()
            bound.head[0] = free.mean()
            bound.head[1] = (free - free.mean()).abs().max() / 448.0
        return bound

    def _whole_step(self, t: Tensor, importance: Array | None, peak: float) -> float:
        """The step for all of t (rows, columns): the best landing's least squares."""
        if peak == 0:
            return 0.0
        weight = importance_of(importance, t)
        rows = max(1, CHUNK // t.shape[1])
        best, best_gain = peak / self.levels[-1], -1.0
        for landing in self.element.landings:
            along = norm = 0.0
            for start in range(0, len(t), rows):
                x = t[start : start + rows]
                level = self.nearest_level(x * (landing / peak))
                here = level * (weight if len(weight) == 1 else weight[start : start + rows])
                along += float((here * x).sum(dtype=torch.float64))
                norm += float((here * level).sum(dtype=torch.float64))
            if norm > 0 and along * along / norm > best_gain:
                best, best_gain = along / norm, along * along / norm
        return best

    def fit(self, w: Array, importance: Array | None = None) -> Lattice:
        bound = self.bind(w, importance)
        return super().fit(w, importance) if bound is self else bound.fit(w, importance)

    def storable(self, scale: Tensor) -> Tensor:
        return self._scales.nearest(scale, self._shared())

    def search(self, x: Tensor, weight: Tensor) -> Lattice:
        flat, importance = x.reshape(-1, self.group), weight.reshape(-1, self.group)
        if self.kind == "T":
            step = torch.zeros(len(flat))  # the tensor's, whatever is asked
        elif self.kind == "MX":
            step = scales.search_power(flat, importance, self.nearest_level, self.levels[-1])
        else:
            step = self._best_storable(flat, importance)
        return self.snap(step.view(len(x), -1), None)

    def _best_storable(self, x: Tensor, weight: Tensor) -> Tensor:
        """The kernel's step; where scales are coarse, each storable one in reach is tried too."""
        landings = self.element.landings
        step = scales.search_step(
            x, weight, self.nearest_level, landings, self.storable, positive=True
        )
        if not self._scales.shared:
            return step
        peak = x.abs().amax(1)
        best, best_error = step, self._squares(x, weight, step)
        for landing in landings:
            tried = self.storable(peak / landing)
            error = self._squares(x, weight, tried)
            best = torch.where(error < best_error, tried, best)
            best_error = torch.minimum(error, best_error)
        return best

    def _squares(self, x: Tensor, weight: Tensor, step: Tensor) -> Tensor:
        s = step[:, None].expand_as(x)
        return (weight * (x - s * self.nearest_level(scales.safe_ratio(x, s))).square()).sum(1)

    def snap(self, step: Tensor, offset: Tensor | None) -> Lattice:
        head = self._shared().expand(len(step), -1)
        raw = self._scales.encode(step, head)
        return Lattice(self._scales.decode(raw, head), None, (head, raw))

    def _shared(self) -> Tensor:
        if self.head is not None:
            return self.head
        if self._scales.shared:
            raise JoulesmithError(f"{self.name} shares a scale: bind it to the whole tensor first")
        return torch.empty(0)

    # -- bytes ----------------------------------------------------------------

    def write(self, codes: Tensor, lattice: Lattice) -> Bytes:
        head, raw = lattice.stored
        rows = len(codes)
        patterns = self._patterns[codes.numpy()].reshape(rows, -1, self.group)
        body = pack_codes(patterns, self.element.bits)
        parts: list[NDArray[np.uint8]] = [
            np.ascontiguousarray(head.numpy().astype("<f4")).view(np.uint8).reshape(rows, -1),
            raw.numpy().reshape(rows, -1),
            body.reshape(rows, -1),
        ]
        return np.concatenate(parts, axis=1)

    def read(self, packed: Bytes, columns: int) -> tuple[Tensor, Lattice]:
        rows, groups = len(packed), columns // self.group
        first = 4 * self._scales.shared
        second = first + groups * self._scales.width
        numbers = np.ascontiguousarray(packed[:, :first]).view("<f4").astype(np.float32)
        head = torch.from_numpy(numbers.reshape(rows, -1))
        raw = torch.from_numpy(packed[:, first:second].reshape(rows, groups, -1).copy())
        step = self._scales.decode(raw, head)
        body = packed[:, second:].reshape(rows, groups, -1)
        patterns = unpack_codes(body, self.element.bits, self.group)
        codes = self._code_of[patterns].reshape(rows, columns)
        if (codes < 0).any() or not bool(torch.isfinite(step).all()) or bool((step < 0).any()):
            raise JoulesmithError(
                f"packed {self.name} rows hold NaN, infinity or a negative scale: "
                "the file is damaged, pack the weights anew"
            )
        return torch.from_numpy(codes.astype(np.uint8)), Lattice(step, None, (head, raw))

    def stored(self, packed: Bytes, columns: int) -> tuple[Tensor, Tensor]:
        """Packed rows -> torch's own type (rows, columns) and scales (rows, groups).

        Raises `JoulesmithError` for an element that torch has no type for.
        """
        if self.element.dtype is None:
            raise JoulesmithError(f"torch has no type for {self.element.name}")
        codes, lattice = self.read(packed, columns)
        raw = torch.from_numpy(self._patterns[codes.numpy()])
        return raw.view(self.element.dtype), lattice.step


_NAME = re.compile(r"(FP8-E4M3|FP8-E5M2|FP6-E2M3|FP6-E3M2|FP4-E2M1|NF4)-(.+)")
_ROWS = re.compile(r"FP8-G(\d{1,6})")
_TAIL = re.compile(r"G(\d{1,6})(-DQ)?|T|MX|NV")


def by_name(name: str) -> FloatGrid | None:
    """The grid "FP8-G576", "FP8-E4M3-G128", "FP4-E2M1-NV" ...; None for another name.

    Raises `JoulesmithError` for an element that has no such scales.
    """
    if row := _ROWS.fullmatch(name):
        return FloatGrid(E4M3, "H", int(row[1]))
    match = _NAME.fullmatch(name)
    tail = _TAIL.fullmatch(match[2]) if match else None
    if match is None or tail is None:
        return None
    element = ELEMENTS[match[1]]
    kind = ("DQ" if tail[2] else "G") if tail[1] else tail[0]
    if kind == "MX" and element is E2M1:
        raise JoulesmithError("FP4 under powers of two is called MXFP4: ask for that")
    if (kind == "MX" and element is NF4) or (kind == "NV" and element is not E2M1):
        raise JoulesmithError(f"{element.name} has no {kind} scales: give a group, as in -G64")
    return FloatGrid(element, kind, int(tail[1] or 0))
