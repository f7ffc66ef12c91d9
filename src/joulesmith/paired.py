"""Ratios of things measured in turn. Knows numbers; not what they are numbers of.

A machine's speed drifts, so two things timed minutes apart are not comparable. Run
them in rounds whose order rotates, take the ratio within each round, and quote the
median over rounds: what drifts slowly cancels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

_T = TypeVar("_T")
_DRAWS = 4000


@dataclass(frozen=True)
class PairedRatio:
    """joules(other) / joules(ours) over rounds; falls back to seconds where joules are unknown.

    low, high: 95 % interval of the median. pairs: rounds. spread: least and greatest round.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    spread: tuple[float, float]
    of: Literal["joules", "seconds"]


def rotated(items: Sequence[_T], turn: int) -> list[_T]:
    """The order of round ``turn``: each item comes first equally often."""
    shift = turn % len(items) if items else 0
    return [*items[shift:], *items[:shift]]


def paired_ratio(
    other: Sequence[float],
    ours: Sequence[float],
    of: Literal["joules", "seconds"],
    seed: int = 0,
) -> PairedRatio:
    """Median over rounds of other / ours, with a 95 % bootstrap interval of the median.

    other, ours: one figure a round, same length; rounds in which ours is 0 are left out.
    Raises ValueError when no round is left.
    """
    values = [a / b for a, b in zip(other, ours, strict=True) if b]
    low, high = median_interval(values, seed=seed)
    return PairedRatio(
        ratio=float(median(values)),
        low=low,
        high=high,
        pairs=len(values),
        spread=(min(values), max(values)),
        of=of,
    )


def median_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the median (Efron's percentiles). Raises ValueError when empty.

    With fewer than six values it is their whole spread; with one it is that value, which
    says nothing of how far another run would be off.
    """
    if not values:
        raise ValueError("no values to take the median of")
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(_DRAWS))
    tail = (1 - level) / 2
    return medians[int(tail * _DRAWS)], medians[min(_DRAWS - 1, int((1 - tail) * _DRAWS))]
