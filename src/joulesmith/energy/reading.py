"""A joule with its pedigree. Knows no devices: only what a figure is worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Pedigree = Literal["measured", "modelled", "assumed"]
_WORST: tuple[Pedigree, ...] = ("measured", "modelled", "assumed")


@dataclass(frozen=True)
class Part:
    """One device's share of a `Reading`. ``joules`` in joules, ``None`` when unknown.

    within: the device whose joules already hold these ("core-0" is within
    "package-0"), so that they are shown but not summed; ``None`` for the others.
    """

    device: str
    joules: float | None
    low: float | None
    high: float | None
    pedigree: Pedigree | None
    source: str
    within: str | None = None


@dataclass(frozen=True)
class Reading:
    """Energy over one window.

    joules:   total joules, idle included; ``None`` when nothing is known (never 0).
    marginal: joules above idle; ``None`` when idle power is not known.
    low/high: 90 % interval of ``joules``.
    seconds:  wall time of the window. ``cpu_seconds``: CPU time of the processes watched.
    pedigree: the least sure pedigree among ``parts``.
    parts:    by device; those with ``within`` unset add up to ``joules``, unless an
              external meter was given: then ``joules`` are what that meter said.
    machine:  the whole machine where something counts it (an external meter, a
              battery); never added to the parts.
    peak_memory_bytes:   most resident memory of the processes watched at one time;
              pages that processes share count once for each.
    device_memory_bytes: most GPU memory in use at one time.
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
    machine: Part | None = None
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None

    @property
    def watts(self) -> float | None:
        """Mean power in watts, ``None`` when energy is unknown or the window is empty."""
        if self.joules is None or self.seconds <= 0:
            return None
        return self.joules / self.seconds

    def per(self, count: float) -> Reading:
        """The same reading divided by ``count`` things (tokens, steps), seconds included.

        Peak memory is not divided: it is no sum over things.
        """
        if count <= 0:
            raise ValueError(f"count must be positive, got {count}")

        def d(x: float | None) -> float | None:
            return None if x is None else x / count

        def part(p: Part) -> Part:
            return replace(p, joules=d(p.joules), low=d(p.low), high=d(p.high))

        return replace(
            self,
            joules=d(self.joules),
            seconds=self.seconds / count,
            low=d(self.low),
            high=d(self.high),
            marginal=d(self.marginal),
            cpu_seconds=d(self.cpu_seconds),
            parts=tuple(part(p) for p in self.parts),
            machine=None if self.machine is None else part(self.machine),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Reading:
        """The reading that `to_dict` gave. Raises TypeError for other fields."""
        machine = fields.get("machine")
        return cls(
            **{
                **fields,
                "parts": tuple(Part(**p) for p in fields.get("parts", ())),
                "notes": tuple(fields.get("notes", ())),
                "machine": None if machine is None else Part(**machine),
            }
        )


def worst(pedigrees: Iterable[Pedigree | None]) -> Pedigree | None:
    """The least sure of several pedigrees; ``None`` if none is known."""
    known = [p for p in pedigrees if p is not None]
    return max(known, key=_WORST.index) if known else None
