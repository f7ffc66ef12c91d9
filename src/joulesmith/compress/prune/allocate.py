"""How many zeros each layer gets, so that all together are so many.

Knows sizes, scores and predicted damages; not how they were got.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST, MOST = 0.0, 0.95
_OCTAVES, _PARTS = 192, 32


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """The same share everywhere."""
    return dict.fromkeys(sizes, sparsity)


@dataclass
class Thresholds:
    """Counts of scores by size, layer by layer, to find one threshold for all of them."""

    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, name: str, score: Tensor) -> None:
        """score: any shape, larger is dearer; negative ones count as least."""
        bins = (torch.log2(score.flatten().clamp_min(1e-30)) + _OCTAVES / 2) * _PARTS
        index = bins.clamp(0, _OCTAVES * _PARTS - 1).long()
        self.counts[name] = torch.bincount(index, minlength=_OCTAVES * _PARTS).numpy()

    def shares(self, sparsity: float) -> dict[str, float]:
        """Layer -> share of its scores below the threshold that makes ``sparsity`` of all zero."""
        total = np.sum(list(self.counts.values()), axis=0)
        below = np.cumsum(total)
        wanted = sparsity * below[-1]
        at = int(np.searchsorted(below, wanted))
        rest = wanted - (below[at - 1] if at else 0)
        part = rest / max(total[at], 1)  # of the bin in which the threshold lies
        return {
            name: float((c[:at].sum() + part * c[at]) / c.sum()) for name, c in self.counts.items()
        }


@dataclass(frozen=True)
class Curve:
    """A layer's predicted damage at two sparsities, in nats a token. size: its weights."""

    size: int
    low: tuple[float, float]
    high: tuple[float, float]

    def exponent(self) -> tuple[float, float]:
        """(a, b) of the damage exp(a s + b) through both points; a is above 0."""
        (s0, d0), (s1, d1) = self.low, self.high
        y0, y1 = np.log(max(d0, 1e-30)), np.log(max(d1, 1e-30))
        a = max(float((y1 - y0) / (s1 - s0)), 1e-3)
        return a, float(y0 - a * s0)

    def damage(self, sparsity: float) -> float:
        """Nats a token."""
        a, b = self.exponent()
        return float(np.exp(a * sparsity + b))


def by_damage(curves: Mapping[str, Curve], sparsity: float) -> dict[str, float]:
    """Shares that make ``sparsity`` of all weights zero at the least predicted damage.

    Damages of layers add up (to first order in what is lost); where each grows as exp(a s + b),
    the best shares have the same slope a exp(a s + b) / size. Shares stay in [LEAST, MOST], or
    halfway to all where so many shall go that MOST is not enough.
    """
    names = list(curves)
    size = np.array([curves[n].size for n in names], float)
    a, b = np.array([curves[n].exponent() for n in names]).T
    most = max(MOST, (1 + sparsity) / 2)

    def at(log_slope: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.clip((log_slope + np.log(size / a) - b) / a, LEAST, most)
        return found

    low, high = -200.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        if at(middle) @ size < sparsity * size.sum():
            low = middle
        else:
            high = middle
    return dict(zip(names, map(float, at(low)), strict=True))
