"""A joule with its pedigree. Knows no devices: only what a figure is worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Pedigree = Literal["measured", "modelled", "assumed"]
_WORST: tuple[Pedigree, ...] = ("measured", "modelled", "assumed")


@dataclass(frozen=True)
class Part:
    """One device's share of a `Reading`. ``joules`` in joules, ``None`` when unknown."""

    device: str
    joules: float | None
    low: float | None
    high: float | None
    pedigree: Pedigree | None
    source: str


@dataclass(frozen=True)
class Reading:
    """Energy over one window.

    joules:   total joules, idle included; ``None`` when nothing is known (never 0).
    marginal: joules above idle; ``None`` when idle power is not known.
    low/high: 90 % interval of ``joules``.
    seconds:  wall time of the window. ``cpu_seconds``: CPU time of the processes watched.
    pedigree: the least sure pedigree among ``parts``.
    """

    joules: float | None
    seconds: float
    low: float | None = None
    high: float | None = None
    pedigree: Pedigree | None = None
    marginal: float | None = None
    cpu_seconds: float | None = None
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def watts(self) -> float | None:
        """Mean power in watts, ``None`` when energy is unknown or the window is empty."""
        if self.joules is None or self.seconds <= 0:
            return None
        return self.joules / self.seconds

    def per(self, count: float) -> Reading:
        """The same reading divided by ``count`` things (tokens, steps), seconds included."""
        if count <= 0:
            raise ValueError(f"count must be positive, got {count}")

        def d(x: float | None) -> float | None:
            return None if x is None else x / count

        return replace(
            self,
            joules=d(self.joules),
            seconds=self.seconds / count,
            low=d(self.low),
            high=d(self.high),
            marginal=d(self.marginal),
            cpu_seconds=d(self.cpu_seconds),
            parts=tuple(
                replace(p, joules=d(p.joules), low=d(p.low), high=d(p.high)) for p in self.parts
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def worst(pedigrees: Iterable[Pedigree | None]) -> Pedigree | None:
    """The least sure of several pedigrees; ``None`` if none is known."""
    known = [p for p in pedigrees if p is not None]
    return max(known, key=_WORST.index) if known else None
