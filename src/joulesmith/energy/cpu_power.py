"""The power model of processor and memory, for machines without counters.

    P = share * sockets * (idle + (max - idle) * g(load)) + DRAM per GiB + traffic, watts
    load = busy CPU seconds / (seconds * CPUs), 0..1

Knows watts; knows no processes and no windows. Curve and ends: `power_curve`.

Boundary. ``package`` (the default) is the processor packages, and memory beside
them: what RAPL counts where it exists. ``wall`` is all that the plug sees but GPUs.
Watts that the user gives are taken to be of the wall, with memory in them.

Share. A virtual machine holds CPUs / (cores * threads) of a socket. There the curve
is a line: a guest moves its host's load by little, and a curve's small piece is a
line, so joules above idle are proportional to CPU seconds. A guest's CPU may be a
hardware thread or a whole core; where the guest cannot tell, a thread is taken and
the upper end of the interval covers the core.

Whose joules. `Energy.joules` is what this machine drew for the processes watched:
the idle draw of the window less the part of the machine that others kept busy,
plus their CPU-time share of the draw above idle. `Energy.marginal` is only the
latter. Alone on the machine, the processes are charged all of it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from joulesmith.energy.cpus import Cpu, CpuRow, fall_back, identify, look_up
from joulesmith.energy.power_curve import (
    LINE,
    PACKAGE,
    WALL,
    Boundary,
    Curve,
    package_ends,
    wall_class,
)
from joulesmith.errors import JoulesmithError

DRAM_WATTS_PER_GIB = 0.1
"""Large DIMMs (5 to 8 W for 64 to 128 GB). Published constants of 0.28 to 0.39 W/GB
come from small ones; the interval reaches up to them."""
_DRAM_LOW, _DRAM_HIGH = 0.5, 3.9
DRAM_JOULES_PER_BYTE = 160e-12
"""DDR4: 20 pJ/bit, array and interface; devices of 7 (LPDDR) to 29 pJ/bit are published."""
_TRAFFIC_LOW, _TRAFFIC_HIGH = 0.35, 1.45
_SIZE_EXPONENT = 0.55
"""Within a generation TDP grows with about the root of the cores (Xeon, EPYC lists)."""
_ERROR_TDP, _ERROR_COARSE, _ERROR_GIVEN, _ERROR_GIVEN_PACKAGE = 0.50, 0.70, 0.15, 0.30
"""Measured by ``benchmarks/power_model.py``, but for coarse rows. A package's curve hangs
on how its load is made, hence the wider interval of its known ends."""
_LIGHT_PACKAGE, _LIGHT_GIVEN_PACKAGE = 1.85, 3.6
"""How much wider a package's interval is, in logarithms, at no load: packages of one TDP
draw from 0.4 to 2 times the model there, and agree within a quarter at full load."""
_ERROR_GIVEN_UNSEEN = 0.25
"""A maker whose machines were not fitted: the other maker's curve misses by 14 %."""
_HIGH_DESKTOP = 2.2
"""Boards let desktop processors draw about twice their TDP: a Core i9-12900K of 125 W up
to 241 W without a limit of time."""
IDLE_ENV, MAX_ENV = "JOULESMITH_IDLE_WATTS", "JOULESMITH_MAX_WATTS"
TDP_ENV = "JOULESMITH_TDP_WATTS"


@dataclass(frozen=True)
class Energy:
    """Joules of one window for one device; ``low`` <= ``joules`` <= ``high``."""

    joules: float
    marginal: float
    low: float
    high: float


