"""Errors of the no-counter power model on machines left out of its fit, and of CodeCarbon's modes.

    python benchmarks/power_model.py WALL.csv SWEEPS.csv [--out power_model.md]

The files are those of ``fit_cpu_power.py``. For every group (a CPU's generation, a
vendor, a span of years) the constants are fitted on the other groups, and the group's
machines are then predicted. Error: of the energy of a load sweep (as long at one load
as at another), and of power at each load, mean absolute. Covered: share of sweeps, and
of single loads, whose truth lies in the stated interval.

CodeCarbon's formulas are restated from its source (3.3.2, `codecarbon.external.hardware`):
"cubic" = TDP (0.1 + 0.9 load^3) for a machine, "linear" = TDP load for a process. Where
codecarbon is installed beside joulesmith, the formulas are checked against its code first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fit_cpu_power import (
    FIRST_YEAR,
    LOADS,
    Array,
    Server,
    Sweep,
    fit_package,
    fit_walls,
    servers,
    sweeps,
)

from joulesmith.atomic import atomic_path
from joulesmith.energy import power_curve
from joulesmith.energy.cpu_power import CpuPower

NEW = 2018


def cubic(tdp: float, load: Array) -> Array:
    return tdp * (0.1 + 0.9 * load**3)


def linear(tdp: float, load: Array) -> Array:
    return tdp * load


@dataclass
class Score:
    """Errors of one way of estimating, an entry a sweep.

    energy: signed, relative; power: mean absolute relative error over the loads, idle
    among them; covered: the energy; covered_power: share of the loads.
    """

    energy: list[float]
    power: list[float]
    covered: list[bool]
    covered_power: list[float]

    def add(self, load: Array, truth: Array, guess: Array, model: CpuPower | None = None) -> None:
        """model: whose interval is judged; without one it has no width."""
        energy = float(np.trapezoid(truth, load))
        self.energy.append(float(np.trapezoid(guess, load)) / energy - 1)
        self.power.append(float(np.mean(np.abs(guess - truth) / truth)))
        factors = [(1.0, 1.0) if model is None else model.interval(float(x)) for x in load]
        low, high = guess * np.array(factors).T
        self.covered.append(bool(np.trapezoid(low, load) <= energy <= np.trapezoid(high, load)))
        self.covered_power.append(float(np.mean((low <= truth) & (truth <= high))))


def score() -> Score:
    return Score([], [], [], [])


def predict(model: CpuPower, load: Array) -> Array:
    return np.array([model.watts(float(x)) for x in load])


def by_family(m: Server) -> str:
    return m.family


def by_vendor(m: Server) -> str:
    return "AMD" if m.kind == "amd" else "Intel"


def by_years(m: Server) -> str:
    return f"{m.year - m.year % 2}-{m.year - m.year % 2 + 1}"


def held_out(
    machines: Sequence[Server],
    group: Callable[[Server], str],
    way: Callable[[Server, dict[str, power_curve.Wall]], CpuPower],
) -> dict[str, Score]:
    """Scores by group, each predicted with constants fitted on the others."""
    found: dict[str, Score] = {}
    for name in sorted({group(m) for m in machines}):
        walls = fit_walls([m for m in machines if group(m) != name])
        found[name] = score()
        for m in machines:
            if group(m) == name:
                model = way(m, walls)
                guess = predict(model, LOADS)
                found[name].add(LOADS, m.watts, guess, model)
    return found


def ends_known(m: Server, walls: dict[str, power_curve.Wall]) -> CpuPower:
    wall = walls.get(m.kind, walls["any"])
    return CpuPower.from_ends(float(m.watts[0]), float(m.watts[-1]), curve=wall.curve)


def ends_known_any(m: Server, walls: dict[str, power_curve.Wall]) -> CpuPower:
    return CpuPower.from_ends(float(m.watts[0]), float(m.watts[-1]), curve=walls["any"].curve)


def tdp_known(m: Server, walls: dict[str, power_curve.Wall]) -> CpuPower:
    """At the wall. The interval is that of `CpuPower.from_tdp`."""
    assert m.tdp is not None
    wall = walls.get(m.kind, walls["any"])
    stated = CpuPower.from_tdp(m.tdp, boundary="wall")
    return CpuPower(
        "", 1, wall.idle * m.tdp, wall.max * m.tdp, 0.0, wall.curve.exponent, stated.low,
        stated.high, "", (), wall.curve.jump, wall.curve.bend, "wall",
    )  # fmt: skip


def sweep_left_out(s: Sweep, rapl: Sequence[Sweep], recent: Sequence[Server]) -> CpuPower:
    idle, top, exponent = fit_package(list(recent), [o for o in rapl if o.cpu != s.cpu])
    stated = CpuPower.from_tdp(s.tdp, boundary="package")
    return replace(stated, idle_watts=idle * s.tdp, max_watts=top * s.tdp, exponent=exponent)


def merged(scores: Iterable[Score]) -> Score:
    out = score()
    for s in scores:
        out.energy += s.energy
        out.power += s.power
        out.covered += s.covered
        out.covered_power += s.covered_power
    return out


def percent(values: Sequence[float] | Sequence[bool]) -> str:
    return f"{100 * float(np.mean(np.abs(values))):.1f} %"


HEAD = ["error of energy", "worst", "error of power", "sweeps covered", "loads covered"]


def row(name: str, n: int, s: Score, interval: bool = True) -> list[str]:
    worst = f"{100 * max(s.energy, key=abs):+.0f} %"
    cover = [percent(s.covered), percent(s.covered_power)] if interval else ["-", "-"]
    return [name, str(n), percent(s.energy), worst, percent(s.power), *cover]


def table(first: str, rows: Iterable[list[str]]) -> list[str]:
    head = [first, "n", *HEAD]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(r) + " |" for r in rows), ""]


def peers(machines: Iterable[tuple[Array, Array, float]]) -> dict[str, Score]:
    found = {"CodeCarbon cubic": score(), "CodeCarbon linear": score()}
    for load, watts, tdp in machines:
        found["CodeCarbon cubic"].add(load, watts, cubic(tdp, load))
        found["CodeCarbon linear"].add(load, watts, linear(tdp, load))
    return found


def report(machines: list[Server], rapl: list[Sweep]) -> list[str]:
    recent = [m for m in machines if m.year >= FIRST_YEAR]
    known = [m for m in recent if m.tdp]
    new = [m for m in known if m.year >= NEW]
    out = [
        "# The no-counter power model on machines it was not fitted on",
        "",
        f"{len(known)} SPECpower_ssj2008 servers of {FIRST_YEAR} and later with a known TDP, "
        f"{len(new)} of them of {NEW} and later; {len(rapl)} RAPL sweeps of "
        f"{len({s.cpu for s in rapl})} processors. Fitted on the other groups each time.",
        "Error of energy: of a sweep over all loads, mean absolute. Written by "
        "`benchmarks/power_model.py`.",
        "",
        f"## Idle and maximum known, at the wall, servers of {NEW} and later (interval +-15 %)",
        "",
    ]

    def only_new(group: Callable[[Server], str], way: Callable[..., CpuPower]) -> Score:
        found = held_out(known, group, way)
        return merged(
            _of([m for m in known if group(m) == g], s, lambda m: m.year >= NEW)
            for g, s in found.items()
        )

    rows = []
    for name, group in (("generation", by_family), ("vendor", by_vendor), ("two years", by_years)):
        s = only_new(group, ends_known)
        rows.append(row(f"{name} left out", len(s.energy), s))
    s = only_new(by_family, ends_known_any)
    rows.append(row("generation left out, class not told (a guest)", len(s.energy), s))
    straight = score()
    for m in new:
        line = CpuPower.from_ends(
            float(m.watts[0]), float(m.watts[-1]), curve=power_curve.LINE, boundary="wall"
        )
        straight.add(LOADS, m.watts, predict(line, LOADS), line)
    rows.append(row("a straight line between the two", len(new), straight))
    out += table("what", rows)
    out += [
        "With a vendor left out, the curve of the only other one is used; what is neither AMD nor",
        "Intel therefore gets the mean of both and +-25 %.",
        "",
        "By generation:",
        "",
    ]
    rows = []
    for g, s in held_out(known, by_family, ends_known).items():
        part = _of([m for m in known if m.family == g], s, lambda m: m.year >= NEW)
        if part.energy:
            rows.append(row(g, len(part.energy), part))
    out += table("generation left out", rows)

    out += ["## Only the TDP known, at the wall (interval +-50 %)", ""]
    for title, pick in (
        (f"Servers of {NEW} and later", lambda m: m.year >= NEW),
        (f"Servers of {FIRST_YEAR} and later", lambda m: True),
    ):
        rows = []
        for name, group in (
            ("generation", by_family), ("vendor", by_vendor), ("two years", by_years)
        ):  # fmt: skip
            found = held_out(known, group, tdp_known)
            s = merged(_of([m for m in known if group(m) == g], s, pick) for g, s in found.items())
            rows.append(row(f"ours, {name} left out", len(s.energy), s))
        some = [m for m in known if pick(m)]
        for name, s in peers((LOADS, m.watts, m.tdp or 0.0) for m in some).items():
            rows.append(row(name, len(some), s, interval=False))
        out += [title + ":", "", *table("way", rows)]

    out += [
        "## Only the TDP known, processor packages (RAPL)",
        "",
        "Interval +-50 % at full load, x0.28 to x2.1 at none, between by the load.",
        "",
    ]
    rows = []
    both = score()
    for s in rapl:
        model = sweep_left_out(s, rapl, known)
        one = score()
        one.add(s.load, s.watts, predict(model, s.load), model)
        both = merged([both, one])
        rows.append(row(f"ours, left out: {s.cpu}, {s.name}", 1, one))
    rows.append(row("ours, all of them", len(rapl), both))
    for name, s in peers((s.load, s.watts, s.tdp) for s in rapl).items():
        rows.append(row(name, len(rapl), s, interval=False))
    out += table("way", rows)
    known_ends = score()
    for s in rapl:
        _, _, exponent = fit_package(known, [o for o in rapl if o.cpu != s.cpu])
        m = CpuPower.from_ends(
            float(s.watts[0]),
            float(s.watts[-1]),
            curve=power_curve.Curve(exponent),
            boundary="package",
        )
        known_ends.add(s.load, s.watts, predict(m, s.load), m)
    out += [
        "The same sweeps with the package's own idle and maximum known (interval +-30 % at full",
        "load, x0.28 to x2.6 at none):",
        "",
    ]
    out += table("way", [row("ours", len(rapl), known_ends)])
    out += [
        "A package's sweep depends on how the load was made: a few cores flat out draw more",
        "than all cores at part speed at the same load, so no curve of load alone fits both.",
        "Two processors are few, and how sweeps and walls are mixed was chosen by these very",
        "errors: expect somewhat larger ones elsewhere.",
        "",
    ]
    return out


def _of(machines: Sequence[Server], s: Score, pick: Callable[[Server], bool]) -> Score:
    keep = [i for i, m in enumerate(machines) if pick(m)]
    return Score(
        [s.energy[i] for i in keep],
        [s.power[i] for i in keep],
        [s.covered[i] for i in keep],
        [s.covered_power[i] for i in keep],
    )


def check_peer() -> str:
    """Holds the restated formulas against CodeCarbon's own code where it is installed."""
    try:
        import codecarbon
        from codecarbon.external.hardware import CPU
    except ImportError:
        return "codecarbon is not installed: formulas as restated"
    for percent_load in (0.0, 12.5, 50.0, 100.0):
        cpu = CPU(output_dir=".", mode="cpu_load", model="x", tdp=200, tracking_mode="machine")
        cpu._cpu_load_meter.percent = lambda value=percent_load: value
        got = cpu._get_power_from_cpu_load().W
        if abs(got - float(cubic(200.0, np.array(percent_load / 100)))) > 1e-6:
            raise SystemExit(f"codecarbon {codecarbon.__version__} has another formula: {got}")
    return f"cubic formula checked against codecarbon {codecarbon.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wall", type=Path)
    parser.add_argument("sweeps", type=Path)
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args()
    lines = [*report(servers(args.wall), sweeps(args.sweeps)), check_peer() + ".", ""]
    print("\n".join(lines))
    if args.out is not None:
        with atomic_path(args.out) as temp:
            temp.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
