"""A window's parts from its two ends: what each device counted, and their sum.

Pure functions of what sources said; knows no sources and no clocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from joulesmith.energy.reading import Part, Reading, worst
from joulesmith.energy.source import Count, Device


@dataclass(frozen=True)
class Snapshot:
    """One end of a window: clock, CPU seconds of ours and of the machine, counts."""

    t: float
    cpu: float | None
    busy: float | None
    counts: dict[str, Count] = field(default_factory=dict)


def of_the_processor(part: Part, processors: set[str]) -> bool:
    """True for what the model of processor and memory stands in for."""
    return bool({part.device, part.within} & processors) or part.device.startswith("dram")


def measured(d: Device, a: Snapshot, b: Snapshot, seconds: float) -> tuple[Part, str | None]:
    """A device's part, and what is to be said about it.

    Its interval is the device's relative error, one step of the counter at either end
    and what sampling may have missed, in quadrature; upwards also what a restart lost.
    """
    unknown = Part(d.name, None, None, None, None, d.how, d.within)
    start, end = a.counts.get(d.name), b.counts.get(d.name)
    if start is None or end is None:
        return unknown, None
    if start.epoch != end.epoch:
        return unknown, f"{d.name}: counting was interrupted in this window"
    joules = max(0.0, end.joules - start.joules)
    missing = max(0.0, end.missing - start.missing)
    variance = max(0.0, end.variance - start.variance)
    said = None
    if joules == 0.0 and d.within is None:
        # Not moved is not "no energy": in so short a window, or because it is stuck.
        if seconds >= 2 * d.step:
            said = f"{d.name}: the counter stands still"
        if start.watts is None or end.watts is None or seconds <= 0:
            return unknown, said
        joules = 0.5 * (start.watts + end.watts) * seconds
        variance += (0.5 * joules) ** 2 if said else 0.0
        if joules == 0.0:
            return unknown, said
    edge = min(1.0, d.step / seconds) * joules if seconds > 0 else joules
    half = math.hypot(d.error * joules, edge, math.sqrt(variance))
    low, high = max(0.0, joules - half), joules + half + missing
    return Part(d.name, joules, low, high, "measured", d.how, d.within), said


def add_up(
    parts: list[Part],
    marginals: list[float | None],
    seconds: float,
    cpu: float | None,
    notes: list[str],
) -> Reading:
    """Adds what is known; devices' errors are independent, so half-widths add in quadrature."""
    known = [p for p in parts if p.joules is not None and p.within is None]
    joules = low = high = None
    if known:
        joules = math.fsum(p.joules or 0.0 for p in known)
        below = math.hypot(*((p.joules or 0.0) - (p.low or 0.0) for p in known))
        above = math.hypot(*((p.high or 0.0) - (p.joules or 0.0) for p in known))
        low, high = max(0.0, joules - below), joules + above
    marginal = None
    if joules is not None and all(m is not None for m in marginals):
        marginal = min(joules, math.fsum(m or 0.0 for m in marginals))
    return Reading(
        joules=joules,
        seconds=seconds,
        low=low,
        high=high,
        pedigree=worst(p.pedigree for p in known),
        marginal=marginal,
        cpu_seconds=cpu,
        parts=tuple(parts),
        notes=tuple(dict.fromkeys(notes)),
    )
