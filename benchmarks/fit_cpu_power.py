"""Fits the constants of `joulesmith.energy.power_curve` on published power tables.

    python benchmarks/fit_cpu_power.py WALL.csv SWEEPS.csv

WALL.csv:   servers at the wall (SPECpower_ssj2008): columns cpu, year, chips, cores,
            tdp_w_per_chip, idle_w, w_at_10 ... w_at_100 (watts).
SWEEPS.csv: RAPL package watts against load: columns cpu, tdp_w_per_socket, sweep,
            cpu_load_percent, rapl_package_w. Sweeps named "some_cores" (a few cores
            flat out, as inference does) enter the shape; all sweeps enter the ends.

Prints the constants. ``power_model.py`` beside this file tells their errors.
"""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, minimize_scalar

from joulesmith.energy.power_curve import WAKE_LOAD, Curve, Wall

Array = NDArray[np.float64]
LOADS: Array = np.linspace(0, 1, 11)
FIRST_YEAR = 2014
CPU_SHARE_IDLE, CPU_SHARE_MAX = 0.6, 0.75
"""Processors' share of a lean server's wall watts: less the supply's loss (0.9), then
memory, fans, disks and board. The datacenter literature has 0.61 at full load with more
memory than these benchmark machines carry (Barroso et al., The Datacenter as a Computer)."""
SMALL = 8
"""Cores of a chip up to which an Intel server is of the class "small" (Xeon E3, E)."""


@dataclass(frozen=True)
class Server:
    """One row of WALL.csv. tdp: of all chips together; watts: idle to full load, (11,)."""

    cpu: str
    year: int
    chips: int
    cores: int
    tdp: float | None
    watts: Array

    @property
    def kind(self) -> str:
        if re.match(r"epyc|opteron", self.cpu):
            return "amd"
        return "small" if self.cores / self.chips <= SMALL else "intel"

    @property
    def family(self) -> str:
        """Generation: what is left out together when errors are told."""
        if m := re.match(r"xeon(?:platinum|gold|silver|bronze)\d(\d)", self.cpu):
            return f"Xeon Scalable {m[1]}"
        if m := re.match(r"epyc\d\d\d(\d)", self.cpu):
            return f"EPYC 700{m[1]}"
        if m := re.match(r"xeone-(\d\d)", self.cpu):
            return f"Xeon E-{m[1]}00"
        if m := re.match(r"xeone(\d)-.*?(v\d)?$", self.cpu):
            return f"Xeon E{m[1]} {m[2] or 'v1'}"
        return re.sub(r"\d\d$", "", self.cpu)

    @property
    def shape(self) -> Array:
        """(power - idle) / (max - idle), (11,)."""
        return (self.watts - self.watts[0]) / (self.watts[-1] - self.watts[0])


@dataclass(frozen=True)
class Sweep:
    """One RAPL sweep. load: 0..1, rising; watts: of the package."""

    cpu: str
    name: str
    tdp: float
    load: Array
    watts: Array

    @property
    def shape(self) -> Array:
        return (self.watts - self.watts[0]) / (self.watts.max() - self.watts[0])


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def servers(path: Path) -> list[Server]:
    """Every machine of WALL.csv."""
    return [
        Server(
            r["cpu"],
            int(r["year"]),
            int(r["chips"]),
            int(r["cores"]),
            float(r["tdp_w_per_chip"]) * int(r["chips"]) if r["tdp_w_per_chip"] else None,
            np.array([float(r["idle_w"])] + [float(r[f"w_at_{k}"]) for k in range(10, 101, 10)]),
        )
        for r in _rows(path)
    ]


def sweeps(path: Path) -> list[Sweep]:
    """Every sweep of SWEEPS.csv."""
    groups: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for r in _rows(path):
        name = "some cores" if "some_cores" in r["sweep"] else "all cores"
        key = (r["cpu"], name, float(r["tdp_w_per_socket"]))
        point = (float(r["cpu_load_percent"]) / 100, float(r["rapl_package_w"]))
        groups.setdefault(key, []).append(point)
    found = []
    for (cpu, name, tdp), points in groups.items():
        p = np.array(sorted(points))
        found.append(Sweep(cpu, name, tdp, p[:, 0], p[:, 1]))
    return found


