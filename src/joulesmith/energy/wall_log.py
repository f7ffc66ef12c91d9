"""The log of a wall meter: reading it, stepping the load beside it, and what it says.

A log is a CSV with a column of watts and either a column of load (0..1 or percent) or
a column of time, taken while `step_load` takes the machine from idle to all CPUs busy.
Knows no file of settings and no processors.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from joulesmith.energy.power_curve import WAKE_LOAD, Curve
from joulesmith.errors import JoulesmithError

IDLE_LOAD, FULL_LOAD = 0.03, 0.95
"""A sample counts as idle up to the one and as full load from the other."""
QUIET_LOAD = 0.1
"""Where nothing was started for the step, what else runs there is part of idle."""
_LEAST = 3
"""Samples that an end needs."""
_SETTLE = 0.4
"""Share of a step that is not used: meters lag, clocks and fans settle."""
_NAMES = {
    "time": ("time", "timestamp", "datetime", "date", "epoch", "seconds", "t"),
    "watts": ("watts", "watt", "w", "power", "power_w", "power_watts", "watts_w", "p"),
    "load": ("load", "cpu", "cpu_load", "cpu_percent", "load_percent", "utilization", "util"),
}
_BURN = "import os\np = os.getppid()\nwhile os.getppid() == p:\n for _ in range(10**6): pass\n"


@dataclass(frozen=True)
class Sample:
    """One line of the log. time: seconds since 1970; load: 0..1; ``None`` where not told."""

    watts: float
    time: float | None = None
    load: float | None = None


@dataclass(frozen=True)
class Step:
    """A stretch at one load. begin, end: seconds since 1970, settled part; load: 0..1."""

    begin: float
    end: float
    load: float


@dataclass(frozen=True)
class Ends:
    """What a log says. curve: ``None`` where it has too few loads between the ends."""

    idle_watts: float
    max_watts: float
    curve: Curve | None
    samples: int


def read(path: Path | str) -> list[Sample]:
    """The samples of a CSV with a head line, or of the two columns time, watts without one.

    A torn last line is left out: the meter may still be writing.
    Raises `JoulesmithError` with the line's number where a line makes no sense.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "not a text file"
        raise JoulesmithError(f"cannot read the log: {path}: {why}") from None
    lines = [
        (n, line)
        for n, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    if not lines:
        raise JoulesmithError(f"the log is empty: {path}: give a CSV of time,watts")
    mark = next((m for m in (";", "\t") if m in lines[0][1]), ",")
    rows = [(n, next(csv.reader([line], delimiter=mark))) for n, line in lines]
    head = rows[0][1]
    columns = _columns(head, str(path))
    percent = False
    if columns is None:
        columns = {"time": 0, "watts": 1}
    else:
        rows = rows[1:]
        percent = "load" in columns and bool(re.search("%|percent", head[columns["load"]], re.I))
    samples = []
    for n, row in rows:
        try:
            samples.append(_sample(row, columns))
        except (ValueError, IndexError, OverflowError) as e:
            if n == lines[-1][0] and not text.endswith("\n"):
                break
            why = str(e) if isinstance(e, ValueError) else "a column is missing"
            raise JoulesmithError(f"bad line in the log: {path}: line {n}: {why}") from None
    if percent or any(s.load is not None and s.load > 1.5 for s in samples):
        samples = [replace(s, load=(s.load or 0.0) / 100) for s in samples]
    if any(s.load is not None and s.load > 1.05 for s in samples):
        raise JoulesmithError(f"load above 100 % in the log: {path}: give 0..1 or 0..100")
    return samples


def _columns(head: Sequence[str], path: str) -> dict[str, int] | None:
    """Where the columns are; ``None`` where the first line is already data."""
    names = [h.strip().lower().replace(" ", "_").split("(")[0].strip("_%") for h in head]
    found = {k: names.index(n) for k, known in _NAMES.items() for n in known[::-1] if n in names}
    if "watts" in found and ("load" in found or "time" in found):
        return found
    try:
        _sample(head, {"time": 0, "watts": 1})
    except (ValueError, IndexError):
        raise JoulesmithError(
            f"the log lacks a column: {path}: line 1: name the columns watts and load, "
            "or time and watts"
        ) from None
    return None


def _sample(row: Sequence[str], columns: dict[str, int]) -> Sample:
    watts = float(row[columns["watts"]].strip().removesuffix("W"))
    if not (math.isfinite(watts) and watts >= 0):
        raise ValueError(f"not a number of watts: {watts}")
    load = None
    if "load" in columns:
        load = float(row[columns["load"]].strip().removesuffix("%"))
        if not (math.isfinite(load) and load >= 0):
            raise ValueError(f"not a load: {load}")
    # A log with loads needs no times, whatever they look like.
    when = _time(row[columns["time"]]) if "time" in columns and load is None else None
    return Sample(watts, when, load)


def _time(text: str) -> float:
    """Seconds since 1970 from that number, its milliseconds, or an ISO date (local if naive)."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    if not math.isfinite(number):
        raise ValueError(f"not a time: {text}")
    return number / 1000 if number > 1e11 else number


def step_load(
    seconds: float,
    cpus: int,
    busy: Callable[[], float | None],
    tell: Callable[[str], None] | None = None,
) -> list[Step]:
    """Takes the machine from idle to all CPUs busy in up to five steps of ``seconds`` each.

    busy: busy CPU seconds of the machine so far; the load of a step is measured, not
    presumed. The burning processes end with the step, and by themselves when this
    process dies.
    """
    steps = []
    for n in sorted({round(cpus * k / 4) for k in range(5)}):
        if tell is not None:
            tell(f"{n} of {cpus} CPUs busy for {seconds:g} s")
        burning: list[subprocess.Popen[bytes]] = []
        try:
            burning += (subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(n))
            time.sleep(seconds * _SETTLE)
            begin, clock, before = time.time(), time.perf_counter(), busy()
            time.sleep(seconds * (1 - _SETTLE))
            after, passed = busy(), time.perf_counter() - clock
            end = time.time()
        finally:
            for p in burning:
                with suppress(OSError):
                    p.kill()
            for p in burning:
                p.wait()
        if before is None or after is None:
            raise JoulesmithError("the load of this machine cannot be read: give a log with loads")
        steps.append(Step(begin, end, min(1.0, max(0.0, after - before) / (passed * cpus))))
    return steps


def at_loads(samples: Iterable[Sample], steps: Iterable[Step]) -> list[Sample]:
    """The samples taken in a step, with its load."""
    steps = list(steps)
    return [
        replace(s, load=step.load)
        for s in samples
        for step in steps
        if s.time is not None and step.begin <= s.time <= step.end
    ]


def ends(samples: Iterable[Sample], idle_load: float = IDLE_LOAD) -> Ends:
    """Idle and full-load watts (medians), and the curve between where there are loads for it.

    idle_load: up to which a sample counts as idle.

    Raises `JoulesmithError` where either end has too few samples.
    """
    points = [(s.load, s.watts) for s in samples if s.load is not None]
    low = [w for x, w in points if x <= idle_load]
    high = [w for x, w in points if x >= FULL_LOAD]
    for name, found, where in (
        ("idle", low, f"at most {idle_load:.0%}"),
        ("full load", high, f"at least {FULL_LOAD:.0%}"),
    ):
        if len(found) < _LEAST:
            raise JoulesmithError(
                f"the log has {len(found)} samples of {name} (load {where}), {_LEAST} are needed: "
                "log from idle to all CPUs busy"
            )
    idle, top = statistics.median(low), statistics.median(high)
    if not idle < top:
        raise JoulesmithError(
            f"the log has {idle:g} W idle and {top:g} W at full load: is it of this machine?"
        )
    middle = [(x, (w - idle) / (top - idle)) for x, w in points if idle_load < x < FULL_LOAD]
    several = len({round(x * 10) for x, _ in middle}) >= _LEAST
    return Ends(idle, top, fit_curve(middle) if several else None, len(points))


def fit_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Jump and bend by least squares from (load, share of the draw above idle)."""
    # g = x + jump (s - x) + u (x^4 - x), u = (1 - jump) bend: linear in jump and u.
    rows = [(-math.expm1(-x / WAKE_LOAD) - x, x**4 - x, g - x) for x, g in points]
    aa, ab, bb = (math.fsum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    ay, by = (math.fsum(r[i] * r[2] for r in rows) for i in (0, 1))
    det = aa * bb - ab * ab
    jump, u = 0.0, 0.0
    if det > 1e-12:
        jump, u = (ay * bb - by * ab) / det, (by * aa - ay * ab) / det
    if jump < 0:
        jump, u = 0.0, by / bb if bb > 0 else 0.0
    if u < 0:
        jump, u = ay / aa if aa > 0 else 0.0, 0.0
    jump = min(0.95, max(0.0, jump))
    return Curve(1.0, jump, min(1.0, max(0.0, u / (1 - jump))))
