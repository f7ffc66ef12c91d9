"""What running a command costs: once, several times, or against another command.

Knows commands and readings; knows no tables and no terminals. Everything the command
starts is counted until the command itself ends; what it leaves running then is not.
The time from starting the process to collecting it is one window.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from joulesmith.energy.carbon import (
    Amount,
    GridRow,
    PriceRow,
    bill,
    footprint,
)
from joulesmith.energy.launch import NOT_FOUND, CommandNotRunError, Ended, launch
from joulesmith.energy.meter import EnergyMeter
from joulesmith.energy.reading import Part, Reading, worst
from joulesmith.energy.series import Series
from joulesmith.errors import JoulesmithError
from joulesmith.paired import PairedRatio, paired_ratio, rotated

COMPARE_ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """One run of a command. peak_memory_bytes: resident, ``None`` when unknown.

    start: Unix seconds at which it was started.
    """

    reading: Reading
    exit_code: int
    signal: int | None
    peak_memory_bytes: int | None
    start: float


@dataclass(frozen=True)
class Figure:
    """Median, least and greatest of the runs in which a figure is known (``known`` of them)."""

    median: float
    least: float
    most: float
    known: int


@dataclass(frozen=True)
class Measured:
    """All runs of one command, at least one. label: what to call it; command: its words."""

    label: str
    command: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def exit_code(self) -> int:
        """The first that is not 0, else 0."""
        return next((r.exit_code for r in self.runs if r.exit_code), 0)

    @property
    def peak_memory_bytes(self) -> int | None:
        """The greatest of any run; ``None`` when no run knows it."""
        return max((r.peak_memory_bytes for r in self.runs if r.peak_memory_bytes), default=None)

    def figure(self, of: Callable[[Reading], float | None]) -> Figure | None:
        """Median and spread over runs; ``None`` when no run knows it."""
        values = [v for v in (of(r.reading) for r in self.runs) if v is not None]
        if not values:
            return None
        return Figure(median(values), min(values), max(values), len(values))

    @property
    def typical(self) -> Reading:
        """One reading whose every figure is the median over runs that know it."""
        first = self.runs[0].reading
        if len(self.runs) == 1:
            return first

        def mid(of: Callable[[Reading], float | None]) -> float | None:
            found = self.figure(of)
            return None if found is None else found.median

        readings = [r.reading for r in self.runs]
        parts = [p for r in readings for p in r.parts]
        devices = dict.fromkeys(p.device for p in parts)
        machines = [r.machine for r in readings if r.machine is not None]
        return replace(
            first,
            joules=mid(lambda r: r.joules),
            low=mid(lambda r: r.low),
            high=mid(lambda r: r.high),
            marginal=mid(lambda r: r.marginal),
            seconds=median(r.seconds for r in readings),
            cpu_seconds=mid(lambda r: r.cpu_seconds),
            pedigree=worst(r.pedigree for r in readings),
            parts=tuple(_typical_part([p for p in parts if p.device == d]) for d in devices),
            machine=_typical_part(machines) if machines else None,
            peak_memory_bytes=self.peak_memory_bytes,
            device_memory_bytes=max(
                (r.device_memory_bytes for r in readings if r.device_memory_bytes is not None),
                default=None,
            ),
            notes=merged(n for r in readings for n in r.notes),
        )


@dataclass(frozen=True)
class Comparison:
    """OTHER over COMMAND, within rounds. A ratio is ``None`` where its figures are unknown."""

    joules: PairedRatio | None
    marginal: PairedRatio | None
    seconds: PairedRatio | None


@dataclass(frozen=True)
class Rounds:
    """Commands measured in turn, in the order given.

    exit_code: to pass on. stopped: a signal ended it early; the run that it hit is left
    out of a command that has others, and a command without any run is absent.
    """

    measured: tuple[Measured, ...]
    exit_code: int
    stopped: bool


def measure_command(
    command: Sequence[str],
    meter: EnergyMeter,
    label: str = "command",
    started: Callable[[int], object] = lambda pid: None,
) -> tuple[Run, bool]:
    """Run ``command`` once in a window of ``meter`` that bears the label.

    Returns the run, and whether a signal to stop came meanwhile (and was passed on).
    started: called with the process id.
    Raises `CommandNotRunError` (exit codes 126, 127) when it cannot be started.
    """
    start = time.time()
    with meter.window(label) as window:
        ended = launch(command, started)
    return _run(window.reading, ended, start), ended.stopped


def measure_commands(
    commands: Sequence[tuple[str, Sequence[str]]],
    repeat: int,
    meter: EnergyMeter,
    started: Callable[[int], object] = lambda pid: None,
) -> Rounds:
    """``repeat`` rounds of one or more (label, command), the order rotating.

    meter: one that watches `Descendants`, lest its own CPU time and memory count.
    Standard input is rewound for every run where it can be.
    Raises `CommandNotRunError` as soon as one cannot be started, `KeyboardInterrupt`
    when Ctrl-C came before anything ran.
    """
    if repeat < 1:
        raise JoulesmithError(f"--repeat must be at least 1, got {repeat}")
    if not all(command for _, command in commands):
        raise JoulesmithError("no command given: joulesmith measure -- COMMAND...")
    for _, command in commands[1:]:
        if shutil.which(command[0]) is None:  # told before the first has run for hours
            raise CommandNotRunError(
                f"command not found, or not executable: {command[0]!r}: give a program on the "
                "PATH or its path",
                NOT_FOUND,
            )
    found: list[list[Run]] = [[] for _ in commands]
    order = [j for i in range(repeat) for j in rotated(range(len(commands)), i)]
    place = _tell_stdin()
    last: Run | None = None
    stopped = False
    # Between two runs Ctrl-C has no command to go to: it ends the rounds.
    with contextlib.suppress(KeyboardInterrupt):
        for j in order:
            if len(order) > 1 and place is not None:
                os.lseek(0, place, os.SEEK_SET)
            label, command = commands[j]
            last, stopped = measure_command(command, meter, label, started)
            if not stopped:
                found[j].append(last)
                continue
            if not found[j]:
                found[j].append(_say(last, "a signal stopped it early"))
            break
    if last is None:
        raise KeyboardInterrupt
    once = "standard input cannot be rewound: only the first run could read it"
    notes = (once,) if len(order) > 1 and place is None and not _no_stdin() else ()
    measured = tuple(
        Measured(label, tuple(command), _summed_up(runs, notes))
        for (label, command), runs in zip(commands, found, strict=True)
        if runs
    )
    early = sum(len(runs) for runs in found) < len(order) or stopped
    code = next((m.exit_code for m in measured if m.exit_code), 0)
    return Rounds(measured, last.exit_code if early and last.exit_code else code, early)


def compare(ours: Measured, other: Measured) -> Comparison:
    """Ratios other / ours over the rounds that both have."""
    pairs = list(zip(other.runs, ours.runs, strict=False))

    def of(get: Callable[[Reading], float | None], unit: Any) -> PairedRatio | None:
        both = [(get(a.reading), get(b.reading)) for a, b in pairs]
        known = [(a, b) for a, b in both if a is not None and b]
        if not known:
            return None
        return paired_ratio([a for a, _ in known], [b for _, b in known], unit)

    return Comparison(
        joules=of(lambda r: r.joules, "joules"),
        marginal=of(lambda r: r.marginal, "joules"),
        seconds=of(lambda r: r.seconds, "seconds"),
    )


@dataclass(frozen=True)
class Report:
    """What is told of one command, or of two.

    measured, carbon and money go together: COMMAND, then OTHER. source: how joules are
    got here. idle_watts: of the machine, ``None`` when unknown. pue: in carbon and money.
    """

    measured: tuple[Measured, ...]
    carbon: tuple[Amount, ...]
    money: tuple[Amount, ...]
    comparison: Comparison | None
    source: str
    idle_watts: float | None
    pue: float
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the command's figures (medians over runs) on top."""
        told = [
            _plain(m, carbon, money)
            for m, carbon, money in zip(self.measured, self.carbon, self.money, strict=True)
        ]
        out = {
            **told[0],
            "source": self.source,
            "idle_watts": self.idle_watts,
            "pue": self.pue,
            "stopped": self.stopped,
        }
        if len(told) > 1 and self.comparison is not None:
            out |= {"other": told[1], "ratio": asdict(self.comparison)}
        return out


