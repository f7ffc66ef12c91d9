"""Learned step size: a quantizer whose step, and offset, have gradients (LSQ, LSQ+).

`lsq` is what a training loop calls; `learned` uses it to choose the range of a tensor by
gradient alone, as `ranges` does by search. Knows no model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from joulesmith.compress.quantize.tiles import (
    CHANNEL,
    TENSOR,
    Granularity,
    Levels,
    Range,
    Sample,
    by_chunks,
    settled,
    summed_error,
    tiles_of,
)


class _Fake(torch.autograd.Function):
    """u = (x - offset) / step -> step * nearest(u) + offset, with straight-through gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        offset: Tensor,
        levels: Levels,
        scale: float,
    ) -> Tensor:
        u = (x - offset) / step
        level = levels.nearest(u)
        ctx.save_for_backward(u, level)
        ctx.levels, ctx.scale = levels, scale
        return step * level + offset

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad
        u, level = ctx.saved_tensors
        inside = (u > ctx.levels.low) & (u < ctx.levels.high)
        to_step = g * torch.where(inside, level - u, level) * ctx.scale
        to_offset = torch.where(inside, 0.0, g) * ctx.scale
        return torch.where(inside, g, 0.0), to_step, to_offset, None, None


def lsq(
    x: Tensor,
    step: Tensor,
    levels: Levels,
    granularity: Granularity = TENSOR,
    *,
    offset: Tensor | None = None,
    gradient_scale: float | None = None,
) -> Tensor:
    """x (rows, columns) rounded to ``step * level + offset``, differentiable in all three.

    step, offset: (tiles,), offset real and not a level (LSQ+). Gradients, with
    u = (x - offset) / step: by step ``nearest(u) - u`` inside the levels and the end level
    outside (LSQ, Esser et al. 2020, equation 3); by x 1 inside, 0 outside; by offset
    0 inside, 1 outside (LSQ+, Bhalgat et al. 2020, section 3.1). Those by step and
    offset are scaled by ``gradient_scale``, by default LSQ's ``1 / sqrt(N high)`` with
    N the values of a tile (section 2.2). Raises `JoulesmithError` where tiles do not fit.
    """
    shape = (x.shape[0], x.shape[1])
    wide = granularity.spread(step, shape)
    shift = x.new_zeros(()) if offset is None else granularity.spread(offset, shape)
    if gradient_scale is None:
        gradient_scale = 1 / math.sqrt(x.numel() / step.numel() * levels.high)
    out: Tensor = _Fake.apply(x, wide, shift.expand_as(x), levels, gradient_scale)  # type: ignore[no-untyped-call]
    return out


def learned(
    x: Sample,
    levels: Levels,
    granularity: Granularity = TENSOR,
    *,
    weight: Tensor | None = None,
    iterations: int = 120,
    rate: float = 0.1,
) -> Range:
    """The step (and zero) that `lsq`'s gradients lead to when they reduce squared error.

    Adam on the logarithm of the step (and on the offset in units of the range), from
    LSQ's ``2 mean |x| / sqrt(high)`` where symmetric and the whole range where affine,
    its rate falling linearly to 0; each tile keeps the best it has passed. What is learned at
    the same cost while a model trains is the same gradient, of the model's loss instead.
    weight: as in `ranges.mse`. Raises as `ranges` does.
    """
    values, cost = tiles_of(x, granularity, weight)

    def descend(v: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return _learn(v, c, levels, iterations, rate)

    step, zero = by_chunks(descend, values, cost)
    return settled(step, zero, levels, granularity)


def _learn(
    v: Tensor, cost: Tensor, levels: Levels, iterations: int, rate: float
) -> tuple[Tensor, ...]:
    total = cost.sum(1).clamp(min=1e-30)
    if levels.affine:
        low, high = v.amin(1).clamp(max=0), v.amax(1).clamp(min=0)
        start = (high - low) / (levels.high - levels.low)
        begin = low - levels.low * start
    else:
        start = 2 * (cost * v.abs()).sum(1) / total / math.sqrt(levels.high)
        begin = torch.zeros_like(start)
    alive = start > 0
    # everything below is in units of the first step, so that one rate suits all tiles
    unit = torch.where(alive, start, 1.0)
    u = v / unit[:, None]
    log_step = torch.zeros_like(unit, requires_grad=True)
    span = levels.high - levels.low
    share = (begin / unit / span).requires_grad_(levels.affine)
    moved = [log_step, share] if levels.affine else [log_step]
    best = _Best(u, cost, levels)
    adam = torch.optim.Adam(moved, lr=rate, betas=(0.8, 0.99))
    for k in range(iterations):
        best.see(log_step.detach().exp(), share.detach() * span)
        adam.param_groups[0]["lr"] = rate * (1 - k / iterations)
        adam.zero_grad()
        step = log_step.exp()
        out = lsq(u, step, levels, CHANNEL, offset=share * span, gradient_scale=1.0)
        loss: Any = (cost * (out - u).square()).sum()
        loss.backward()
        adam.step()
    best.see(log_step.detach().exp(), share.detach() * span)
    return torch.where(alive, best.step * unit, 0.0), best.zero


class _Best:
    """The least error each tile has shown, with the zero a whole level as it will be stored."""

    def __init__(self, u: Tensor, cost: Tensor, levels: Levels) -> None:
        self.u, self.cost, self.levels = u, cost, levels
        self.step = torch.ones(len(u))
        self.zero = torch.zeros(len(u))
        self.error = torch.full((len(u),), torch.inf)

    def see(self, step: Tensor, offset: Tensor) -> None:
        zero = torch.zeros_like(step)
        if self.levels.affine:
            zero = (-offset / step).round().clamp(self.levels.low, self.levels.high)
        error = summed_error(self.u, self.cost, step, zero, self.levels)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.step = torch.where(better, step, self.step)
        self.zero = torch.where(better, zero, self.zero)
