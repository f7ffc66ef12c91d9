"""The scale of a block: the one that makes weighted squared error least.

Pure functions on groups of weights that share one scale. Knows no file format:
what a format can store is passed in as ``snap``.

The search follows the usual two steps: guess scales, round, then solve for the
scale that is best for those codes (weighted least squares), as llama.cpp's
``make_qx_quants`` and ``make_qkx3_quants`` do. Guesses here cover both signs of
the scale and both ends of the range, and the winner is polished by alternating
codes and scale (Lloyd's algorithm) on the values that will really be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Round = Callable[[Tensor], Tensor]
"""Multiples of the step, any shape -> nearest levels on offer, same shape."""

Snap = Callable[[Tensor], Tensor]
"""A wanted scale -> the nearest one that the format stores."""

POLISH = 4
"""Passes of Lloyd's algorithm after the search."""
_ZERO_STEPS = 2
"""Integer zeros tried on either side of the one that least squares asks for."""


def half(x: Tensor) -> Tensor:
    """The nearest finite float16, as float32."""
    return x.clamp(-65504.0, 65504.0).half().float()


def safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where ``b`` is 0 or the ratio is not finite."""
    ratio = a / b
    return torch.where(torch.isfinite(ratio), ratio, torch.zeros_like(ratio))


def search_step(
    x: Tensor,
    weight: Tensor,
    round_: Round,
    landings: Sequence[float],
    snap: Snap = half,
    *,
    positive: bool = False,
) -> Tensor:
    """The step of each group that makes ``sum(weight * (x - step * level)^2)`` least.

    x, weight: (n, group), weight >= 0. landings: where on the level axis the
    largest weight is tried (``step = largest / landing``). positive: for engines that
    know no negative scales. Returns (n,), snapped.
    """
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    if positive:
        peak = peak.abs()
    wx = weight * x
    best_gain = torch.full_like(peak, -1.0)
    best = torch.zeros_like(peak)
    for landing in landings:
        level = round_(x * safe_ratio(torch.full_like(peak, landing), peak))
        weighted = weight * level
        along = (wx * level).sum(1, keepdim=True)
        norm = (weighted * level).sum(1, keepdim=True)
        step = safe_ratio(along, norm)
        gain = step * along  # the error falls from sum(weight x^2) by this
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, step, best)
    return polish_step(x, weight, round_, snap(best), snap).squeeze(1)


def polish_step(x: Tensor, weight: Tensor, round_: Round, step: Tensor, snap: Snap) -> Tensor:
    """Lloyd's alternation from ``step`` (n, 1), which it never makes worse; (n, 1)."""
    level = round_(safe_ratio(x, step))
    error = (weight * (x - step * level).square()).sum(1, keepdim=True)
    for _ in range(POLISH):
        weighted = weight * level
        tried = snap(
            safe_ratio((weighted * x).sum(1, keepdim=True), (weighted * level).sum(1, keepdim=True))
        )
        level = round_(safe_ratio(x, tried))
        now = (weight * (x - tried * level).square()).sum(1, keepdim=True)
        better = now < error
        if not bool(better.any()):
            break
        step = torch.where(better, tried, step)
        error = torch.where(better, now, error)
    return step


def search_power(x: Tensor, weight: Tensor, round_: Round, top: float) -> Tensor:
    """The power of two that makes ``sum(weight * (x - step * level)^2)`` least.

    x, weight: (n, group), weight >= 0. top: the largest level. Tried are the power under
    which the largest weight lands in the top binade, and two on either side of it.
    Returns (n,), from 2^-126 to 2^126.
    """
    peak = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    first = torch.floor(torch.log2(peak / top)).clamp(-120, 126)
    best = torch.zeros_like(peak)
    best_error = torch.full_like(peak, torch.inf)
    for shift in (2, 1, 0, -1, -2):
        step = torch.exp2((first + shift).clamp(-126, 126))
        level = round_(x / step)
        error = (weight * (x - step * level).square()).sum(1, keepdim=True)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    return best.squeeze(1)