def report(
    rounds: Rounds,
    meter: EnergyMeter,
    grid: GridRow | Series,
    rate: PriceRow | Series | None,
    pue: float = 1.0,
) -> Report:
    """The figures of ``rounds`` with carbon and money; rate ``None`` leaves money unknown.

    A series is read at the time of each run, and the median over runs is told.
    """
    place = grid.source if isinstance(grid, Series) else grid.name
    unpriced = Amount(None, "", notes=(f"no electricity price is known for {place}",))
    return Report(
        measured=rounds.measured,
        carbon=tuple(_amount(footprint, m, grid, pue) for m in rounds.measured),
        money=tuple(
            unpriced if rate is None else _amount(bill, m, rate, pue) for m in rounds.measured
        ),
        comparison=compare(*rounds.measured) if len(rounds.measured) == 2 else None,
        source=meter.source,
        idle_watts=meter.idle_watts,
        pue=pue,
        stopped=rounds.stopped,
    )


def _amount(of: Callable[..., Amount], m: Measured, rate: Any, pue: float) -> Amount:
    """Grams or money of a command: of its typical run, or with a series the median run's."""
    if not isinstance(rate, Series):
        return of(m.typical, rate, pue=pue)
    found = [of(r.reading, rate, pue=pue, start=r.start) for r in m.runs]

    def mid(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return median(known) if known else None

    return replace(
        found[-1],
        value=mid(a.value for a in found),
        low=mid(a.low for a in found),
        high=mid(a.high for a in found),
        pedigree=worst(a.pedigree for a in found),
        notes=merged(n for a in found for n in a.notes),
    )


def merged(notes: Iterable[str]) -> tuple[str, ...]:
    """Each note once; of those that differ only by a number, the last."""
    return tuple({re.sub(r"\d+", "#", note): note for note in notes}.values())


def _plain(m: Measured, carbon: Amount, money: Amount) -> dict[str, Any]:
    typical = m.typical

    def spread(of: Callable[[Reading], float | None]) -> list[float] | None:
        found = m.figure(of)
        return None if found is None else [found.least, found.most]

    return {
        "label": m.label,
        "command": list(m.command),
        "exit_code": m.exit_code,
        "repeat": len(m.runs),
        **typical.to_dict(),
        "watts": typical.watts,
        "peak_memory_bytes": m.peak_memory_bytes,
        "spread": {
            "joules": spread(lambda r: r.joules),
            "marginal": spread(lambda r: r.marginal),
            "seconds": spread(lambda r: r.seconds),
        },
        "carbon": asdict(carbon),
        "cost": asdict(money),
        "runs": [
            {
                **r.reading.to_dict(),
                "watts": r.reading.watts,
                "peak_memory_bytes": r.peak_memory_bytes,
                "exit_code": r.exit_code,
                "signal": r.signal,
                "start": r.start,
            }
            for r in m.runs
        ],
    }


def _run(reading: Reading, ended: Ended, start: float) -> Run:
    peak = max(filter(None, (reading.peak_memory_bytes, ended.largest_bytes)), default=None)
    run = Run(reading, ended.exit_code, ended.signal, peak, start)
    if ended.left_running:
        left = f"{ended.left_running} of its processes" if ended.left_running > 1 else "a process"
        run = _say(run, f"it left {left} running: counted until the command itself ended")
    if peak is None:
        run = _say(run, "peak memory: too short a command to tell")
    return run


def _say(run: Run, note: str) -> Run:
    reading = replace(run.reading, notes=(*run.reading.notes, note))
    return replace(run, reading=reading)


def _summed_up(runs: list[Run], notes: Iterable[str]) -> tuple[Run, ...]:
    """The runs; what is to be said of all of them stands with the last."""
    said = list(notes)
    failed = sum(r.exit_code != 0 for r in runs)
    if failed and len(runs) > 1:
        said.append(f"{failed} of {len(runs)} runs ended with an exit code that is not 0")
    unknown = sum(r.reading.joules is None for r in runs)
    if 0 < unknown < len(runs):
        said.append(f"joules are unknown in {unknown} of {len(runs)} runs and not in the median")
    last = runs[-1]
    for note in said:
        last = _say(last, note)
    return (*runs[:-1], last)


def _typical_part(parts: Sequence[Part]) -> Part:
    """One device's medians over the runs that know it."""

    def mid(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return median(known) if known else None

    return replace(
        parts[0],
        joules=mid(p.joules for p in parts),
        low=mid(p.low for p in parts),
        high=mid(p.high for p in parts),
        pedigree=worst(p.pedigree for p in parts),
    )


def _tell_stdin() -> int | None:
    """Where standard input stands, ``None`` when it cannot be rewound."""
    try:
        return os.lseek(0, 0, os.SEEK_CUR)
    except OSError:
        return None


def _no_stdin() -> bool:
    """A terminal can be read by every run; a closed one by none."""
    try:
        os.fstat(0)
    except OSError:
        return True
    return os.isatty(0)
