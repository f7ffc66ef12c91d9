"""How a machine's draw lies between idle and full load, and where both lie against TDP.

    P = idle + (max - idle) * g(load)
    g = jump * s + (1 - jump) * ((1 - bend) * load ** exponent + bend * load ** 4)
    s = 1 - exp(-load / 0.03)

``jump`` is what waking costs (deep sleep states of the package end with the first
busy core), ``bend`` what the last clock steps cost. Knows watts and load; knows no
processors' names and no windows.

Two boundaries, never mixed:

``wall``     all that the plug sees: processors, memory, fans, disks, the supply's loss.
             Fitted on SPECpower_ssj2008 results of 2014 and later, by class of machine.
``package``  processor packages only, as RAPL counts them. Fitted on RAPL sweeps of two
             processors, and on the wall curves with the processors' share taken out.

``benchmarks/fit_cpu_power.py`` prints every constant here; ``benchmarks/power_model.py``
its error on families of machines that were left out of the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Boundary = Literal["package", "wall"]

WAKE_LOAD = 0.03
"""Load at which 63 % of the jump is paid: below the first tenth that was measured."""


@dataclass(frozen=True)
class Curve:
    """g: 0 at load 0, 1 at load 1, never falling. jump, bend: 0..1; exponent: 0..1, above 0."""

    exponent: float = 1.0
    jump: float = 0.0
    bend: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.exponent <= 1 and 0 <= self.jump <= 1 and 0 <= self.bend <= 1):
            raise ValueError(f"power curve out of range: {self}")

    def __call__(self, load: float) -> float:
        """Share of the draw above idle at a load (clipped to 0..1)."""
        x = min(1.0, max(0.0, load))
        rest = (1.0 - self.bend) * math.pow(x, self.exponent) + self.bend * x**4
        return min(1.0, self.jump * -math.expm1(-x / WAKE_LOAD) + (1.0 - self.jump) * rest)


@dataclass(frozen=True)
class Wall:
    """A class of machines at the wall: idle and maximum over the chips' TDP, and the curve."""

    idle: float
    max: float
    curve: Curve


LINE = Curve()
"""A small share of a big machine: a curve's small piece is a line."""

WALL = {
    "amd": Wall(0.221, 0.913, Curve(1.0, jump=0.198, bend=0.179)),
    "intel": Wall(0.172, 1.083, Curve(1.0, jump=0.118, bend=0.350)),
    "small": Wall(0.187, 0.800, Curve(1.0, jump=0.025, bend=0.410)),
    "any": Wall(0.184, 1.005, Curve(1.0, jump=0.119, bend=0.335)),
}
"""AMD EPYC (27 machines), Intel servers (81), Intel chips of up to 8 cores (15), and all
of them together for what is none of these."""

PACKAGE = Curve(0.69)
PACKAGE_IDLE = {"board": 0.3}
PACKAGE_IDLE_ELSE = 0.117
PACKAGE_MAX = {"server": 0.694, "board": 1.0, "laptop": 0.9, "desktop": 0.9}
"""Over TDP. Fitted for servers; assumed for the rest: laptops and desktops stay near
their sustained limit, and the figure that the table holds for boards is a measured one."""


def package_ends(kind: str) -> tuple[float, float]:
    """Idle and maximum of a processor package over its TDP."""
    return PACKAGE_IDLE.get(kind, PACKAGE_IDLE_ELSE), PACKAGE_MAX.get(kind, PACKAGE_MAX["server"])


def wall_class(vendor: str, kind: str, cores_per_socket: int | None) -> Wall:
    """The class of a bare machine.

    vendor: as in ``/proc/cpuinfo`` or plain "AMD", "Intel". kind: server, desktop,
    laptop or board. cores_per_socket: ``None`` when unknown.
    """
    amd = "AMD" in vendor or vendor == "HygonGenuine"
    intel = "Intel" in vendor
    if kind == "server" and amd:
        return WALL["amd"]
    if kind == "server" and intel:
        few = cores_per_socket is not None and cores_per_socket <= 8
        return WALL["small" if few else "intel"]
    return WALL["small" if (amd or intel) and kind in ("desktop", "laptop") else "any"]
