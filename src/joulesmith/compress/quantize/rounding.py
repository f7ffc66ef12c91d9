"""The default way to round one matrix: which Hessian, which effort. Knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from joulesmith.compress.quantize.gptq import Curvature, curvature, gptq
from joulesmith.compress.quantize.grids import Bytes, Format
from joulesmith.compress.quantize.integers import IntGrid

if TYPE_CHECKING:
    import torch

    from joulesmith.moments import Moments

EFFORTS = {"nearest": None, "fast": 2, "default": 2, "thorough": 6}
"""Sweeps of coordinate descent after the error-feedback pass; None rounds to nearest."""

GRADED = ("default", "thorough")
"""Efforts whose calibration takes gradients of all its text, which the Hessian weighs it by; the
others take those of a sample, to predict damage."""

FINE_BITS = 7.5
"""At eight bits a weight and more nothing is learned or tuned, and block types are rounded to
nearest: of what they lose, inputs rounded by the engine are most."""


def shared_curvature(moments: Moments | None, effort: str) -> Curvature | None:
    """Factor a layer's Hessian once for all types; None where rounding is to nearest."""
    if moments is None or EFFORTS[effort] is None:
        return None
    return curvature(moments.hessian)


def round_weight(
    weight: torch.Tensor,
    curve: Curvature | None,
    grid: Format,
    *,
    effort: str = "default",
    ranges: str | None = None,
) -> Bytes:
    """weight (rows, columns) float32 -> packed uint8 (rows, row bytes) on ``grid``.

    ranges: a way of `chosen.WAYS` to choose the scales of an integer grid; None for the
    search that goes with the grid.
    """
    sweeps = EFFORTS[effort]
    if ranges is not None:
        from joulesmith.compress.quantize.chosen import round_chosen

        return round_chosen(weight, curve, grid, ranges, sweeps=sweeps)
    if curve is None or sweeps is None:
        return grid.pack(weight)
    if grid.bits_per_weight > FINE_BITS and not isinstance(grid, IntGrid):
        return grid.pack(weight, curve.importance)
    return gptq(weight, curve, grid, sweeps=sweeps)


def coarseness(grid: Format, seed: int = 0) -> float:
    """Relative squared error of rounding normally distributed weights to nearest."""
    import torch

    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(seed))
    restored = torch.as_tensor(grid.unpack(grid.pack(w), 512))
    return float((restored - w).square().sum() / w.square().sum())