def search_affine(
    x: Tensor,
    weight: Tensor,
    top: float,
    snap_step: Snap = half,
    snap_offset: Snap = half,
    offset_at_most: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Step and offset of each group: ``x ~ step * level + offset``, level in 0..top.

    x, weight: (n, group), weight >= 0. ``offset_at_most=0`` for the formats whose
    offset is a subtracted, non-negative minimum. Returns two (n,), snapped.
    """
    low = x.amin(1, keepdim=True)
    high = x.amax(1, keepdim=True)
    if offset_at_most is not None:
        low = low.clamp(max=offset_at_most)
    span = (high - low).clamp(min=0)

    def solve(level: Tensor) -> tuple[Tensor, Tensor]:
        return _affine_least_squares(x, weight, level, offset_at_most)

    def loss(step: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        level = (safe_ratio(x - offset, step)).round().clamp(0, top)
        return level, (weight * (x - step * level - offset).square()).sum(1, keepdim=True)

    best_step = snap_step(span / top)
    best_offset = snap_offset(low)
    _, best_error = loss(best_step, best_offset)
    for start, stop in _affine_trials(top):
        # the range [low, high] is laid on the level axis as [start, stop]
        guess = span / (stop - start)
        level = (safe_ratio(x - low, guess) + start).round().clamp(0, top)
        step, offset = solve(level)
        step, offset = snap_step(step), snap_offset(offset)
        _, error = loss(step, offset)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_offset = torch.where(better, offset, best_offset)
    for _ in range(POLISH):
        level, _ = loss(best_step, best_offset)
        step, offset = solve(level)
        step, offset = snap_step(step), snap_offset(offset)
        _, error = loss(step, offset)
        better = error < best_error
        if not bool(better.any()):
            break
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_offset = torch.where(better, offset, best_offset)
    return best_step.squeeze(1), best_offset.squeeze(1)


def search_zero(
    x: Tensor, weight: Tensor, step: Tensor, offset: Tensor, top: float, snap: Snap = half
) -> tuple[Tensor, Tensor]:
    """The best integer zero near ``-offset / step``, and the best step for it.

    ``x ~ step * (code - zero)``, code and zero whole numbers in 0..top. x, weight:
    (n, group), weight >= 0; step, offset: (n,), as from `search_affine`. Returns two
    (n,), the step snapped and not negative.
    """
    near = safe_ratio(-offset, step).round()
    best_step, best_zero = step, near.clamp(0, top)
    best = torch.full_like(step, torch.inf)
    for move in range(-_ZERO_STEPS, _ZERO_STEPS + 1):
        zero = (near + move).clamp(0, top)[:, None]
        # A group of one sign has its zero beyond the range: the step must grow for it.
        reach = torch.maximum(
            safe_ratio(x.amax(1, keepdim=True), top - zero),
            safe_ratio(-x.amin(1, keepdim=True), zero),
        )
        for start in (step[:, None], snap(reach)):
            now = start
            for _ in range(POLISH):
                code = (safe_ratio(x, now) + zero).round().clamp(0, top)
                along = code - zero
                norm = (weight * along * along).sum(1, keepdim=True)
                fit = safe_ratio((weight * along * x).sum(1, keepdim=True), norm)
                now = snap(fit.clamp(min=0))
                code = (safe_ratio(x, now) + zero).round().clamp(0, top)
                error = (weight * (x - now * (code - zero)).square()).sum(1)
                better = error < best
                best = torch.where(better, error, best)
                best_step = torch.where(better, now[:, 0], best_step)
                best_zero = torch.where(better, zero[:, 0], best_zero)
    return best_step, best_zero


def _affine_trials(top: float) -> list[tuple[float, float]]:
    clip = [0.0, 0.35, 0.7, 1.1] if top > 3 else [-0.3, 0.0, 0.2, 0.4]
    both = [(-a, top + b) for a in clip for b in clip]
    # codes that leave the ends unused are how a coarser scale looks when re-read
    inner = [(0.0, top - 1.0), (0.0, top - 2.0), (0.5, top - 0.5)] if top > 3 else []
    return both + inner


def _affine_least_squares(
    x: Tensor, weight: Tensor, level: Tensor, offset_at_most: float | None
) -> tuple[Tensor, Tensor]:
    total = weight.sum(1, keepdim=True)
    mean_x = safe_ratio((weight * x).sum(1, keepdim=True), total)
    mean_l = safe_ratio((weight * level).sum(1, keepdim=True), total)
    centred = level - mean_l
    along = (weight * centred * (x - mean_x)).sum(1, keepdim=True)
    norm = (weight * centred.square()).sum(1, keepdim=True)
    step = safe_ratio(along, norm).clamp(min=0)
    offset = mean_x - step * mean_l
    if offset_at_most is not None:
        over = offset > offset_at_most
        through = safe_ratio(
            (weight * level * (x - offset_at_most)).sum(1, keepdim=True),
            (weight * level.square()).sum(1, keepdim=True),
        ).clamp(min=0)
        step = torch.where(over, through, step)
        offset = offset.clamp(max=offset_at_most)
    return step, offset
