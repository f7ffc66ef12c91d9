"""Keys and values of attention on few bits: the arithmetic.

A block of values shares a scale, and where asymmetric a least value, both float16. Two
layouts are worth their bits: keys by channel, a block being one channel of a run of tokens,
since a few channels of all keys are large; and by token, a block being a run of channels of
one token, as values are kept (Liu et al. 2024, "KIVI", section 3) and as llama.cpp's q8_0
and q4_0 caches hold both. Rotary position embedding turns a channel that is large in all keys
into a wave over tokens; taken off before keys are packed and put on again when they are read,
it leaves them nearly constant in time (Hooper et al. 2024, "KVQuant", section 3.2). A Hadamard
rotation of the channels of each head spreads large channels over all, and is undone on reading:
queries and keys meet unchanged.

Scale and least value of a block start from its ends and are then fitted to the codes by least
squares, codes and fit in turn; the ends stay where that is no better.

Tensors in, tensors out. Knows no model; `kv_layers` is the cache that `transformers` uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError

_HALF_MAX = 65504.0
FITS = 3
"""Turns of fitting a block's scale to its codes: more gain less than 1 % of the error."""


@dataclass(frozen=True)
class KVScheme:
    """bits: 8, 4 or 2. keys: "channel" or "token"; values are always by token.

    group: of tokens (keys by channel) or channels (by token) that share a scale; heads smaller
    than a group share it with their neighbours. symmetric: no least value; with groups of 32 by
    token and 8 or 4 bits that is llama.cpp's q8_0 and q4_0. rotate: whether the channels of a
    head are rotated first. rope: whether keys by channel are packed without their rotary
    position embedding. Raises `JoulesmithError` for other settings.
    """

    bits: int = 8
    keys: Literal["channel", "token"] = "token"
    group: int = 32
    symmetric: bool = False
    rotate: bool = False
    rope: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 2):
            raise JoulesmithError(f"a key-value cache has 8, 4 or 2 bits, not {self.bits}")
        if self.group < 8 or self.group % 8:
            raise JoulesmithError(f"a group is a multiple of 8, not {self.group}")
        if self.rope and self.keys != "channel":
            raise JoulesmithError("position embedding is taken off keys by channel only")

    def columns(self, heads: int, channels: int) -> int:
        """Channels of one token that share a scale, of so many heads of so many channels."""
        if self.group <= channels:
            return self.group
        together = self.group // channels
        whole = self.group % channels == 0 and heads % together == 0
        return self.group if whole else channels

    def bits_for(self, heads: int, channels: int) -> float:
        """Stored bits of a value, keys and values alike many, for full groups."""
        scales = 16 if self.symmetric else 32
        run = self.columns(heads, channels)
        return (
            self.bits + scales * (1 / run + 1 / (run if self.keys == "token" else self.group)) / 2
        )

    def check(self, channels: int) -> None:
        """Raises `JoulesmithError` where heads of so many channels do not fit."""
        if self.rotate:
            hadamard(channels)
        if channels % 8 or (channels % self.group and self.group < channels):
            raise JoulesmithError(
                f"heads of {channels} channels do not cut into groups of {self.group}"
            )

    @property
    def bits_per_value(self) -> float:
        """Codes and float16 scales (and least values), for full groups; see `bits_for` too."""
        return self.bits + (16 if self.symmetric else 32) / self.group


DEFAULTS = {
    8: KVScheme(8, "channel", 32, rope=True),
    4: KVScheme(4, "channel", 32, rope=True),
}
"""What ``--kv-cache 8`` and ``4`` mean."""


