"""The power model of processor and memory, for machines without counters.

    P = share * sockets' (idle + (max - idle) * g(load)) + DRAM, watts
    g(load) = load ** exponent, load = busy CPU seconds / (seconds * CPUs), 0..1

Knows watts; knows no processes and no windows. Idle and maximum are fractions of
TDP; the fractions and the exponent are fitted by ``benchmarks/fit_cpu_power.py``
on 115 servers of SPECpower_ssj2008 (2016 and later, at the wall) and on RAPL
sweeps of two processors, each kind of source counting the same. Error of g: 0.13
on servers left out, 0.16 to 0.31 on a processor left out (mean absolute).

Share. A virtual machine holds CPUs / (cores * threads) of a socket. There the
exponent is 1: a guest moves its host's load by little, and a curve's small piece
is a line, so joules above idle are proportional to CPU seconds. A guest's CPU may
be a hardware thread or a whole core; where the guest cannot tell, a thread is
taken and the upper end of the interval covers the core.

Whose joules. `Energy.joules` is what this machine drew for the processes watched:
the idle draw of the window less the part of the machine that others kept busy,
plus their CPU-time share of the draw above idle. `Energy.marginal` is only the
latter. Alone on the machine, the processes are charged all of it.

Boundary: processor packages and memory. Fans, disks and the power supply's loss
are outside, as they are for RAPL.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from joulesmith.energy.cpus import Cpu, CpuRow, fall_back, identify, look_up
from joulesmith.errors import JoulesmithError

EXPONENT = 0.61
IDLE_FRACTION = 0.13
MAX_FRACTION = 0.73
DRAM_WATTS_PER_GIB = 0.1
"""Large DIMMs (5 to 8 W for 64 to 128 GB). Published constants of 0.28 to 0.39 W/GB
come from small ones; the interval reaches up to them."""
_DRAM_LOW, _DRAM_HIGH = 0.5, 3.9
_SIZE_EXPONENT = 0.55
"""Within a generation TDP grows with about the root of the cores (Xeon, EPYC lists)."""
_ERROR_TDP, _ERROR_COARSE, _ERROR_GIVEN = 0.50, 0.70, 0.15
IDLE_ENV, MAX_ENV = "JOULESMITH_IDLE_WATTS", "JOULESMITH_MAX_WATTS"


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
    idle_watts, max_watts: processor, this machine's share of it.
    dram_watts: memory, 0 where the other two already hold it.
    low, high: factors on joules, the 90 % interval of the processor.
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

    def __post_init__(self) -> None:
        if not 0 <= self.idle_watts <= self.max_watts:
            raise JoulesmithError(
                f"idle watts must lie between 0 and max watts: {self.idle_watts:g} and "
                f"{self.max_watts:g} W"
            )
        if not (0 < self.low <= 1 <= self.high and self.cpus > 0 and 0 < self.exponent <= 1):
            raise JoulesmithError("CPU power model: cpus, exponent or interval out of range")

    @classmethod
    def detect(
        cls,
        idle_watts: float | None = None,
        max_watts: float | None = None,
        *,
        cpu: Cpu | None = None,
        memory_bytes: int | None = None,
    ) -> CpuPower:
        """The model of this machine.

        idle_watts, max_watts: the machine's own draw without GPUs if you know it (a
        plug meter); default the environment's ``JOULESMITH_IDLE_WATTS`` and
        ``JOULESMITH_MAX_WATTS``. With both, memory is inside them and the interval
        is +-15 %. cpu, memory_bytes: default this machine's.
        Raises `JoulesmithError` when a given value is not a number of watts.
        """
        idle = _given(idle_watts, IDLE_ENV)
        top = _given(max_watts, MAX_ENV)
        cpu = cpu or identify()
        if idle is not None and top is not None:
            return cls(
                name=cpu.name,
                cpus=cpu.cpus,
                idle_watts=idle,
                max_watts=top,
                dram_watts=0.0,
                exponent=_exponent(cpu, 1.0),
                low=1 - _ERROR_GIVEN,
                high=1 + _ERROR_GIVEN,
                source=f"idle {idle:g} W and maximum {top:g} W as given, by CPU time",
            )
        row = look_up(cpu) or fall_back(cpu)
        share, tdp, ambiguous, notes = _slice(cpu, row)
        error = _ERROR_COARSE if row.coarse else _ERROR_TDP
        high = math.log(1 + error)
        if ambiguous:
            # Independent errors: factors combine as their logarithms, in quadrature.
            high = math.hypot(high, math.log(2.0))
        if idle is not None or top is not None:
            notes.append(f"only one of {IDLE_ENV} and {MAX_ENV} is known; the other is estimated")
        low_w = IDLE_FRACTION * tdp * share if idle is None else idle
        top_w = MAX_FRACTION * tdp * share if top is None else top
        # One estimated end must not cross the given one.
        low_w = min(low_w, top_w) if idle is None else low_w
        top_w = max(low_w, top_w) if top is None else top_w
        size = _memory() if memory_bytes is None else memory_bytes
        where = f"{cpu.cpus} CPUs of a virtual machine" if cpu.virtual else f"{cpu.sockets} socket"
        return cls(
            name=row.name,
            cpus=cpu.cpus,
            idle_watts=low_w,
            max_watts=top_w,
            dram_watts=DRAM_WATTS_PER_GIB * size / 2**30,
            exponent=_exponent(cpu, share),
            low=1 - error,
            high=math.exp(high),
            source=f"{row.name}, TDP {tdp:.0f} W a socket ({row.source}), {where}, by CPU time",
            notes=tuple(notes),
        )

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
        return Energy(joules, marginal, joules * self.low, joules * self.high)

    def dram(self, seconds: float, others: float = 0.0) -> Energy:
        """Memory's joules over a window: refresh and standby, so all of it is idle draw."""
        joules = self.dram_watts * (1.0 - min(1.0, max(0.0, others))) * max(0.0, seconds)
        return Energy(joules, 0.0, joules * _DRAM_LOW, joules * _DRAM_HIGH)

    def _dynamic(self, load: float) -> float:
        return (self.max_watts - self.idle_watts) * math.pow(load, self.exponent)


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


def _exponent(cpu: Cpu, share: float) -> float:
    return 1.0 if cpu.virtual and share <= 1.0 else EXPONENT


def _slice(cpu: Cpu, row: CpuRow) -> tuple[float, float, bool, list[str]]:
    """Sockets' share, TDP of a socket, whether a CPU may be a whole core, notes."""
    notes = [f"{row.name} is a coarse row: {row.source}"] if row.coarse else []
    if not cpu.virtual:
        # The table holds the top product; the cores here tell how far below it this one is.
        real = max(1, cpu.cores // cpu.sockets)
        tdp = row.tdp * (real / row.cores) ** _SIZE_EXPONENT if row.kind == "server" else row.tdp
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
