"""The words of quantizers: which values share a scale, and what a scaled value may be.

A `Granularity` cuts a matrix into tiles, `Levels` are what a tile's values divided by
their step may become, a `Range` is a chosen step (and zero) for each tile. Weights
(rows, columns) and activations (tokens, channels) alike; values may also come as a
`Histogram` that saw batches. How to choose is told by `ranges` and its neighbours.

Everything that takes values raises `JoulesmithError` on NaN, infinity, nothing at all, or
a shape that the granularity does not cut into whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.grids import Grid
from joulesmith.compress.quantize.histograms import Histogram
from joulesmith.errors import JoulesmithError

Sample = Tensor | Histogram
"""Values at hand, or what was observed of values that are gone."""

CHUNK = 1 << 20
"""Values handled at a time."""
LARGEST = 1e15
"""Sums of squares of larger values do not fit float32."""


@dataclass(frozen=True)
class Granularity:
    """Tiles of (rows, columns) values that share a scale; 0 stands for all there are."""

    rows: int
    columns: int

    def _tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) != 2 or 0 in shape:
            raise JoulesmithError(f"ranges are those of a matrix with values, not of {shape}")
        tile = (self.rows or shape[0], self.columns or shape[1])
        if min(tile) < 1 or shape[0] % tile[0] or shape[1] % tile[1]:
            raise JoulesmithError(
                f"a matrix of {shape[0]} x {shape[1]} does not cut into tiles of "
                f"{tile[0]} x {tile[1]}: choose a size that divides it"
            )
        return tile

    def cut(self, x: Tensor) -> Tensor:
        """x (rows, columns) -> (tiles, values of a tile), tiles row by row."""
        r, c = self._tile(tuple(x.shape))
        apart = x.reshape(x.shape[0] // r, r, x.shape[1] // c, c)
        return apart.transpose(1, 2).reshape(-1, r * c)

    def paste(self, tiles: Tensor, shape: tuple[int, int]) -> Tensor:
        """The inverse of `cut`."""
        r, c = self._tile(shape)
        apart = tiles.reshape(shape[0] // r, shape[1] // c, r, c)
        return apart.transpose(1, 2).reshape(shape)

    def spread(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """scale (tiles,) -> (rows, columns): each value's own."""
        r, c = self._tile(shape)
        table = scale.reshape(shape[0] // r, shape[1] // c)
        return table.repeat_interleave(r, 0).repeat_interleave(c, 1)


TENSOR = Granularity(0, 0)
CHANNEL = Granularity(1, 0)
"""A row of weights (an output channel), or a token of activations."""
COLUMN = Granularity(0, 1)
"""An input channel."""


def group(columns: int) -> Granularity:
    """Runs of neighbouring columns of one row."""
    return Granularity(1, columns)


def block(rows: int, columns: int) -> Granularity:
    """Rectangles, as 128 x 128 in FP8 training."""
    return Granularity(rows, columns)


@dataclass(frozen=True)
class Levels:
    """What a scaled value may be, from low to high. affine: with an integer zero of its own."""

    low: float
    high: float
    affine: bool
    nearest: Callable[[Tensor], Tensor]

    @staticmethod
    def integers(bits: int, *, affine: bool = False, narrow: bool = False) -> Levels:
        """Integers of 2 to 8 bits: -2^(b-1) .. 2^(b-1) - 1, or 0 .. 2^b - 1 where affine.

        narrow: without the lowest one, so that both signs reach equally far.
        """
        if not 2 <= bits <= 8:
            raise JoulesmithError(f"integers have 2 to 8 bits, not {bits}")
        half = 1 << (bits - 1)
        low, high = (0, 2 * half - 1) if affine else (-half + narrow, half - 1)
        return Levels(low, high, affine, lambda u: u.round().clamp(low, high))

    @staticmethod
    def ternary() -> Levels:
        """-1, 0 and 1."""
        return Levels(-1, 1, False, lambda u: u.round().clamp(-1, 1))

    @staticmethod
    def of(grid: Grid) -> Levels:
        """The levels of a named grid, as E4M3's or NF4's; symmetric only."""
        if grid.affine:
            raise JoulesmithError(f"{grid.name} has offsets: use Levels.integers(affine=True)")
        return Levels(grid.levels[grid.first], grid.levels[grid.last], False, grid.nearest_level)


@dataclass(frozen=True)
class Range:
    """A chosen quantizer: ``value ~ step * (level - zero)``.

    step: (tiles,) float32 > 0; 1 for a tile of zeros. zero: (tiles,) float32, a whole
    level where levels are affine, else 0. A tile that spans all rows (or columns)
    serves matrices with any number of them.
    """

    step: Tensor
    zero: Tensor
    levels: Levels
    granularity: Granularity

    def codes(self, x: Tensor) -> Tensor:
        """x (rows, columns) -> nearest levels, float32, same shape."""
        step, zero = self._spread(x)
        return self.levels.nearest(x.float() / step + zero)

    def fake(self, x: Tensor) -> Tensor:
        """x (rows, columns) -> the values that it is rounded to."""
        step, zero = self._spread(x)
        return step * (self.levels.nearest(x.float() / step + zero) - zero)

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (x.shape[0], x.shape[1])
        step, zero = self.step.to(x.device), self.zero.to(x.device)
        return self.granularity.spread(step, shape), self.granularity.spread(zero, shape)


# -- shared by the ways to choose ---------------------------------------------


def between(low: Tensor, high: Tensor, levels: Levels, granularity: Granularity) -> Range:
    """The quantizer whose ends are these; zero is always held exactly."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if not levels.affine:
        step = torch.maximum(-low, high) / levels.high
        return settled(step, torch.zeros_like(step), levels, granularity)
    # halves first: the span itself may be beyond float32
    step = (high / 2 - low / 2) / ((levels.high - levels.low) / 2)
    zero = (levels.low - scales.safe_ratio(low, step)).round().clamp(levels.low, levels.high)
    return settled(step, zero, levels, granularity)


def settled(step: Tensor, zero: Tensor, levels: Levels, granularity: Granularity) -> Range:
    alive = step > 0
    return Range(
        torch.where(alive, step, torch.ones_like(step)),
        torch.where(alive, zero, torch.full_like(zero, levels.low if levels.affine else 0.0)),
        levels,
        granularity,
    )


def summed_error(v: Tensor, cost: Tensor, step: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """(tiles,) summed weighted squared error; a step of 0 rounds everything to 0."""
    s, z = step[:, None], zero[:, None]
    level = levels.nearest(scales.safe_ratio(v, s.expand_as(v)) + z)
    return (cost * (v - s * (level - z)).square()).sum(1)


def tiles_of(
    x: Sample, granularity: Granularity, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> values (tiles, n) float32, and the weights of their errors, of the same shape.

    Of a `Histogram` the means of bins and their counts. Raises as the module says.
    """
    values, cost = _tiles(x, granularity, weight)
    return values, torch.ones(1, 1).expand_as(values) if cost is None else cost


def _tiles(
    x: Sample, granularity: Granularity, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    if isinstance(x, Histogram):
        if granularity != (TENSOR if x.channels is None else COLUMN) or weight is not None:
            raise JoulesmithError(
                "a histogram has its own weights, and ranges of what it saw: all values (TENSOR), "
                "or each channel where it was made with channels (COLUMN)"
            )
        points = x.points()
        _check_ends(x.low.amin(), x.high.amax())
        return points
    t = torch.as_tensor(x).detach().to(device="cpu", dtype=torch.float32)
    values = granularity.cut(t)
    _check_ends(*torch.aminmax(t))
    if weight is None:
        return values, None
    cost = torch.as_tensor(weight).detach().to(device="cpu", dtype=torch.float32)
    try:
        cost = granularity.cut(torch.broadcast_to(cost, t.shape))
    except RuntimeError as error:
        raise JoulesmithError(
            f"weights of shape {tuple(cost.shape)} do not belong to values {tuple(t.shape)}"
        ) from error
    if not bool(torch.isfinite(cost).all()) or bool((cost < 0).any()):
        raise JoulesmithError("weights of errors must be finite and not negative")
    # a tile without weight is treated as if all its weights were one
    cost = torch.where(cost.amax(1, keepdim=True) > 0, cost, torch.ones_like(cost))
    return values, cost / cost.amax(1, keepdim=True)  # tiny weights have no room in float32


def _check_ends(low: Tensor, high: Tensor) -> None:
    if not bool(torch.isfinite(low) and torch.isfinite(high)):
        raise JoulesmithError("values hold NaN or infinity: they have no range")
    if max(-float(low), float(high)) > LARGEST:
        raise JoulesmithError(
            f"a value of magnitude {max(-float(low), float(high)):.4g} is too large to quantize: "
            "check the model it comes from"
        )


def by_chunks(f: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """f over runs of tiles (the first axis of each tensor), to bound memory; joined again."""
    n = max(1, CHUNK // tensors[0].shape[1])
    count = len(tensors[0])
    parts = [f(*(t[i : i + n] for t in tensors)) for i in range(0, count, n)]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))
