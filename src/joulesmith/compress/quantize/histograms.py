"""What was observed of values that come in batches: exact ends and a histogram, in fixed memory.

For activations, of which no more than a batch is held at a time. Knows no quantizer:
`ranges` chooses scales from a `Histogram` as it does from a tensor, `activations` those of
static inputs. Bins are equal, not logarithmic, since levels of integers are, and since
`entropy` asks for it; who expects values far from the usual takes more of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from joulesmith.errors import JoulesmithError

BINS = 4096
"""Over both signs; a range that has just doubled still has a quarter of them on each side."""


class Histogram:
    """Counts over [-reach, reach] in equal bins, and the mean of the values in each bin.

    channels: None for one histogram of all values; a number for one of each column of
    batches (..., channels). bins: even. When a value lies beyond reach, reach doubles and
    neighbouring bins merge, so that every count stays exact whatever the order of batches.
    Memory: 16 bytes a bin and channel. Means rather than middles of bins keep exact
    what repeats, such as the zeros of a ReLU.
    """

    def __init__(self, channels: int | None = None, *, bins: int = BINS) -> None:
        if bins < 2 or bins % 2:
            raise JoulesmithError(f"a histogram has an even number of bins, not {bins}")
        if channels is not None and channels < 1:
            raise JoulesmithError(f"a histogram has one channel or more, not {channels}")
        self.channels, self.bins = channels, bins
        n = channels or 1
        self.counts = torch.zeros(n, bins, dtype=torch.float64)
        self.sums = torch.zeros(n, bins, dtype=torch.float64)
        self.reach = torch.zeros(n, dtype=torch.float64)
        self.low = torch.full((n,), torch.inf)
        self.high = torch.full((n,), -torch.inf)

    def observe(self, x: Tensor) -> None:
        """Take in a batch of any shape; its last axis is the channels where they are apart.

        Raises `JoulesmithError` on NaN, infinity, or a last axis of another length.
        """
        x = x.detach().to(device="cpu", dtype=torch.float32)
        if self.channels is None:
            x = x.reshape(1, -1)
        elif x.ndim < 1 or x.shape[-1] != self.channels:
            raise JoulesmithError(
                f"a batch of shape {tuple(x.shape)} does not end in {self.channels} channels"
            )
        else:
            x = x.reshape(-1, self.channels).T
        if not x.numel():
            return
        low, high = torch.aminmax(x, dim=1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise JoulesmithError("activations hold NaN or infinity: check the model and its input")
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._widen(torch.maximum(-low, high).double())
        values = x.double()
        # Where all was zero so far there is no reach yet, and any will do.
        unit = torch.where(self.reach > 0, self.reach, 1.0)[:, None]
        cell = ((values / unit + 1) * (self.bins / 2)).long().clamp_(0, self.bins - 1)
        if self.channels is None:  # several times as fast as scattering
            self.counts[0] += torch.bincount(cell[0], minlength=self.bins)
            self.sums[0] += torch.bincount(cell[0], values[0], minlength=self.bins)
            return
        self.counts.scatter_add_(1, cell, torch.ones_like(values))
        self.sums.scatter_add_(1, cell, values)

    def _widen(self, peak: Tensor) -> None:
        """Double each channel's reach until ``peak`` (channels,) is within."""
        fresh = (self.reach == 0) & (peak > 0)
        self.reach = torch.where(fresh, peak, self.reach)
        ratio = torch.where(peak > self.reach, peak / self.reach.clamp(min=5e-324), 1.0)
        doublings = torch.ceil(torch.log2(ratio)).long().clamp(min=0)
        half = self.bins // 2
        for times in sorted(set(doublings.tolist())):
            if times == 0:
                continue
            rows = doublings == times
            # counted from the middle, bin k becomes bin k >> times
            away = torch.arange(half) >> min(times, 62)
            target = torch.cat([half - 1 - away.flip(0), half + away])
            for kept in (self.counts, self.sums):
                part = kept[rows]
                kept[rows] = torch.zeros_like(part).index_add_(1, target, part)
            # 2^times at once: repeated doubling in float64 is exact as well
            self.reach[rows] = self.reach[rows] * 2.0**times

    @property
    def total(self) -> Tensor:
        """(channels,) values seen."""
        return self.counts.sum(1)

    def points(self) -> tuple[Tensor, Tensor]:
        """-> values (channels, bins) float32 ascending in each row, and their counts.

        An empty bin has count 0 and for value its middle, or the nearest end of what was seen.
        Raises `JoulesmithError` where a
        channel has seen nothing.
        """
        if bool((self.total == 0).any()):
            raise JoulesmithError("nothing was observed: run calibration text through the model")
        unit = torch.where(self.reach > 0, self.reach, 1.0)[:, None]
        middle = ((torch.arange(self.bins) + 0.5) * (2 / self.bins) - 1) * unit
        mean = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), middle)
        low, high = self.low[:, None], self.high[:, None]
        return torch.minimum(torch.maximum(mean.float(), low), high), self.counts.float()
