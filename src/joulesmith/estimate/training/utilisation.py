"""Model FLOPs utilisation (MFU) of a training run that nobody has run yet, and its interval.

MFU here is 6 N D / (seconds x devices x peak): N the weights that a token uses, D tokens, the
16-bit dense peak; without attention and recomputation, as hours of published runs give it.

    MFU = base x generation x size x devices^slope x mixture x run x fp8
    size = (1 + (N_half (peak / 312e12)^1.5 / N)^(1/3))^-exponent

A matrix product loses time at its edges and to launches, in proportion to 1/width; width grows as
N^(1/3), and the width that fills a chip as the square root of its peak. Everything else is a
factor, shrunk towards 1 in the fit; generations that were not seen have the factor 1. What is left
is mostly who trains: it does not shrink with data and is the interval.

Knows no model by name, no watts and no plans. The fit: benchmarks/estimate_training.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.answer import Constant, Figure
from joulesmith.estimate.devices import Device, precision_name
from joulesmith.estimate.training.constants import GENERATION, shipped, value

REFERENCE_PEAK = 312e12
"""FLOP/s: an A100's, at which the half size is told."""
REFERENCE_DEVICES = 100.0
Z90 = 1.6449
MOST = 0.9
"""No run has come near its peak."""


@dataclass(frozen=True)
class Coefficients:
    """Factors of the module's formula. devices: per tenfold of devices. run: whole runs, with
    restarts and evaluations, against steady steps. spread: standard deviation of log MFU, of a
    generation that was seen; unseen: of another's."""

    base: float
    half_size: float
    exponent: float
    devices: float
    mixture: float
    run: float
    fp8: float
    spread: float
    unseen: float
    generations: Mapping[str, float]


@lru_cache(maxsize=1)
def fitted() -> Coefficients:
    """As shipped."""
    known = shipped()
    return Coefficients(
        base=value("utilisation"),
        half_size=value("half size"),
        exponent=value("exponent of size"),
        devices=value("ten times the devices"),
        mixture=value("mixture of experts"),
        run=value("whole run"),
        fp8=value("fp8"),
        spread=value("spread of utilisation"),
        unseen=value("spread of an unseen generation"),
        generations={
            n.removeprefix(GENERATION): c.value
            for n, c in known.items()
            if n.startswith(GENERATION)
        },
    )


def peak_of(device: Device, precision: str) -> float:
    """FLOP/s that utilisation is a share of: of 16-bit matrices, also where the products are in
    fp8 (the factor `fp8` says what that gains); of 32-bit ones for tf32 and fp32.

    Raises `JoulesmithError` where the device's rate is unknown or nothing trains in the precision.
    """
    name = precision_name(precision)
    if name in ("int8", "int4", "fp4"):
        raise JoulesmithError(f"precision {name}: training: give bf16, fp16, fp8, tf32 or fp32")
    peak = device.peak("bf16" if name == "fp8" else name)
    if peak is None:
        raise JoulesmithError(
            f"no {name} rate is known: {device.name}: give another device or its rate in a file"
        )
    return peak


def gains_fp8(device: Device, precision: str) -> bool:
    """Whether products run in fp8 there."""
    return precision_name(precision) == "fp8" and device.runs_as("fp8") == "fp8"


def usual_devices(flops: float, peak: float) -> float:
    """Devices of a run of ``flops`` that takes the usual time; at least 1. For runs of which
    nobody says how many there are: the count that the fit took too."""
    seconds = value("usual days of a run") * 86400
    return max(1.0, flops / (peak * value("usual utilisation of a run") * seconds))


def predict(
    device: Device,
    active: float,
    devices: float,
    *,
    precision: str = "bf16",
    mixture: bool = False,
    steady: bool = False,
    coefficients: Coefficients | None = None,
) -> Figure:
    """MFU of training a model of ``active`` weights a token on so many devices, with its 90 %
    interval.

    mixture: of experts. steady: of the steps alone; otherwise of a whole run as published hours
    count it. The value is the one of least expected relative error in hours, exp(spread^2) above
    the median, because hours may turn out several times longer but not several times shorter
    than nothing. Raises as `peak_of` does.
    """
    median, spread = centre(
        device, active, devices, precision=precision, mixture=mixture, steady=steady,
        coefficients=coefficients,
    )  # fmt: skip
    low, high = median * math.exp(-Z90 * spread), median * math.exp(Z90 * spread)
    point = median * math.exp(spread**2)
    return Figure(min(point, MOST), min(low, MOST), min(high, MOST))


def centre(
    device: Device,
    active: float,
    devices: float,
    *,
    precision: str = "bf16",
    mixture: bool = False,
    steady: bool = False,
    coefficients: Coefficients | None = None,
) -> tuple[float, float]:
    """Median of MFU and the standard deviation of its logarithm."""
    c = coefficients or fitted()
    if not (active > 0 and devices >= 1):
        raise JoulesmithError(f"{active:g} weights on {devices:g} devices: give at least one each")
    peak = peak_of(device, precision)
    median = c.base * c.generations.get(device.generation, 1.0)
    median *= size_factor(active, peak, c.half_size) ** c.exponent
    median *= c.devices ** math.log10(devices / REFERENCE_DEVICES)
    median *= (c.mixture if mixture else 1) * (1 if steady else c.run)
    median *= c.fp8 if gains_fp8(device, precision) else 1
    spread = c.spread if device.generation in c.generations else c.unseen
    return median, spread


def size_factor(active: float, peak: float, half_size: float) -> float:
    """Share of its best rate that a chip reaches on matrices of a model of that size."""
    half = half_size * (peak / REFERENCE_PEAK) ** 1.5
    return float(1 / (1 + (half / active) ** (1 / 3)))


def given(share: float) -> Figure:
    """A user's own figure, certain. Raises `JoulesmithError` outside (0, 1]."""
    if not 0 < share <= 1:
        raise JoulesmithError(f"utilisation is {share:g}: give a share of the peak, such as 0.4")
    return Figure.exact(share)


def constants(device: Device) -> tuple[Constant, ...]:
    """What `predict` rests on."""
    names = (
        "utilisation", "half size", "exponent of size", "ten times the devices",
        "mixture of experts", "whole run", "fp8", "spread of utilisation",
        GENERATION + device.generation,
    )  # fmt: skip
    return tuple(shipped()[n] for n in names if n in shipped())
