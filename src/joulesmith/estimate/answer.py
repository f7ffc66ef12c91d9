"""What every estimate is made of: figures with 90 % intervals, and the constants that they rest on.
Knows neither models nor devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from joulesmith.errors import JoulesmithError


@dataclass(frozen=True)
class Figure:
    """A positive quantity in the unit its name says, and its 90 % interval; ``low`` and ``high``
    are `value` where nothing about it is uncertain."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high < math.inf:
            raise JoulesmithError(f"not a figure: {self.value:g} ({self.low:g} to {self.high:g})")

    @classmethod
    def exact(cls, value: float) -> Figure:
        """Known from the shape alone."""
        return cls(value, value, value)

    @classmethod
    def within(cls, value: float, factor: float) -> Figure:
        """Between ``value / factor`` and ``value * factor``; factor at least 1."""
        return cls(value, value / factor, value * factor)

    def times(self, x: float) -> Figure:
        """In another unit, or of ``x`` of them; x at least 0."""
        return Figure(self.value * x, self.low * x, self.high * x)

    def per(self, x: float) -> Figure:
        """Of one of ``x``; x above 0."""
        return self.times(1 / x)


@dataclass(frozen=True)
class Constant:
    """A number that an estimate rests on. basis: "fitted" (to measurements, by a script in
    benchmarks/), "published" (a vendor's or a paper's figure) or "assumed" (nobody measured it for
    this case). source: where from, one phrase."""

    name: str
    value: float
    unit: str
    basis: str
    source: str

    def __post_init__(self) -> None:
        if self.basis not in ("fitted", "published", "assumed"):
            raise JoulesmithError(f"not a basis: {self.basis}")