@dataclass(frozen=True)
class Packed:
    """Blocks as stored: codes uint8 (..., tokens, columns * bits / 8), and scales that
    broadcast against the grouped values; low is None where symmetric."""

    codes: Tensor
    scale: Tensor
    low: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        parts = [self.codes, self.scale, *([] if self.low is None else [self.low])]
        return sum(t.numel() * t.element_size() for t in parts)

    def tokens(self, start: int, stop: int, group: int) -> Packed:
        """The same for tokens ``start:stop``, whole groups where ``group`` tokens share a scale."""
        at = slice(start // group, stop // group)
        low = None if self.low is None else self.low[..., at, :, :]
        return Packed(self.codes[..., start:stop, :], self.scale[..., at, :, :], low)

    def take(self, index: Tensor) -> Packed:
        """The same for some of the batch (first dimension)."""
        low = None if self.low is None else self.low[index]
        return Packed(self.codes[index], self.scale[index], low)

    def to(self, device: torch.device | str) -> Packed:
        """The same elsewhere."""
        low = None if self.low is None else self.low.to(device, non_blocking=True)
        codes = self.codes.to(device, non_blocking=True)
        return Packed(codes, self.scale.to(device, non_blocking=True), low)


def join(first: Packed | None, second: Packed) -> Packed:
    """Two runs of tokens -> one."""
    if first is None:
        return second
    low = None
    if first.low is not None and second.low is not None:
        low = torch.cat([first.low, second.low], dim=-3)
    return Packed(
        torch.cat([first.codes, second.codes], dim=-2),
        torch.cat([first.scale, second.scale], dim=-3),
        low,
    )


def pack(x: Tensor, bits: int, *, tokens: int, columns: int, symmetric: bool) -> Packed:
    """x (..., n, d) -> blocks of ``tokens`` x ``columns`` values, each under one scale.

    By channel: tokens = group, columns = 1; by token: tokens = 1, columns = group. n and d
    must be multiples. Scales and least values are kept as float16 and codes chosen for what
    is kept. Raises `JoulesmithError` for shapes that do not divide.
    """
    n, d = x.shape[-2:]
    if n % tokens or d % columns or d * bits % 8:
        raise JoulesmithError(
            f"{n} tokens of {d} channels do not cut into groups of {tokens} x {columns}"
        )
    cut = x.float().reshape(*x.shape[:-2], n // tokens, tokens, d // columns, columns)
    # (..., n / tokens, tokens, d / columns, columns)
    over = (-3, -1)
    top = (1 << bits) - 1
    low: Tensor | None = None
    if symmetric:
        scale, inverse = _symmetric_scale(cut, bits, over)
        code = cut * inverse + (1 << (bits - 1))
        # as ggml rounds: q4_0 by truncating beyond a half, q8_0 to nearest
        code = (code + 0.5).floor() if bits < 8 else code.round()
    else:
        scale, low = _fitted(cut, top, over)
        code = _codes(cut, scale, low, top)
    codes = code.clamp(0, top).to(torch.uint8).flatten(-4, -3).flatten(-2)
    shape = (*x.shape[:-2], n // tokens, 1, d // columns)
    scale = scale.reshape(shape)
    return Packed(_squeeze(codes, bits), scale, None if low is None else low.reshape(shape))


def _codes(cut: Tensor, scale: Tensor, low: Tensor, top: int) -> Tensor:
    """Nearest codes, float32; scale and low float16, as they are kept."""
    step = scale.float()
    code = torch.where(step > 0, (cut - low.float()) / step, 0.0)
    return code.round_().clamp_(0, top)


def _fitted(cut: Tensor, top: int, over: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scale and least value of each block, float16, of least squared error among those tried."""

    def kept(step: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        low = low.clamp(-_HALF_MAX, _HALF_MAX).half()
        return step.clamp(0, _HALF_MAX).half(), low

    low = cut.amin(over, keepdim=True)
    held = low.clamp(-_HALF_MAX, _HALF_MAX).half().float()
    best = kept((cut.amax(over, keepdim=True) - held) / top, low)
    code = _codes(cut, *best, top)
    least = (cut - code * best[0].float() - best[1].float()).square().sum(over, keepdim=True)
    mean = cut.mean(over, keepdim=True)
    for _ in range(FITS):
        middle = code.mean(over, keepdim=True)
        away = code - middle
        spread = away.square().sum(over, keepdim=True)
        step = torch.where(spread > 0, (away * cut).sum(over, keepdim=True) / spread, 0.0)
        found = kept(step, mean - step * middle)
        code = _codes(cut, *found, top)
        error = (cut - code * found[0].float() - found[1].float()).square().sum(over, keepdim=True)
        better = error < least
        best = torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1])
        least = torch.minimum(error, least)
    return best


def turned(x: Tensor, frequencies: Tensor, start: int, *, back: bool) -> Tensor:
    """Rotary position embedding (Su et al. 2021), put on or, with ``back``, taken off.

    x: (..., tokens, channels) at positions from ``start``. frequencies: (pairs,) radians a
    token; channel i < pairs turns with channel i + pairs, and what is beyond stays.
    In float32; the two directions undo each other whatever the frequencies.
    """
    pairs = len(frequencies)
    at = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
    angle = at[:, None] * frequencies.to(x.device)
    cos, sin = angle.cos(), angle.sin()
    if back:
        sin = -sin
    x = x.float()
    one, two, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


def _symmetric_scale(cut: Tensor, bits: int, over: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scales as ggml chooses them: float16 to keep, and the inverse that codes are made with."""
    peak = cut.abs().amax(over, keepdim=True)
    if bits == 8:
        d = peak / 127
    else:  # the largest value, whatever its sign, lies on the lowest code
        highest = cut.amax(over, keepdim=True)
        d = torch.where(highest == peak, highest, -peak) / -(1 << (bits - 1))
    inverse = torch.where(d == 0, torch.zeros_like(d), d.reciprocal())
    return d.clamp(-_HALF_MAX, _HALF_MAX).half(), inverse


def unpack(p: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """Blocks -> values (..., n, d)."""
    codes = _spread(p.codes, bits)
    n, d = codes.shape[-2:]
    groups, runs = p.scale.shape[-3], p.scale.shape[-1]
    cut = codes.float().reshape(*codes.shape[:-2], groups, n // groups, runs, d // runs)
    scale = p.scale.float()[..., None]
    if p.low is None:
        cut = (cut - (1 << (bits - 1))) * scale
    else:
        cut = cut * scale + p.low.float()[..., None]
    return cut.flatten(-4, -3).flatten(-2).to(dtype)


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    """(..., n) codes below 2^bits -> (..., n bits / 8) bytes, from the low bits up."""
    if bits == 8:
        return codes
    apart = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    out: Tensor = apart[..., 0].clone()
    for i in range(1, 8 // bits):
        out |= apart[..., i] << (i * bits)
    return out


def _spread(raw: Tensor, bits: int) -> Tensor:
    """The inverse of `_squeeze`."""
    if bits == 8:
        return raw
    parts = [(raw >> (i * bits)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def hadamard(size: int) -> Tensor:
    """(size, size) float32, orthogonal and symmetric: Sylvester's construction, normalised.

    Raises `JoulesmithError` unless size is a power of two.
    """
    if size < 1 or size & (size - 1):
        raise JoulesmithError(
            f"heads of {size} channels cannot be rotated: a power of two is wanted"
        )
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(size)
