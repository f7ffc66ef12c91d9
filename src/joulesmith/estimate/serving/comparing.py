"""Ways of serving one model side by side: kinds of device, precisions, engines.

Each stands on the fewest devices that hold the model and meet the latency limit, at its best batch
under that limit. Knows no files and no machine at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.model.shape import Shape
from joulesmith.estimate.serving.serve import Served, best_batch, fewest_devices, serve
from joulesmith.estimate.serving.setup import Setup, Traffic

MOST_TRIES = 4
"""Doublings of the devices that are tried for the sake of latency."""


@dataclass(frozen=True)
class Compared:
    """One way. served: None where there is none, and why_not says why. ratio: joules a token over
    those of the first way that works; low, high: its 90 % interval, if the errors of the two have
    nothing in common, which is more than they may differ. within: whether that interval holds 1, so
    that either may be the cheaper one; None of the first."""

    name: str
    served: Served | None
    why_not: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    within: bool | None = None


def compare(
    shape: Shape,
    setups: Sequence[Setup],
    traffic: Traffic | None = None,
    *,
    latency_s: float | None = None,
    devices: int | None = None,
    batch: int | None = None,
    **given: Any,
) -> tuple[Compared, ...]:
    """Each of ``setups`` at its best.

    devices: of each, None for the fewest that hold the model and meet the limit. batch: of each,
    None for that of the fewest joules a token whose steps take at most ``latency_s``. given: as
    `serve` takes. Raises `JoulesmithError` where none of them works.
    """
    if not setups:
        raise JoulesmithError("nothing to compare: give devices")
    traffic = traffic or Traffic()
    rows: list[Compared] = []
    for setup, name in zip(setups, _names(setups), strict=True):
        try:
            found = _best(shape, setup, traffic, latency_s, devices, batch, given)
            rows.append(Compared(name, found))
        except JoulesmithError as e:
            rows.append(Compared(name, None, str(e)))
    first = next((r.served for r in rows if r.served is not None), None)
    if first is None:
        raise JoulesmithError(rows[0].why_not)
    return tuple(_against(r, first) for r in rows)


def _best(
    shape: Shape, setup: Setup, traffic: Traffic, latency_s: float | None, devices: int | None,
    batch: int | None, given: dict[str, Any],
) -> Served:  # fmt: skip
    if devices is not None:
        counts = [devices]
    else:
        least = fewest_devices(shape, setup, replace(traffic, batch=batch or 1))
        counts = [least << k for k in range(MOST_TRIES + 1)]
    for n in counts:
        trial = replace(setup, devices=n)
        if batch is not None:
            found: Served | None = serve(shape, trial, replace(traffic, batch=batch), **given)
            if latency_s is not None and found is not None and found.seconds.value > latency_s:
                found = None
        else:
            found = best_batch(shape, trial, traffic, latency_s, **given)
            if found is None:  # of one sequence: whether memory is what is missing
                serve(shape, trial, replace(traffic, batch=1), **given)
        if found is not None:
            return found
    fastest = serve(shape, trial, replace(traffic, batch=batch or 1), **given)
    limit = 0.0 if latency_s is None else latency_s
    raise JoulesmithError(
        f"a step takes {fastest.seconds.value * 1e3:.3g} ms on {n} x {setup.device.name}, more "
        f"than {limit * 1e3:.3g} ms: give a higher latency, more devices or fewer bits per weight"
    )


def _against(row: Compared, first: Served) -> Compared:
    if row.served is None:
        return row
    a, b = row.served.joules_per_token, first.joules_per_token
    ratio = a.value / b.value
    if row.served is first:
        return replace(row, ratio=1.0, low=1.0, high=1.0)
    apart = math.exp(math.hypot(math.log(a.high / a.value), math.log(b.high / b.value)))
    low, high = ratio / apart, ratio * apart
    return replace(row, ratio=ratio, low=low, high=high, within=low <= 1 <= high)


def _names(setups: Sequence[Setup]) -> list[str]:
    """By what they differ in, the device always."""
    words = [
        [s.device.name, _weights(s), f"cache {s.cache_bits:g} bits", s.engine or "usual engine"]
        for s in setups
    ]
    told = [i for i in range(1, 4) if len({w[i] for w in words}) > 1]
    return [", ".join([w[0], *(w[i] for i in told)]) for w in words]


def _weights(setup: Setup) -> str:
    if setup.weights is None:
        return "as given"
    named = isinstance(setup.weights, str) and not setup.weights[:1].isdigit()
    return str(setup.weights) if named else f"{setup.bits:g} bits"
