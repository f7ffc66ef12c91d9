"""Windows of metering: what a span of a program cost in joules.

Knows sources, the power model and windows; knows no language models.

Per device a counter beats the model: RAPL for processor and memory, NVML for NVIDIA
GPUs, Zeus for the rest. Where nothing counts the processor in a window, it and the
memory are modelled from the CPU seconds of the processes watched and their
descendants (see `cpu_power` for whose joules those are). A counter counts the whole
device, whoever used it, and a note says so when other processes were busy. A
battery or an external meter counts the whole machine and stays beside the sum; an
external meter, which somebody asked for, gives the window's joules.

A failing source never stops the program being metered: it becomes a note.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from joulesmith.energy import external as _external
from joulesmith.energy.battery import Battery
from joulesmith.energy.cpu_power import CpuPower
from joulesmith.energy.cpu_time import OthersLoad, ProcessTree, machine_busy
from joulesmith.energy.memory import Resident
from joulesmith.energy.nvml import Nvml
from joulesmith.energy.parts import Snapshot, add_up, measured, of_the_processor
from joulesmith.energy.rapl import Rapl
from joulesmith.energy.reading import Part, Reading
from joulesmith.energy.source import Count, Device, Source, note
from joulesmith.energy.window import Peaks, Window, metered
from joulesmith.energy.zeus_extra import Zeus
from joulesmith.errors import JoulesmithError

F = TypeVar("F", bound=Callable[..., Any])
_BUSY_OTHERS = 0.05
_SHARE = 0.004
"""Most of one CPU that the background thread takes: it slows down where a look is dear."""
_SLOWEST = 5.0
_SELDOM = 3
"""Only power must be sampled often: counters, CPU time and memory keep marks of their own."""


class EnergyMeter:
    """Meters this program, or other processes, in named windows.

        with EnergyMeter() as meter:
            with meter.window("prefill") as w:
                ...
        w.reading.joules

    pids: processes watched with their descendants, or a `ProcessTree`; default this one.
    rapl_root, supply_root: powercap and power_supply folders. nvml: an object like
    the ``pynvml`` module.
    cpu_model: default `CpuPower.detect`, built when first needed.
    interval: seconds between samples of power by the background thread (counters and
    memory are looked at a third as often), which runs inside the ``with`` block and
    slows down where it would take 0.4 % of a CPU; without it windows still work,
    except that power and memory are then seen at their ends.
    idle_watts: what all that is metered draws when idle, if you know it; see
    `measure_idle`.
    external: a meter at the wall, "file:PATH" or "command:PROGRAM" (see `external`);
    default the environment's ``JOULESMITH_METER``.
    synchronize: called before a window opens and closes, so that no work is left on
    a GPU; default PyTorch's CUDA devices if the program uses them; False for none.
    Raises `JoulesmithError` only for a power or an external meter that cannot be one.
    """

    def __init__(
        self,
        pids: Iterable[int] | int | ProcessTree | None = None,
        *,
        rapl_root: Path | str | None = None,
        supply_root: Path | str | None = None,
        nvml: Any = None,
        cpu_model: CpuPower | None = None,
        interval: float = 0.1,
        idle_watts: float | None = None,
        external: str | None = None,
        synchronize: Callable[[], object] | Literal[False] | None = None,
    ) -> None:
        if not interval > 0:
            raise ValueError(f"interval must be above 0 seconds, got {interval}")
        if idle_watts is not None and not (math.isfinite(idle_watts) and idle_watts >= 0):
            raise JoulesmithError(f"idle watts must be 0 or more: {idle_watts}")
        self.interval = interval
        self.readings: dict[str, list[Reading]] = {}
        """Closed windows by name, in order of closing."""
        self._lock = threading.Lock()
        self._model = CpuPower.detect() if cpu_model is None else cpu_model
        self._external: _external.External | None = None
        spec = external if external is not None else os.environ.get(_external.ENV, "").strip()
        if spec:
            self._external = _external.External(spec)
        self._rapl = Rapl(rapl_root)
        self._nvml = Nvml(nvml)
        found: list[Source | None] = [
            self._rapl,
            self._nvml,
            Zeus(),
            Battery(supply_root),
            self._external,
        ]
        self.sources: tuple[Source, ...] = tuple(s for s in found if s is not None)
        """What is read, failed and empty sources included."""
        self._notes: list[str] = []
        self._synchronize = _cuda if synchronize is None else synchronize
        if not isinstance(pids, ProcessTree):
            pids = ProcessTree([pids] if isinstance(pids, int) else pids)
        self._tree = pids
        self._resident = Resident()
        self._others = OthersLoad(self._model.cpus)
        self._given_idle = idle_watts
        self._idle: dict[str, float] = {}
        self._spans: dict[object, Peaks] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._whole = self._spans["total"] = Peaks()
        self._first = self._snapshot(opening=True)
        self._last: Snapshot | None = None

    # ---- use

    def __enter__(self) -> EnergyMeter:
        self._last = None
        with self._lock:
            self._whole = self._spans["total"] = Peaks()
        self._first = self._snapshot(opening=True)
        self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self._last = self._snapshot(opening=False)
        self._end()
        with self._lock:
            self._spans.pop("total", None)

    def close(self) -> None:
        """Lets go of drivers and threads. For programs that make many meters."""
        self._end()
        for source in self.sources:
            source.close()

    def watch(self, tree: ProcessTree) -> ProcessTree:
        """Watches other processes from now on, between windows; returns those it watched."""
        with self._lock:
            before, self._tree = self._tree, tree
            self._others = OthersLoad(self._model.cpus)  # what it knew is of other processes
        return before

    def window(self, name: str = "window") -> Window:
        """A window to be entered with ``with``; its reading is also kept in `readings`."""
        return Window(self, name)

    @overload
    def measure(self, name: F) -> F: ...
    @overload
    def measure(self, name: str | None = None) -> Callable[[F], F]: ...
    def measure(self, name: Any = None) -> Any:
        """A decorator: each call in a window of its own, named ``name`` or as the function.

        For functions, coroutines, generators and async generators; see `metered`.
        """

        def wrap(function: F) -> F:
            label = name if isinstance(name, str) else getattr(function, "__qualname__", "call")
            return metered(function, functools.partial(self.window, label))

        return wrap(name) if callable(name) else wrap

    @property
    def total(self) -> Reading:
        """From entering (or making) the meter until its exit, or until now."""
        last = self._last or self._snapshot(opening=False)
        return self._between(self._first, last, (), self._whole)

    def measure_idle(self, seconds: float = 2.0) -> None:
        """Takes the counters' power over ``seconds`` as idle power; call when nothing runs.

        Without it the idle power of a counted device is unknown, and so is `Reading.marginal`.
        """
        began = self._thread is None
        if began:
            self._begin()
        try:
            start = self._snapshot(opening=True)
            time.sleep(seconds)
            end = self._snapshot(opening=False)
        finally:
            if began:
                self._end()
        span = end.t - start.t
        for source in self.sources:
            for device in source.devices:
                part = measured(device, start, end, span)[0]
                if part.joules is not None and span > 0:
                    self._idle[device.name] = part.joules / span

    @property
    def measures_cpu(self) -> bool:
        """True where the processor is counted, False where it is modelled."""
        return any(d.cpu for d in self._summed())

    @property
    def idle_watts(self) -> float | None:
        """Machine's idle draw in watts, GPUs included; ``None`` when any part is unknown."""
        if self._given_idle is not None:
            return self._given_idle
        if self._external is not None and "machine" in self._idle:
            return self._idle["machine"]
        parts = [self._idle.get(d.name) for d in self._summed()]
        if not self.measures_cpu:
            parts.append(self._model.machine_idle_watts)
        known = [p for p in parts if p is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def max_watts(self) -> float | None:
        """Machine's draw with all CPUs busy, watts; ``None`` where it is not modelled."""
        return None if self._summed() else self._model.machine_max_watts

    @property
    def source(self) -> str:
        """How joules are got here, in a sentence."""
        said = []
        if self._rapl.zones:
            zones = ", ".join(z.name for z in self._rapl.zones if z.within is None)
            said.append(f"measured by RAPL: {zones}")
        if not self.measures_cpu:
            m = self._model
            said.append(f"processor and memory modelled: {m.source}; {m.said_interval}")
        said += [
            f"{g.device} ({g.name}) measured by NVML "
            + ("energy counter" if g.counts else "power samples")
            for g in self._nvml.gpus
        ]
        for s in self.sources:
            if s not in (self._rapl, self._nvml) and s.devices:
                what = "the whole machine" if s.whole_machine else ""
                names = what or ", ".join(d.name for d in s.devices)
                said.append(f"{names} measured by {s.devices[0].how}")
        return "; ".join(said)

    # ---- for windows

    def open(self, window: Window) -> Snapshot:
        """Begins a window's span."""
        self._settle()
        with self._lock:
            self._spans[window] = window.peaks
        return self._snapshot(opening=True, fresh=window.peaks)

    def shut(self, window: Window, start: Snapshot, why: tuple[str, ...]) -> Reading:
        """Ends a window's span and keeps its reading."""
        self._settle()
        end = self._snapshot(opening=False)
        with self._lock:
            self._spans.pop(window, None)
        reading = self._between(start, end, why, window.peaks)
        with self._lock:
            self.readings.setdefault(window.name, []).append(reading)
        return reading

    def _settle(self) -> None:
        """Waits until the GPUs have done what they were given."""
        if self._synchronize is False:
            return
        try:
            self._synchronize()
        except Exception as e:  # the program's own next call will raise it again
            note(self._notes, f"GPU work could not be waited for: {e}")

    # ---- the background

    def _begin(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._sample, args=(self._stop,), name="joulesmith-meter", daemon=True
        )
        self._thread.start()

    def _end(self) -> None:
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout=5.0)

    def _sample(self, stop: threading.Event) -> None:
        """Keeps wraparounds, power, memory and others' load from being missed."""
        power = [s for s in self.sources if s.samples]
        least = self.interval if power else _SELDOM * self.interval
        wait, turn = least, 0
        while not stop.wait(wait):
            begin = time.thread_time()
            with suppress(Exception):  # metering must never end the program metered
                for source in power:
                    source.read(time.perf_counter())
                if not power or turn % _SELDOM == 0:
                    self._keep_up()
            turn += 1
            cost = time.thread_time() - begin
            wait = max(least, min(_SLOWEST, cost / _SHARE))

    def _keep_up(self) -> None:
        self._rapl.read(time.perf_counter())
        others = self._others  # of the processes whose time is read next
        cpu, t = self._cpu(), time.perf_counter()
        busy = machine_busy()
        with self._lock:
            others.add(t, busy, cpu)
        self._look()

    # ---- readings

    def _snapshot(self, opening: bool, fresh: Peaks | None = None) -> Snapshot:
        """Own CPU seconds and the clock come nearest the window's inside: last when opening."""
        t, cpu, others = 0.0, None, self._others
        if opening:
            self._look(fresh)
        else:
            cpu, t = self._cpu(), time.perf_counter()
        busy = machine_busy()
        counts: dict[str, Count] = {}
        for source in self.sources:
            counts.update(source.read(time.perf_counter()))
        if opening:
            cpu, t = self._cpu(), time.perf_counter()
        else:
            self._look()
        with self._lock:
            others.add(t, busy, cpu)
        return Snapshot(t, cpu, busy, counts)

    def _cpu(self) -> float | None:
        try:
            with self._lock:
                return self._tree.seconds()
        except Exception:  # a process that ends while it is looked at
            return None

    def _look(self, fresh: Peaks | None = None) -> None:
        """Shows the memory in use to every open span; ``fresh`` has not seen the past."""
        with self._lock:
            pids = self._tree.alive
        held, most = self._resident.look(pids)
        device = self._nvml.memory(pids)
        with self._lock:
            for peaks in self._spans.values():
                peaks.see(held if peaks is fresh else most, device)

    def _summed(self) -> list[Device]:
        """Devices whose joules are added up."""
        return [
            d for s in self.sources if not s.whole_machine for d in s.devices if d.within is None
        ]

    def _processors(self) -> set[str]:
        return {d.name for d in self._summed() if d.cpu}

    def _lost(self, parts: list[Part]) -> list[str]:
        """Counted processors of which nothing is known in a window."""
        processors = self._processors()
        return [p.device for p in parts if p.device in processors and p.joules is None]

    def _between(self, a: Snapshot, b: Snapshot, why: tuple[str, ...], peaks: Peaks) -> Reading:
        seconds = max(0.0, b.t - a.t)
        cpu = None if a.cpu is None or b.cpu is None else max(0.0, b.cpu - a.cpu)
        others = self._others_load(a, b)
        notes = list(why)
        parts: list[Part] = []
        machine: Part | None = None
        for source in self.sources:
            found = [measured(d, a, b, seconds) for d in source.devices]
            notes.extend(said for _, said in found if said)
            if source.whole_machine:
                known = [p for p, _ in found if p.joules is not None]
                machine = known[0] if known else machine
            else:
                parts.extend(p for p, _ in found)
        if lost := self._lost(parts):
            notes.append(f"{', '.join(lost)}: unknown in this window: modelled instead")
            parts = [p for p in parts if not of_the_processor(p, self._processors())]
        marginals = [self._above_idle(p, seconds) for p in parts if p.within is None]
        if self.measures_cpu and not lost:
            names = {d.name.split("-")[0] for d in self._rapl.devices if d.within is None}
            if names == {"package"}:
                notes.append("memory is not counted: this machine has no RAPL zone for it")
            if others is not None and others > _BUSY_OTHERS:
                notes.append(
                    f"other processes took {others:.0%} of the CPU time; the counter includes them"
                )
        else:
            modelled, marginal = self._modelled(seconds, cpu, others or 0.0)
            parts = [*modelled, *parts]
            marginals.append(marginal)
            notes.extend(self._model.notes)
            if cpu is None:
                notes.append("the CPU time of the processes watched is unknown")
            if others is not None and others > _BUSY_OTHERS:
                notes.append(f"other processes took {others:.0%} of the CPU time and are left out")
        for source in self.sources:
            notes.extend(source.notes)
        notes.extend(self._notes)
        notes.extend(
            f"{p.device}: unknown in this window and not in the total"
            for p in parts
            if p.joules is None
        )
        reading = add_up(parts, marginals, seconds, cpu, notes)
        if self._external is not None:
            reading = self._at_the_wall(reading, machine, seconds)
        if self._given_idle is not None and reading.joules is not None:
            above = reading.joules - self._given_idle * seconds
            reading = replace(reading, marginal=max(0.0, above))
        return replace(
            reading,
            machine=machine,
            peak_memory_bytes=peaks.resident,
            device_memory_bytes=peaks.device,
        )

    def _at_the_wall(self, reading: Reading, machine: Part | None, seconds: float) -> Reading:
        """The reading with the external meter's joules, where it knew them."""
        if machine is None or machine.device != "machine":
            said = "the external meter gave nothing for this window: joules are the devices'"
            return replace(reading, notes=(*reading.notes, said))
        said = "joules are the whole machine's, other processes included, by the external meter"
        return replace(
            reading,
            joules=machine.joules,
            low=machine.low,
            high=machine.high,
            pedigree=machine.pedigree,
            marginal=self._above_idle(machine, seconds),
            notes=(*reading.notes, said),
        )

    def _others_load(self, a: Snapshot, b: Snapshot) -> float | None:
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

    def _above_idle(self, part: Part, seconds: float) -> float | None:
        idle = self._idle.get(part.device)
        if part.joules is None or idle is None:
            return None
        return max(0.0, part.joules - idle * seconds)


def _cuda() -> None:
    """Waits for PyTorch's work on every CUDA (or ROCm) device that this program uses."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not getattr(cuda, "is_initialized", bool)():
        return
    # Waiting for a device that has no context yet would make one, in its memory.
    used = getattr(getattr(torch, "_C", None), "_cuda_hasPrimaryContext", None)
    if used is None:
        cuda.synchronize()
        return
    for index in range(cuda.device_count()):
        if used(index):
            cuda.synchronize(index)
