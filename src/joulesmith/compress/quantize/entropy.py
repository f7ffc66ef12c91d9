"""The range under which a histogram keeps its information: calibration by KL divergence.

Migacz 2017, "8-bit inference with TensorRT". Knows histograms and levels; no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.compress.quantize.histograms import BINS, Histogram
from joulesmith.compress.quantize.tiles import (
    TENSOR,
    Granularity,
    Levels,
    Range,
    Sample,
    between,
    tiles_of,
)

RATIOS = tuple(k / 96 for k in range(96, 2, -1))
"""Ends tried, as shares of the farthest value; the farthest wins a tie."""
TILES = 64
"""Histograms held at a time where they are made of a tensor here."""


def kl(x: Sample, levels: Levels, granularity: Granularity = TENSOR, *, bins: int = BINS) -> Range:
    """The clipping that makes ``KL(P || Q)`` least.

    P is the histogram with what lies beyond the ends moved into the outermost bins; Q
    spreads what each level holds of the unclipped counts evenly over the non-empty bins
    that round to it. Ends are at least as far apart as there are levels of bins, below
    which a level is a bin and Q is P. Where affine, both ends are clipped alike first,
    then each on its own. bins: of the histogram made of a tensor. Made for activations
    at 8 bits: at few bits it clips far more than least squares asks for, see docs.
    """
    if isinstance(x, Histogram):
        tiles_of(x, granularity)
        seen = [x]
    else:
        values, _ = tiles_of(x, granularity)
        seen = []
        for start in range(0, len(values), TILES):
            part = values[start : start + TILES]
            histogram = Histogram(len(part), bins=bins)
            histogram.observe(part.T)
            seen.append(histogram)
    ends = [_ends(h, k, levels) for h in seen for k in range(len(h.counts))]
    low, high = torch.tensor(ends, dtype=torch.float32).T
    return between(low, high, levels, granularity)


def _ends(histogram: Histogram, channel: int, levels: Levels) -> tuple[float, float]:
    low = min(0.0, float(histogram.low[channel]))
    high = max(0.0, float(histogram.high[channel]))
    if low == high:
        return low, high
    middles, counts = histogram.points()
    v, n = middles[channel].double(), counts[channel].double()
    used = n > 0
    v, n = v[used], n[used]
    width = 2 * float(histogram.reach[channel]) / histogram.bins
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    if not levels.affine:
        far = max(-low, high)
        ends = far * ratios
        ends = ends[ends >= levels.high * width]
        if not len(ends):
            return -far, far
        best = float(ends[_divergence(v, n, -ends, ends, levels).argmin()])
        return -best, best
    a, b = low, high
    least = torch.full((), torch.inf, dtype=torch.float64)
    for moved in ((0, 1), (0,), (1,)):
        lows = a * ratios if 0 in moved else torch.full_like(ratios, a)
        highs = b * ratios if 1 in moved else torch.full_like(ratios, b)
        wide = highs - lows >= (levels.high - levels.low) * width
        lows, highs = lows[wide], highs[wide]
        if not len(lows):
            continue
        found = _divergence(v, n, lows, highs, levels)
        k = int(found.argmin())
        if found[k] < least:
            least, a, b = found[k], float(lows[k]), float(highs[k])
    return a, b


def _divergence(v: Tensor, n: Tensor, low: Tensor, high: Tensor, levels: Levels) -> Tensor:
    """v, n (bins,): values, ascending, and their counts > 0; low, high (ends,) -> KL (ends,)."""
    r = between(low, high, levels, TENSOR)
    step, zero = r.step.double()[:, None], r.zero.double()[:, None]
    # half a unit of float32 of slack: the ends were rounded to it
    inside = (v >= low[:, None] * (1 + 1e-7)) & (v <= high[:, None] * (1 + 1e-7))
    kept = torch.where(inside, n, 0.0)
    p = kept.clone()
    rows = torch.arange(len(p))
    # what lies below goes to the first bin inside, what lies above to the last
    below = torch.where(v < low[:, None], n, 0.0).sum(1) * ~inside[:, 0]
    index = torch.arange(len(v)).expand_as(inside)
    first = torch.where(inside, index, len(v)).amin(1)
    last = torch.where(inside, index, -1).amax(1)
    some = last >= 0
    first, last = first.clamp(max=len(v) - 1), last.clamp(min=0)
    p[rows, first] += below
    p[rows, last] += torch.where(inside, 0.0, n).sum(1) - below
    level = levels.nearest((v / step + zero).float())
    # bins ascend, so levels do: number them by where they change
    change = (level[:, 1:] != level[:, :-1]).long()
    cell = torch.cat([torch.zeros(len(level), 1, dtype=torch.long), change.cumsum(1)], 1)
    held = torch.zeros_like(p).scatter_add_(1, cell, kept)
    members = torch.zeros_like(p).scatter_add_(1, cell, inside.double())
    q = torch.where(inside, (held / members.clamp(min=1)).gather(1, cell), 0.0)
    total = n.sum()
    q = q / q.sum(1, keepdim=True).clamp(min=1e-300)
    p = p / total
    terms = torch.where(p > 0, p * torch.log(p / q.clamp(min=1e-300)), 0.0)
    return torch.where(some, terms.sum(1), torch.inf)
