"""Windows of metering: what a span of a program cost in joules.

Knows counters, the power model and windows; knows no language models.

Per device a counter beats the model: RAPL for processor and memory, NVML for
GPUs. Without RAPL the processor and memory are modelled from the CPU seconds of
the processes watched and their descendants (see `cpu_power` for whose joules
those are). A counter counts the whole device, whoever used it, and a note says
so when other processes were busy. A failing counter never stops the program
being metered: it becomes a note.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from joulesmith.energy import nvml as _nvml
from joulesmith.energy import rapl as _rapl
from joulesmith.energy.cpu_power import CpuPower
from joulesmith.energy.cpu_time import OthersLoad, ProcessTree, machine_busy
from joulesmith.energy.reading import Part, Reading, worst

_BUSY_OTHERS = 0.05


@dataclass(frozen=True)
class _Snapshot:
    t: float
    cpu: float | None
    busy: float | None
    rapl: dict[str, float] = field(default_factory=dict)
    gpu: dict[str, float] = field(default_factory=dict)
    gpu_watts: dict[str, float] = field(default_factory=dict)


class Window:
    """A span being metered. A context manager; windows may nest and overlap, across threads."""

    def __init__(self, meter: EnergyMeter, name: str) -> None:
        self.name = name
        self._meter = meter
        self._start: _Snapshot | None = None
        self._reading: Reading | None = None

    def __enter__(self) -> Window:
        self._reading = None
        self._start = self._meter._snapshot(opening=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._start is None:
            return
        end = self._meter._snapshot(opening=False)
        why = (f"the window ended by {kind.__name__}",) if kind is not None else ()
        self._reading = self._meter._between(self._start, end, why)
        self._start = None
        self._meter._keep(self.name, self._reading)

    @property
    def reading(self) -> Reading:
        """What the window cost. Raises RuntimeError while the window is open."""
        if self._reading is None:
            raise RuntimeError(f"window {self.name!r} is not closed yet: read it after the block")
        return self._reading


class EnergyMeter:
    """Meters this program, or other processes, in named windows.

        with EnergyMeter() as meter:
            with meter.window("prefill") as w:
                ...
        w.reading.joules

    pids: processes watched with their descendants; default this one.
    rapl_root: powercap folder. nvml: an object like the ``pynvml`` module.
    cpu_model: default `CpuPower.detect`, built when first needed.
    interval: seconds between samples of the background thread, which runs inside
    the ``with`` block; without it windows still work, except that power-only GPUs
    are then seen at the two ends of a window.
    Raises `JoulesmithError` only for a power given that is no number of watts.
    """

    def __init__(
        self,
        pids: Iterable[int] | int | None = None,
        *,
        rapl_root: Path | str | None = None,
        nvml: Any = None,
        cpu_model: CpuPower | None = None,
        interval: float = 0.1,
    ) -> None:
        if not interval > 0:
            raise ValueError(f"interval must be above 0 seconds, got {interval}")
        self.interval = interval
        self.readings: dict[str, list[Reading]] = {}
        """Closed windows by name, in order of closing."""
        self._lock = threading.Lock()
        self._tree = ProcessTree([pids] if isinstance(pids, int) else pids)
        self._rapl = _rapl.Rapl(rapl_root)
        self._nvml = _nvml.Nvml(nvml)
        self._model = CpuPower.detect() if cpu_model is None else cpu_model
        self._others = OthersLoad(self._model.cpus)
        self._idle: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._first = self._snapshot(opening=True)
        self._last: _Snapshot | None = None

    # ---- use

    def __enter__(self) -> EnergyMeter:
        self._stop.clear()
        self._last = None
        self._first = self._snapshot(opening=True)
        self._thread = threading.Thread(target=self._sample, name="joulesmith-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._last = self._snapshot(opening=False)
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            self._thread = None

    def close(self) -> None:
        """Lets go of the GPU driver. For programs that make many meters."""
        self._nvml.close()

    def window(self, name: str) -> Window:
        """A window to be entered with ``with``; its reading is also kept in `readings`."""
        return Window(self, name)

    @property
    def total(self) -> Reading:
        """From entering (or making) the meter until its exit, or until now."""
        return self._between(self._first, self._last or self._snapshot(opening=False), ())

    def measure_idle(self, seconds: float = 2.0) -> None:
        """Takes the counters' power over ``seconds`` as idle power; call when nothing runs.

        Without it the idle power of a counted device is unknown, and so is `Reading.marginal`.
        """
        start = self._snapshot(opening=True)
        time.sleep(seconds)
        end = self._snapshot(opening=False)
        with self._lock:
            counted = {**_deltas(start.rapl, end.rapl), **self._gpus(start, end)}
            for device, joules in counted.items():
                if joules is not None and end.t > start.t:
                    self._idle[device] = joules / (end.t - start.t)

    @property
    def measures_cpu(self) -> bool:
        """True where RAPL counts the processor, False where it is modelled."""
        return bool(self._rapl.zones)

    @property
    def idle_watts(self) -> float | None:
        """Machine's idle draw in watts, GPUs included; ``None`` when any part is unknown."""
        parts = [self._idle.get(g.device) for g in self._nvml.gpus]
        if self.measures_cpu:
            parts += [self._idle.get(z.name) for z in self._rapl.zones]
        else:
            parts.append(self._model.machine_idle_watts)
        known = [p for p in parts if p is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def max_watts(self) -> float | None:
        """Machine's draw with all CPUs busy, watts; ``None`` where it is not modelled."""
        if self.measures_cpu or self._nvml.gpus:
            return None
        return self._model.machine_max_watts

    @property
    def source(self) -> str:
        """How joules are got here, in a sentence."""
        said = []
        if self.measures_cpu:
            said.append("measured by RAPL: " + ", ".join(z.name for z in self._rapl.zones))
        else:
            m = self._model
            said.append(
                f"processor and memory modelled: {m.source}; interval x{m.low:.2g} to x{m.high:.2g}"
            )
        for g in self._nvml.gpus:
            how = "energy counter" if g.counts else "power samples"
            said.append(f"{g.device} ({g.name}) measured by NVML {how}")
        return "; ".join(said)

    # ---- readings

    def _snapshot(self, opening: bool) -> _Snapshot:
        """Own CPU seconds and the clock come nearest the window's inside: last when opening."""
        t, cpu = 0.0, None
        if not opening:
            cpu, t = self._cpu(), time.perf_counter()
        busy = machine_busy()
        gpu, watts = {}, {}
        zones = self._rapl.read()
        for g in self._nvml.gpus:
            joules = g.read(time.perf_counter())
            if joules is not None:
                gpu[g.device] = joules
            if g.counts and (power := g.watts()) is not None:
                watts[g.device] = power
        if opening:
            cpu, t = self._cpu(), time.perf_counter()
        with self._lock:
            self._others.add(t, busy, cpu)
        return _Snapshot(t, cpu, busy, zones, gpu, watts)

    def _cpu(self) -> float | None:
        try:
            with self._lock:
                return self._tree.seconds()
        except Exception:  # a process that ends while it is looked at
            return None

    def _keep(self, name: str, reading: Reading) -> None:
        with self._lock:
            self.readings.setdefault(name, []).append(reading)

    def _sample(self) -> None:
        """Keeps wraparounds, power integrals and others' load from being missed."""
        while not self._stop.wait(self.interval):
            try:
                self._rapl.read()
                for g in self._nvml.gpus:
                    if not g.counts:
                        g.read(time.perf_counter())
                cpu, t = self._cpu(), time.perf_counter()
                with self._lock:
                    self._others.add(t, machine_busy(), cpu)
            except Exception:  # metering must never end the program metered
                continue

    def _between(self, a: _Snapshot, b: _Snapshot, why: tuple[str, ...]) -> Reading:
        seconds = max(0.0, b.t - a.t)
        cpu = None if a.cpu is None or b.cpu is None else max(0.0, b.cpu - a.cpu)
        others = self._others_load(a, b)
        notes = list(why)
        parts: list[Part] = []
        marginals: list[float | None] = []

        if self.measures_cpu:
            counted = _deltas(a.rapl, b.rapl)
            for zone in self._rapl.zones:
                joules = counted.get(zone.name)
                part = _measured(
                    zone.name, joules, seconds, _rapl.STEP_SECONDS, _rapl.RELATIVE_ERROR, "RAPL"
                )
                parts.append(part)
                marginals.append(self._above_idle(zone.name, part.joules, seconds))
            names = {z.name.split("-")[0] for z in self._rapl.zones}
            if names == {"package"}:
                notes.append("memory is not counted: this machine has no RAPL zone for it")
            if others is not None and others > _BUSY_OTHERS:
                notes.append(
                    f"other processes took {others:.0%} of the CPU time; the counter includes them"
                )
        else:
            modelled, marginal = self._modelled(seconds, cpu, others or 0.0)
            parts.extend(modelled)
            marginals.append(marginal)
            notes.extend(self._model.notes)
            if cpu is None:
                notes.append("the CPU time of the processes watched is unknown")
            if others is not None and others > _BUSY_OTHERS:
                notes.append(f"other processes took {others:.0%} of the CPU time and are left out")

        for g, (device, joules) in zip(self._nvml.gpus, self._gpus(a, b).items(), strict=True):
            how = "NVML energy counter" if g.counts else "NVML power samples"
            part = _measured(device, joules, seconds, _nvml.STEP_SECONDS, _nvml.RELATIVE_ERROR, how)
            parts.append(part)
            marginals.append(self._above_idle(device, part.joules, seconds))
            notes.extend(g.notes)

        notes.extend(self._rapl.notes)
        notes.extend(self._nvml.notes)
        notes.extend(
            f"{p.device}: unknown in this window and not in the total"
            for p in parts
            if p.joules is None
        )
        return _sum(parts, marginals, seconds, cpu, notes)

    def _others_load(self, a: _Snapshot, b: _Snapshot) -> float | None:
        if b.busy is None or b.cpu is None:
            return None
        with self._lock:
            return self._others.load((a.t, a.busy, a.cpu), (b.t, b.busy, b.cpu))

    def _modelled(
        self, seconds: float, cpu: float | None, others: float
    ) -> tuple[list[Part], float | None]:
        m = self._model
        if cpu is None:
            return [Part("cpu", None, None, None, None, m.source)], None
        e = m.cpu(seconds, cpu, others)
        parts = [Part("cpu", e.joules, e.low, e.high, "modelled", m.source)]
        if m.dram_watts > 0:
            d = m.dram(seconds, others)
            source = "watts per GiB of memory"
            parts.append(Part("dram", d.joules, d.low, d.high, "modelled", source))
        return parts, e.marginal

    def _gpus(self, a: _Snapshot, b: _Snapshot) -> dict[str, float | None]:
        """Joules by GPU. A counter that has not moved yet gives way to the power at the ends."""
        out: dict[str, float | None] = {}
        for g in self._nvml.gpus:
            joules = _deltas(a.gpu, b.gpu).get(g.device)
            if joules == 0.0 and g.device in a.gpu_watts and g.device in b.gpu_watts:
                watts = 0.5 * (a.gpu_watts[g.device] + b.gpu_watts[g.device])
                joules = watts * max(0.0, b.t - a.t)
            out[g.device] = joules
        return out

    def _above_idle(self, device: str, joules: float | None, seconds: float) -> float | None:
        idle = self._idle.get(device)
        if joules is None or idle is None:
            return None
        return max(0.0, joules - idle * seconds)


def _deltas(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Differences of cumulative joules for what both ends know; never negative."""
    return {k: max(0.0, b[k] - a[k]) for k in b if k in a}


def _measured(
    device: str, joules: float | None, seconds: float, step: float, error: float, source: str
) -> Part:
    """A counter's part: its interval is its relative error and one update step at either end."""
    if joules is None or (joules == 0.0 and seconds < 2 * step):
        # Not moved yet is not "no energy".
        return Part(device, None, None, None, None, source)
    edge = min(1.0, step / seconds) * joules if seconds > 0 else joules
    half = math.hypot(error * joules, edge)
    return Part(device, joules, max(0.0, joules - half), joules + half, "measured", source)


def _sum(
    parts: list[Part],
    marginals: list[float | None],
    seconds: float,
    cpu: float | None,
    notes: list[str],
) -> Reading:
    """Adds what is known; devices' errors are independent, so half-widths add in quadrature."""
    known = [p for p in parts if p.joules is not None]
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