@dataclass(frozen=True)
class CpuPower:
    """Watts of this machine's processor and memory. Build with `CpuPower.detect`.

    name: the processor as found. cpus: logical processors.
    idle_watts, max_watts: of the boundary, this machine's share of it.
    dram_watts: memory, 0 where the other two already hold it.
    exponent, jump, bend: see `power_curve.Curve`.
    low, high: factors on joules with all CPUs busy, the 90 % interval.
    light: by how much its logarithms are larger at no load; between, by the load.
    boundary: what the watts are of; "package" or "wall".
    """

    name: str
    cpus: int
    idle_watts: float
    max_watts: float
    dram_watts: float
    exponent: float
    low: float
    high: float
    source: str
    notes: tuple[str, ...] = ()
    jump: float = 0.0
    bend: float = 0.0
    boundary: Boundary = "package"
    light: float = 1.0

    def __post_init__(self) -> None:
        # A maximum of 0 W would print joules of 0 for work that was done.
        if not (0 <= self.idle_watts <= self.max_watts < math.inf and self.max_watts > 0):
            raise JoulesmithError(
                "idle watts must lie between 0 and max watts, max above 0: "
                f"{self.idle_watts:g} and {self.max_watts:g} W"
            )
        sound = 0 < self.low <= 1 <= self.high and 1 <= self.light < math.inf
        if not (sound and self.cpus > 0 and self.dram_watts >= 0):
            raise JoulesmithError("CPU power model: cpus, memory or interval out of range")
        try:
            Curve(self.exponent, self.jump, self.bend)
        except ValueError as e:
            raise JoulesmithError(f"CPU power model: {e}") from None

    @classmethod
    def detect(
        cls,
        idle_watts: float | None = None,
        max_watts: float | None = None,
        *,
        tdp_watts: float | None = None,
        boundary: Boundary | None = None,
        cpu: Cpu | None = None,
        memory_bytes: int | None = None,
    ) -> CpuPower:
        """The model of this machine.

        idle_watts, max_watts: the machine's own draw without GPUs if you know it (a
        plug meter); default the environment's ``JOULESMITH_IDLE_WATTS`` and
        ``JOULESMITH_MAX_WATTS``, then what ``joulesmith calibrate-power`` has stored.
        With both, memory is inside them and the interval is +-15 %.
        tdp_watts: of one socket; default ``JOULESMITH_TDP_WATTS``, then the table.
        boundary: of the figures to come and of the watts given; default "wall" where
        watts of the machine are known, else "package".
        cpu, memory_bytes: default this machine's.
        Raises `JoulesmithError` when a given value is not a number of watts.
        """
        idle, top = _given(idle_watts, IDLE_ENV), _given(max_watts, MAX_ENV)
        tdp = _given(tdp_watts, TDP_ENV)
        cpu = cpu or identify()
        size = _memory() if memory_bytes is None else memory_bytes
        row = look_up(cpu) or fall_back(cpu)
        if idle is not None and top is not None:
            return cls._known(cpu, row, idle, top, boundary or "wall", memory_bytes=size)
        if tdp is not None:
            row = replace(row, tdp=tdp, coarse=False, exact=True, source="as given")
        if idle is not None or top is not None:
            return cls._estimate(cpu, row, boundary or "wall", size, idle, top)
        why = ""
        if boundary != "package":
            from joulesmith.energy import calibrate_power

            stored, why = calibrate_power.recall(cpu)
            if stored is not None:
                idle, top, curve = stored.idle_watts, stored.max_watts, stored.curve
                known = cls._known(cpu, row, idle, top, "wall", curve=curve)
                return replace(known, source=stored.source)
        model = cls._estimate(cpu, row, boundary or "package", size)
        return replace(model, notes=(why, *model.notes)) if why else model

    @classmethod
    def _known(
        cls,
        cpu: Cpu,
        row: CpuRow,
        idle: float,
        top: float,
        boundary: Boundary,
        *,
        curve: Curve | None = None,
        memory_bytes: int = 0,
    ) -> CpuPower:
        """From both ends, with the curve of this kind of machine unless it is given."""
        wall = wall_class(cpu.vendor, row.kind, max(1, cpu.cores // cpu.sockets))
        if boundary == "wall" and curve is None and cpu.virtual:
            curve = WALL["any"].curve  # any host's
        model = cls.from_ends(
            idle,
            top,
            cpus=cpu.cpus,
            boundary=boundary,
            curve=curve or (PACKAGE if boundary == "package" else wall.curve),
            memory_bytes=memory_bytes,
        )
        model = replace(model, name=cpu.name)
        if boundary == "wall" and curve is None and wall is WALL["any"]:
            note = "how power rises with load was not measured for this maker of processors"
            error = _ERROR_GIVEN_UNSEEN
            return replace(model, low=1 - error, high=1 + error, notes=(note,))
        return model

    @classmethod
    def _estimate(
        cls,
        cpu: Cpu,
        row: CpuRow,
        boundary: Boundary,
        memory_bytes: int,
        idle: float | None = None,
        top: float | None = None,
    ) -> CpuPower:
        """From the TDP, and one of the two ends where it is known."""
        share, tdp, ambiguous, notes = _slice(cpu, row)
        model = cls.from_tdp(
            tdp,
            sockets=share,
            cpus=cpu.cpus,
            vendor=cpu.vendor,
            kind=row.kind,
            cores_per_socket=row.cores if cpu.virtual else max(1, cpu.cores // cpu.sockets),
            boundary=boundary,
            memory_bytes=memory_bytes,
        )
        error = _ERROR_COARSE if row.coarse else _ERROR_TDP
        high = math.log(max(1 + error, model.high))
        if ambiguous:
            # Independent errors: factors combine as their logarithms, in quadrature.
            high = math.hypot(high, math.log(2.0))
        # One estimated end must not cross the given one.
        low_w = min(model.idle_watts, top or math.inf) if idle is None else idle
        top_w = max(low_w, model.max_watts) if top is None else top
        line = LINE if cpu.virtual and share <= 1.0 else model.curve
        said = [
            f"{row.name}, TDP {tdp:.0f} W a socket ({row.source})",
            f"{cpu.cpus} CPUs of a virtual machine" if cpu.virtual else f"{cpu.sockets} socket",
            "at the wall" if boundary == "wall" else "processor packages only",
        ]
        if idle is not None or top is not None:
            which, watts = ("idle", idle) if idle is not None else ("maximum", top)
            said.append(f"{which} {watts:g} W as given")
            notes.append(f"only one of {IDLE_ENV} and {MAX_ENV} is known; the other is estimated")
        return replace(
            model,
            name=row.name,
            idle_watts=low_w,
            max_watts=top_w,
            exponent=line.exponent,
            jump=line.jump,
            bend=line.bend,
            low=1 - error,
            high=math.exp(high),
            source=", ".join([*said, "by CPU time"]),
            notes=tuple(notes),
        )

    @classmethod
    def from_ends(
        cls,
        idle_watts: float,
        max_watts: float,
        *,
        cpus: int = 1,
        boundary: Boundary = "wall",
        curve: Curve | None = None,
        vendor: str = "",
        kind: str = "server",
        cores_per_socket: int | None = None,
        memory_bytes: int = 0,
    ) -> CpuPower:
        """A machine of which idle and full-load watts are known: +-15 %.

        A package's interval is +-30 % at full load and far wider below (`interval`).

        boundary: of the two numbers; at the wall they hold memory, else memory_bytes
        adds its draw. curve: default by vendor, kind and cores_per_socket at the wall
        (see `power_curve.wall_class`), one for all packages.
        Raises `JoulesmithError` unless 0 <= idle_watts <= max_watts.
        """
        if curve is None:
            wall = wall_class(vendor, kind, cores_per_socket)
            curve = PACKAGE if boundary == "package" else wall.curve
        error = _ERROR_GIVEN if boundary == "wall" else _ERROR_GIVEN_PACKAGE
        return cls(
            name="machine",
            cpus=cpus,
            idle_watts=idle_watts,
            max_watts=max_watts,
            dram_watts=_dram_watts(boundary, memory_bytes),
            exponent=curve.exponent,
            low=1 - error,
            high=1 + error,
            source=f"idle {idle_watts:g} W and maximum {max_watts:g} W as given, by CPU time",
            jump=curve.jump,
            bend=curve.bend,
            boundary=boundary,
            light=_LIGHT_GIVEN_PACKAGE if boundary == "package" else 1.0,
        )

    @classmethod
    def from_tdp(
        cls,
        tdp_watts: float,
        *,
        boundary: Boundary,
        sockets: float = 1,
        cpus: int = 1,
        vendor: str = "",
        kind: str = "server",
        cores_per_socket: int | None = None,
        memory_bytes: int = 0,
    ) -> CpuPower:
        """A machine of which only the TDP of a socket is known: +-50 %.

        A package's interval is wider below full load (`interval`).

        boundary: what to estimate: "package", the processors as RAPL counts them
        (memory_bytes adds memory's draw), or "wall", the whole machine (memory is in
        it). sockets: number, or a share of one. vendor, kind, cores_per_socket: see
        `power_curve.wall_class`.
        Raises `JoulesmithError` when the watts are no number of watts.
        """
        if not (math.isfinite(tdp_watts) and tdp_watts > 0):
            raise JoulesmithError(f"TDP must be a number of watts above 0: {tdp_watts:g}")
        wall = wall_class(vendor, kind, cores_per_socket)
        idle, top = (wall.idle, wall.max) if boundary == "wall" else package_ends(kind)
        curve = wall.curve if boundary == "wall" else PACKAGE
        above = kind == "desktop" and boundary == "package"
        return cls(
            name="processor",
            cpus=cpus,
            idle_watts=idle * tdp_watts * sockets,
            max_watts=top * tdp_watts * sockets,
            dram_watts=_dram_watts(boundary, memory_bytes),
            exponent=curve.exponent,
            low=1 - _ERROR_TDP,
            high=_HIGH_DESKTOP if above else 1 + _ERROR_TDP,
            source=f"TDP {tdp_watts:g} W a socket, by CPU time",
            jump=curve.jump,
            bend=curve.bend,
            boundary=boundary,
            light=_LIGHT_PACKAGE if boundary == "package" else 1.0,
        )

    def interval(self, load: float) -> tuple[float, float]:
        """Factors on joules at a load of 0..1, the 90 % interval."""
        wider = 1.0 + (self.light - 1.0) * (1.0 - min(1.0, max(0.0, load)))
        return self.low**wider, self.high**wider

    @property
    def said_interval(self) -> str:
        """The interval in words."""
        said = f"interval x{self.low:.2g} to x{self.high:.2g}"
        if self.light == 1.0:
            return said
        low, high = self.interval(0.0)
        return f"{said} at full load, x{low:.2g} to x{high:.2g} near idle"

    @property
    def curve(self) -> Curve:
        """The share of the draw above idle by load."""
        return Curve(self.exponent, self.jump, self.bend)

    @property
    def machine_idle_watts(self) -> float:
        """Processor and memory, idle."""
        return self.idle_watts + self.dram_watts

    @property
    def machine_max_watts(self) -> float:
        """Processor and memory, all CPUs busy."""
        return self.max_watts + self.dram_watts

    def watts(self, load: float) -> float:
        """Processor watts at a load of 0..1 (values outside are clipped)."""
        return self.idle_watts + self._dynamic(min(1.0, max(0.0, load)))

    def cpu(self, seconds: float, cpu_seconds: float, others: float = 0.0) -> Energy:
        """The processor's joules over a window.

        seconds: wall time; cpu_seconds: of the processes watched; others: share of
        the machine's CPU time (0..1) that other processes took.
        """
        if seconds <= 0:
            return Energy(0.0, 0.0, 0.0, 0.0)
        own = min(1.0, max(0.0, cpu_seconds / (seconds * self.cpus)))
        others = min(1.0 - own, max(0.0, others))
        load = own + others
        marginal = self._dynamic(load) * (own / load) * seconds if own > 0 else 0.0
        joules = marginal + self.idle_watts * (1.0 - others) * seconds
        low, high = self.interval(load)
        return Energy(joules, marginal, joules * low, joules * high)

    def dram(self, seconds: float, others: float = 0.0, traffic_bytes: float = 0.0) -> Energy:
        """Memory's joules over a window.

        Refresh and standby are idle draw; traffic_bytes, read and written by the
        processes watched where somebody knows them, come on top and are marginal.
        """
        seconds, moved = max(0.0, seconds), max(0.0, traffic_bytes) * DRAM_JOULES_PER_BYTE
        if self.boundary == "wall":
            return Energy(0.0, 0.0, 0.0, 0.0)  # inside the processor's figure
        idle = self.dram_watts * (1.0 - min(1.0, max(0.0, others))) * seconds
        low = idle * _DRAM_LOW + moved * _TRAFFIC_LOW
        return Energy(idle + moved, moved, low, idle * _DRAM_HIGH + moved * _TRAFFIC_HIGH)

    def _dynamic(self, load: float) -> float:
        return (self.max_watts - self.idle_watts) * self.curve(load)


def _given(value: float | None, env: str) -> float | None:
    if value is None:
        text = os.environ.get(env, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise JoulesmithError(f"{env} is not a number of watts: {text!r}") from None
    if not (math.isfinite(value) and value >= 0):
        raise JoulesmithError(f"{env} must be a number of watts, 0 or more: {value}")
    return value


def _dram_watts(boundary: Boundary, memory_bytes: int) -> float:
    return DRAM_WATTS_PER_GIB * memory_bytes / 2**30 if boundary == "package" else 0.0


def _slice(cpu: Cpu, row: CpuRow) -> tuple[float, float, bool, list[str]]:
    """Sockets' share, TDP of a socket, whether a CPU may be a whole core, notes."""
    notes = [f"{row.name} is a coarse row: {row.source}"] if row.coarse else []
    if not cpu.virtual:
        # The table holds the top product; the cores here tell how far below it this one is.
        real = max(1, cpu.cores // cpu.sockets)
        scale = row.kind == "server" and not row.exact
        tdp = row.tdp * (real / row.cores) ** _SIZE_EXPONENT if scale else row.tdp
        return float(cpu.sockets), tdp, False, notes
    ambiguous = row.threads_per_core > 1 and cpu.threads_per_core == 1
    if ambiguous:
        notes.append(
            "a CPU of this virtual machine may be a hardware thread (taken) or a whole core "
            "(inside the interval)"
        )
    return cpu.cpus / (row.cores * row.threads_per_core), row.tdp, ambiguous, notes


def _memory() -> int:
    """Bytes of main memory; 0 when the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass
    try:
        import psutil

        return int(psutil.virtual_memory().total)
    except Exception:
        return 0
