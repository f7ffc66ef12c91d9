"""Ranges of quantizers: the scale, and zero, of values that share them.

Pure functions of the values, a `Levels` and a `Granularity` (`tiles`). Knows no file format:
`grids` has those, and searches scales that the file can store with the same kernels
(`scales`). More ways: `entropy.kl`, `lsq.learned`, `second_order`.

Every function here raises `JoulesmithError` on NaN, infinity, nothing at all, or a
shape that the granularity does not cut into whole tiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from joulesmith.compress.quantize import scales
from joulesmith.compress.quantize.histograms import Histogram
from joulesmith.compress.quantize.tiles import (
    TENSOR,
    Granularity,
    Levels,
    Range,
    Sample,
    between,
    by_chunks,
    settled,
    summed_error,
    tiles_of,
)
from joulesmith.errors import JoulesmithError

# -- the plain ways -----------------------------------------------------------


def absmax(x: Sample, levels: Levels, granularity: Granularity = TENSOR) -> Range:
    """The whole range: ``step = max |x| / high``; from min (or 0) to max (or 0) if affine.

    Jacob et al. 2018, "Quantization and training", equations 1 and 12.
    """
    if isinstance(x, Histogram):
        tiles_of(x, granularity)
        return between(x.low, x.high, levels, granularity)
    values, _ = tiles_of(x, granularity)
    return between(*torch.aminmax(values, dim=1), levels, granularity)


def percentile(
    x: Sample, levels: Levels, granularity: Granularity = TENSOR, *, keep: float = 0.999
) -> Range:
    """The range that holds a share ``keep`` of the values; what lies beyond is clipped.

    Of ``|x|`` where symmetric; where affine, (1 - keep) / 2 is cut off at each end
    (Wu et al. 2020, "Integer quantization for deep learning inference", section 3.3).
    A quantile is the least value at or below which that share lies.
    """
    if not 0 < keep <= 1:
        raise JoulesmithError(f"the share kept lies in (0, 1], and is {keep}")
    values, cost = tiles_of(x, granularity)
    weight = cost if isinstance(x, Histogram) else None
    if levels.affine:
        low, high = (
            _quantile(values, weight, (1 - keep) / 2),
            _quantile(values, weight, (1 + keep) / 2),
        )
    else:
        high = _quantile(values.abs(), weight, keep)
        low = -high
    return between(low, high, levels, granularity)


def _quantile(values: Tensor, weight: Tensor | None, share: float) -> Tensor:
    ordered, order = values.sort(dim=1)
    if weight is None:
        n = values.shape[1]
        # a hair's breadth less than share * n, since 0.999 * 1000 is above 999 in floats
        return ordered[:, min(n - 1, max(0, math.ceil(share * n - 1e-6) - 1))]
    mass = weight.gather(1, order).double().cumsum(1)
    wanted = (share * mass[:, -1:] - 1e-6).clamp(min=mass.new_tensor(0.5))
    at = torch.searchsorted(mass, wanted).clamp(max=values.shape[1] - 1)
    return ordered.gather(1, at).squeeze(1)


# -- least squares ------------------------------------------------------------

RATIOS = (
    *((0.05 * (1.1 / 0.05) ** (k / 79)) for k in range(80)),
    *(0.86 + 0.01 * k for k in range(16)),
)
"""Steps tried, as shares of `absmax`'s: 4 % apart, since errors are flat around the best,
and 1 % near the whole range, where fine levels have theirs and errors are ragged."""


def mse_grid(
    x: Sample,
    levels: Levels,
    granularity: Granularity = TENSOR,
    *,
    weight: Tensor | None = None,
    ratios: tuple[float, ...] = RATIOS,
) -> Range:
    """The clipping that makes ``sum weight (x - value)^2`` least, of ratios to the whole range.

    The search of OMSE (Choukroun et al. 2019) and of AWQ's clipping (Lin et al. 2023).
    Where affine, both ends are first clipped alike, then each on its own. weight: shaped
    as x, >= 0, e.g. the mean square of a weight's input; not for a `Histogram`, which has
    its counts.
    """
    values, cost = tiles_of(x, granularity, weight)
    start = absmax(x, levels, granularity)
    if not levels.affine:

        def search(v: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            return _best_ratio(v, c, s, levels, ratios)

        (clipped,) = by_chunks(search, values, cost, start.step)
        return settled(clipped, start.zero, levels, granularity)
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    step, zero = by_chunks(
        lambda v, c, a, b: _best_ends(v, c, a, b, levels, granularity, ratios),
        values,
        cost,
        low,
        high,
    )
    return settled(step, zero, levels, granularity)


def mse(
    x: Sample,
    levels: Levels,
    granularity: Granularity = TENSOR,
    *,
    weight: Tensor | None = None,
    snap: scales.Snap | None = None,
) -> Range:
    """As `mse_grid`, by closed form: codes for a step, then the least-squares step for them.

    Lloyd's alternation (1982) from several starts, with the kernels that the file formats
    use (`scales.search_step`, `scales.search_zero`). weight: see `mse_grid`. snap: to the
    nearest step that can be stored, as `scales.half`; by default float32 steps.
    """
    keep = snap or (lambda s: s)
    values, cost = tiles_of(x, granularity, weight)
    if not levels.affine:
        landings = tuple(levels.high / r for r in RATIOS)

        def search(v: Tensor, c: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
            found = scales.search_step(v, c, levels.nearest, landings, keep, positive=True)
            (start,) = _best_ratio(v, c, whole, levels, RATIOS)
            other = scales.polish_step(v, c, levels.nearest, keep(start[:, None]), keep)[:, 0]
            zero = torch.zeros_like(found)
            one, two = (summed_error(v, c, s, zero, levels) for s in (found, other))
            return (torch.where(one <= two, found, other),)

        start = absmax(x, levels, granularity).step
        (step,) = by_chunks(search, values, cost, start)
        return settled(step, torch.zeros_like(step), levels, granularity)

    def search_both(v: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        low, high = v.amin(1).clamp(max=0), v.amax(1).clamp(min=0)
        clipped = _best_ends(v, c, low, high, levels, granularity, RATIOS)
        free = scales.search_affine(v, c, levels.high, keep, lambda o: o)
        starts = [(clipped[0], -clipped[0] * clipped[1]), free]
        found = [scales.search_zero(v, c, s, o, levels.high, keep) for s, o in starts]
        errors = [summed_error(v, c, s, z, levels) for s, z in found]
        first = errors[0] <= errors[1]
        return tuple(torch.where(first, a, b) for a, b in zip(*found, strict=True))

    step, zero = by_chunks(search_both, values, cost)
    return settled(step, zero, levels, granularity)


def _best_ratio(
    v: Tensor, cost: Tensor, step: Tensor, levels: Levels, ratios: tuple[float, ...]
) -> tuple[Tensor, ...]:
    zero = torch.zeros_like(step)
    best, best_error = step, summed_error(v, cost, step, zero, levels)
    for ratio in ratios:
        error = summed_error(v, cost, step * ratio, zero, levels)
        best = torch.where(error < best_error, step * ratio, best)
        best_error = torch.minimum(error, best_error)
    return (best,)


def _best_ends(
    v: Tensor,
    cost: Tensor,
    low: Tensor,
    high: Tensor,
    levels: Levels,
    granularity: Granularity,
    ratios: tuple[float, ...],
) -> tuple[Tensor, ...]:
    now = between(low, high, levels, granularity)
    best = [now.step, now.zero]
    ends = [torch.ones_like(low), torch.ones_like(high)]
    best_error = summed_error(v, cost, now.step, now.zero, levels)
    for moved in ((0, 1), (0,), (1,)):
        start = list(ends)
        for ratio in ratios:
            tried = [start[i] * ratio if i in moved else start[i] for i in (0, 1)]
            now = between(low * tried[0], high * tried[1], levels, granularity)
            error = summed_error(v, cost, now.step, now.zero, levels)
            better = error < best_error
            best = [torch.where(better, a, b) for a, b in zip((now.step, now.zero), best)]  # noqa: B905
            ends = [torch.where(better, a, b) for a, b in zip(tried, ends)]  # noqa: B905
            best_error = torch.minimum(error, best_error)
    return tuple(best)
