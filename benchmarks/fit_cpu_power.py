"""Fits the constants of `joulesmith.energy.cpu_power` on published power tables.

    python benchmarks/fit_cpu_power.py WALL.csv SWEEPS.csv

WALL.csv:   servers at the wall (SPECpower_ssj2008): columns year, chips,
            tdp_w_per_chip, idle_w, w_at_10 ... w_at_100 (watts).
SWEEPS.csv: RAPL package watts against load: columns cpu, tdp_w_per_socket, sweep,
            cpu_load_percent, rapl_package_w. Only sweeps named "some_cores" (a few
            cores flat out, as inference does) enter the shape.

Prints the constants, each with its error on machines left out of the fit.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, minimize_scalar

Array = NDArray[np.float64]
Curve = tuple[Array, Array]  # load 0..1, (power - idle) / (max - idle)
FIRST_YEAR = 2016
SUPPLY = 0.9  # share of the wall's load-dependent watts that reach the chips


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def walls(path: Path) -> tuple[Array, Array]:
    """Watts (n, 11) from idle to full load, and the chips' TDP together (n,)."""
    power, tdp = [], []
    for r in rows(path):
        if not r["tdp_w_per_chip"] or int(r["year"]) < FIRST_YEAR:
            continue
        power.append([float(r["idle_w"])] + [float(r[f"w_at_{k}"]) for k in range(10, 101, 10)])
        tdp.append(float(r["tdp_w_per_chip"]) * float(r["chips"]))
    return np.array(power), np.array(tdp)


def sweeps(path: Path) -> tuple[list[Curve], Array]:
    """Shape curves of the few-cores sweeps; (idle, max) over TDP by CPU, (n, 2)."""
    groups: dict[str, list[tuple[float, float]]] = {}
    tdp: dict[str, float] = {}
    for r in rows(path):
        if "some_cores" in r["sweep"]:
            point = (float(r["cpu_load_percent"]) / 100, float(r["rapl_package_w"]))
            groups.setdefault(r["cpu"], []).append(point)
            tdp[r["cpu"]] = float(r["tdp_w_per_socket"])
    curves, ends = [], []
    for cpu, points in groups.items():
        p = np.array(sorted(points))
        idle, top = p[0, 1], p[-1, 1]
        curves.append((p[:, 0], (p[:, 1] - idle) / (top - idle)))
        ends.append((idle / tdp[cpu], top / tdp[cpu]))
    return curves, np.array(ends)


def shape_error(a: float, curves: list[Curve]) -> float:
    """Mean absolute error of load ** a, each curve counting the same."""
    return float(np.mean([np.abs(g - x**a).mean() for x, g in curves]))


def fit_shape(wall: list[Curve], cores: list[Curve]) -> float:
    """The exponent in (0, 1] with both kinds of curve counting the same."""

    def loss(a: float) -> float:
        return shape_error(a, wall) + shape_error(a, cores)

    return float(minimize_scalar(loss, bounds=(0.05, 1.0), method="bounded").x)


def slope(tdp: Array, watts: Array) -> float:
    """Watts per watt of TDP; what does not grow with TDP (fans, disks) is the intercept, >= 0."""
    a = np.stack([np.ones_like(tdp), tdp], axis=1)
    w = 1 / watts  # relative errors, so that an 8-socket machine does not decide alone
    fit = lsq_linear(a * w[:, None], watts * w, bounds=([0, 0], [np.inf, np.inf]))
    return float(fit.x[1])


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__)
        return 2
    power, tdp = walls(Path(argv[0]))
    cores, ends = sweeps(Path(argv[1]))
    load = np.linspace(0, 1, 11)
    wall = [(load, (p - p[0]) / (p[-1] - p[0])) for p in power]

    a = fit_shape(wall, cores)
    held = []
    for k in range(5):  # five folds over servers; the sweeps' CPUs are too few to fold
        kept = [c for i, c in enumerate(wall) if i % 5 != k]
        out = [c for i, c in enumerate(wall) if i % 5 == k]
        held.append(shape_error(fit_shape(kept, cores), out))
    print(f"exponent {a:.3f}   ({len(wall)} servers since {FIRST_YEAR}, {len(cores)} sweeps)")
    print(f"  mean |error| of g, servers left out  {np.mean(held):.3f}")
    for i, c in enumerate(cores):
        alone = fit_shape(wall, cores[:i] + cores[i + 1 :])
        print(f"  mean |error| of g, sweep {i} left out  {shape_error(alone, [c]):.3f}")

    for k, name in ((0, "idle"), (10, "max")):
        of_wall = slope(tdp, power[:, k]) * SUPPLY
        of_package = float(np.exp(np.log(ends[:, 0 if k == 0 else 1]).mean()))
        both = float(np.sqrt(of_wall * of_package))
        spread = np.quantile(power[:, k] * SUPPLY / tdp, [0.05, 0.95]) / both
        print(
            f"{name}/TDP {both:.3f}   (wall {of_wall:.3f}, packages {of_package:.3f}; "
            f"servers 5-95 %: x{spread[0]:.2f} to x{spread[1]:.2f})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
