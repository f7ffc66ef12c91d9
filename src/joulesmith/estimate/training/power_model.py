"""Watts of a device and of its host while training, from the share of its peak that it reaches.

    device = idle + (sustained - idle) x MFU^exponent
    host   = share x sustained

Clocks, leakage and data movement do not wait for the matrix units, so that a chip at a fifth of its
peak draws well over half of what it may: the exponent is far below 1. The host (processors, memory,
network cards, fans, the supply's loss) hardly depends on the work. Fitted to measured averages of
whole systems: benchmarks/estimate_training.py. Knows no models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.devices import Device
from joulesmith.estimate.training.constants import shipped, value

SUSTAINED = "sustained share of "
IDLE_SHARE = 0.13
"""Of TDP, where idle power is unknown: the median of what was measured of accelerators."""


@dataclass(frozen=True)
class Draw:
    """Watts of one device at work and of its share of the host. idle: of the device, powered and
    without work. factor: the 90 % interval is between watts / factor and watts x factor."""

    idle: float
    device: float
    host: float
    factor: float

    @property
    def total(self) -> Figure:
        return Figure.within(self.device + self.host, self.factor)


def draw(
    device: Device,
    mfu: float,
    *,
    exponent: float | None = None,
    host_share: float | None = None,
    factor: float | None = None,
) -> Draw:
    """Watts at ``mfu`` of the peak; the constants are those shipped where not given.

    Raises `JoulesmithError` where nothing is published of the device's power.
    """
    sustained = sustained_watts(device)
    idle = min(idle_watts(device), sustained)
    power = value("exponent of power") if exponent is None else exponent
    share = value("host") if host_share is None else host_share
    whole = device.tdp_covers in ("system", "superchip")  # the host is inside the figure
    return Draw(
        idle=idle,
        device=idle + (sustained - idle) * min(1.0, mfu) ** power,
        host=0.0 if whole else share * sustained,
        factor=value("interval of power") if factor is None else factor,
    )


def given(watts: float, device: Device) -> Draw:
    """A user's own watts of a device with its share of the host, certain."""
    if not (0 < watts < math.inf):
        raise JoulesmithError(f"power is {watts:g}: give watts a device, host included")
    try:
        idle = min(watts, idle_watts(device))
    except JoulesmithError:  # nothing is published: no part of it is told as idle
        idle = 0.0
    return Draw(idle=idle, device=watts, host=0.0, factor=1.0)


def sustained_watts(device: Device) -> float:
    if device.tdp_w is None:
        raise JoulesmithError(
            f"no power is known: {device.name}: give watts a device, or tdp_w in a file of devices"
        )
    share = shipped().get(SUSTAINED + device.generation)
    return device.tdp_w * (share.value if share else 1.0)


def idle_watts(device: Device) -> float:
    return device.idle_w if device.idle_w is not None else IDLE_SHARE * sustained_watts(device)


def constants(device: Device) -> tuple[Constant, ...]:
    names = ("exponent of power", "host", "interval of power", SUSTAINED + device.generation)
    return tuple(shipped()[n] for n in names if n in shipped())
