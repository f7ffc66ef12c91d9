"""CPU seconds: of a process with its descendants, and of the whole machine.

Knows processes; knows no joules. Windows may be 20 ms short while the kernel's
tick is 10 ms, so the scheduler's own clocks are read where the system has them:
`time.process_time` for this process, the POSIX CPU clock of other processes
(Linux), `getrusage` for children that have ended.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

_LINUX = sys.platform.startswith("linux")
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h: nanoseconds run, whole process
_QUIET = 0.02
"""Others' load below this share is the system's own housekeeping and counts as none."""


def _clock(pid: int) -> float | None:
    """Seconds run by all threads of a live process, to the nanosecond; Linux only."""
    if not _LINUX:
        return None
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return None


def _reaped(pid: int) -> float:
    """Seconds run by ended descendants of ``pid`` (clock ticks); 0 when unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            # The command name may hold spaces and brackets: fields start after the last ")".
            fields = f.read().rpartition(b")")[2].split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _children(pid: int) -> list[int]:
    if _LINUX:
        found: list[int] = []
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                with open(task / "children", "rb") as f:
                    found.extend(int(p) for p in f.read().split())
            return found
        except (OSError, ValueError):
            pass  # kernel without CONFIG_PROC_CHILDREN, or the process has ended
    try:
        import psutil

        return [c.pid for c in psutil.Process(pid).children()]
    except Exception:
        return []


def _psutil_seconds(pid: int) -> float | None:
    try:
        import psutil

        t = psutil.Process(pid).cpu_times()
    except Exception:
        return None
    return float(t.user + t.system)


class ProcessTree:
    """CPU seconds of some processes and all their descendants.

    pids: roots; default this process. A root that has ended keeps its last value.
    """

    def __init__(self, pids: Iterable[int] | None = None) -> None:
        self.pids = tuple(dict.fromkeys(pids)) if pids is not None else (os.getpid(),)
        self._last: dict[int, float] = {}
        self.alive: tuple[int, ...] = self.pids
        """Roots and descendants as `seconds` last saw them."""

    def seconds(self) -> float | None:
        """Seconds of user and system time so far; ``None`` when no root was ever readable."""
        seen: set[int] = set()
        total, known = 0.0, False
        for pid in self.pids:
            if pid in seen:
                continue
            value = self._root(pid, seen)
            if value is None:
                value = self._last.get(pid)
            else:
                # Descendants that end unseen take their time with them: never go back.
                value = self._last[pid] = max(value, self._last.get(pid, 0.0))
            if value is not None:
                total, known = total + value, True
        self.alive = tuple(seen)
        return total if known else None

    def _root(self, pid: int, seen: set[int]) -> float | None:
        if pid == os.getpid():
            children = _children(pid)
            below = sum(self._below(c, seen) for c in children)
            seen.add(pid)
            return time.process_time() + _own_reaped() + below
        return self._branch(pid, seen)

    def _below(self, pid: int, seen: set[int]) -> float:
        return self._branch(pid, seen) or 0.0

    def _branch(self, pid: int, seen: set[int]) -> float | None:
        if pid in seen:
            return 0.0
        seen.add(pid)
        own = _clock(pid)
        if own is None:
            own = _psutil_seconds(pid)
        if own is None:
            return None
        return own + _reaped(pid) + sum(self._below(c, seen) for c in _children(pid))


class Descendants(ProcessTree):
    """CPU seconds of all that this process starts, its own left out."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = ()

    def seconds(self) -> float | None:
        """Seconds of user and system time of living and collected descendants so far."""
        seen: set[int] = set()
        # Collecting a child moves its time from one term to the other, cut to ticks in
        # the first: never go back.
        value = _own_reaped() + sum(self._below(c, seen) for c in _children(os.getpid()))
        value = self._last[0] = max(value, self._last.get(0, 0.0))
        self.alive = tuple(seen)
        return value


def _own_reaped() -> float:
    """Seconds of this process's children that have ended and were waited for."""
    try:
        import resource
    except ImportError:  # Windows
        t = os.times()
        return t.children_user + t.children_system
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    return r.ru_utime + r.ru_stime


def machine_busy(stat: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds that this machine's processors were busy since boot; ``None`` if unknown.

    Time stolen by a hypervisor is not this machine's and is left out.
    """
    if _LINUX:
        try:
            with open(stat, "rb") as f:
                v = [int(x) for x in f.readline().split()[1:8]]
            # user nice system idle iowait irq softirq; guest time is inside user.
            return (v[0] + v[1] + v[2] + v[5] + v[6]) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            pass
    try:
        import psutil

        t = psutil.cpu_times()
    except Exception:
        return None
    return float(t.user + t.system + getattr(t, "nice", 0.0))


class OthersLoad:
    """How much of the machine processes other than ours take.

    The machine's own count moves in ticks, so a short window borrows the last
    `span` seconds before its end; a longer one uses its own two ends.
    """

    def __init__(self, cpus: int, span: float = 1.0) -> None:
        self.cpus = max(1, cpus)
        self.span = span
        self._points: deque[tuple[float, float, float]] = deque(maxlen=128)

    def add(self, t: float, busy: float | None, own: float | None) -> None:
        """One point: clock, machine's busy CPU seconds, our CPU seconds."""
        if busy is None or own is None:
            return
        if not self._points or t - self._points[-1][0] >= self.span / 100:
            self._points.append((t, busy, own))

    def load(
        self, start: tuple[float, float | None, float | None], end: tuple[float, float, float]
    ) -> float | None:
        """Share of the machine's CPU time (0..1) that others took; ``None`` if unknown."""
        first: tuple[float, float, float] | None = None
        if start[1] is not None and start[2] is not None and end[0] - start[0] >= self.span:
            first = (start[0], start[1], start[2])
        else:
            # A young meter has less history: a tenth of the span is some ten ticks, enough
            # to tell a busy machine from an idle one.
            ages = ((p, end[0] - p[0]) for p in self._points)
            first = next((p for p, a in ages if self.span / 10 <= a <= 1.5 * self.span), None)
        if first is None:
            return None
        seconds = end[0] - first[0]
        others = (end[1] - first[1]) - (end[2] - first[2])
        share = others / (seconds * self.cpus)
        return 0.0 if share < _QUIET else min(1.0, share)