def fit_curve(machines: list[Server]) -> Curve:
    """Jump and bend by least squares of relative errors of power; each machine counts the same."""
    s = -np.expm1(-LOADS / WAKE_LOAD)
    a, b = [], []
    for m in machines:
        weight = (m.watts[-1] - m.watts[0]) / m.watts.mean()
        a.append(np.stack([s - LOADS, LOADS**4 - LOADS], axis=1) * weight)
        b.append((m.shape - LOADS) * weight)
    # g = load + jump (s - load) + (1 - jump) bend (load^4 - load): linear in two unknowns.
    x = lsq_linear(np.concatenate(a), np.concatenate(b), bounds=(0, 0.99)).x
    return Curve(1.0, round(float(x[0]), 3), round(float(min(1.0, x[1] / (1 - x[0]))), 3))


def _middle(values: list[float]) -> float:
    return float(np.exp(np.log(values).mean()))


def fit_wall(machines: list[Server]) -> Wall:
    """The class constants of these machines; idle and max as geometric means over TDP."""
    known = [(m, m.tdp) for m in machines if m.tdp]
    idle = _middle([m.watts[0] / tdp for m, tdp in known])
    top = _middle([m.watts[-1] / tdp for m, tdp in known])
    return Wall(round(idle, 3), round(top, 3), fit_curve(machines))


def fit_walls(machines: list[Server]) -> dict[str, Wall]:
    """Every class that occurs since FIRST_YEAR, and "any" for the others: the mean of classes."""
    recent = [m for m in machines if m.year >= FIRST_YEAR]
    found = {
        kind: fit_wall([m for m in recent if m.kind == kind])
        for kind in sorted({m.kind for m in recent})
    }
    found["any"] = fit_wall(recent)
    return found


def fit_package(recent: list[Server], rapl: list[Sweep]) -> tuple[float, float, float]:
    """(idle over TDP, max over TDP, exponent) of the package.

    Ends: geometric mean of what the sweeps say and what the walls say once the
    processors' share is taken. Exponent: least mean |error| of g, few-core sweeps
    and wall curves as two kinds of evidence that count the same. (Of the mixtures
    tried, this one has the least error on a processor left out.)
    """
    wall = fit_wall(recent)
    by_cpu: dict[str, list[Sweep]] = {}
    for s in rapl:
        by_cpu.setdefault(s.cpu, []).append(s)
    idle, top = [], []
    for group in by_cpu.values():
        idle.append(min(s.watts.min() for s in group) / group[0].tdp)
        top.append(_middle([s.watts.max() / s.tdp for s in group]))
    few = [s for s in rapl if s.name == "some cores"]

    def loss(e: float) -> float:
        of_sweeps = np.mean([np.abs(s.load**e - s.shape).mean() for s in few])
        return float(of_sweeps + np.mean([np.abs(LOADS**e - m.shape).mean() for m in recent]))

    return (
        round(_middle([_middle(idle), wall.idle * CPU_SHARE_IDLE]), 3),
        round(_middle([_middle(top), wall.max * CPU_SHARE_MAX]), 3),
        round(float(minimize_scalar(loss, bounds=(0.05, 1.0), method="bounded").x), 2),
    )


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__)
        return 2
    machines, rapl = servers(Path(argv[0])), sweeps(Path(argv[1]))
    recent = [m for m in machines if m.year >= FIRST_YEAR]
    print(f"{len(recent)} servers since {FIRST_YEAR}, {len(rapl)} sweeps")
    for kind, w in fit_walls(machines).items():
        n = sum(kind in ("any", m.kind) for m in recent)
        c = w.curve
        print(f"wall {kind}: idle {w.idle} max {w.max} jump {c.jump} bend {c.bend}   ({n} servers)")
    idle, top, exponent = fit_package([m for m in recent if m.tdp], rapl)
    print(f"package: idle {idle} max {top} exponent {exponent}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
