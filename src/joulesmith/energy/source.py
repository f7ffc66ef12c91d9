"""What a source of joules is, and the three things that all of them need.

Knows cumulative joules and their doubts; knows no devices and no windows.

A source says which `Device`s it counts and answers `read(now)` with a `Count` for
each that answers now. Joules of a window are the difference of two counts.
`Tally` undoes what befalls a hardware counter (wraps, restarts, jumps), `PowerSum`
integrates samples of power, and `Patient` calls into a driver that may hang.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")
_SLACK = 50.0
"""Joules that a counter may move at once however short the time: it moves in steps."""
_STILL_SECONDS = 1.0
"""What is switched on draws something, and every counter refreshes more often than this."""
_TURN_WATTS = 500.0
"""Power at which a counter not looked at for long is taken to have turned over unseen."""


@dataclass(frozen=True)
class Device:
    """One thing that is counted.

    name: as in a `Part`: "package-0", "gpu0". how: "RAPL", "NVML energy counter".
    step: seconds between two refreshes of the counter or sensor.
    error: half-width of the 90 % interval of a long window, as a share of its joules.
    within: the device whose joules already hold this one's, if any.
    cpu: it holds the processor, so that none is modelled while it is known.
    """

    name: str
    how: str
    step: float
    error: float
    within: str | None = None
    cpu: bool = False


@dataclass(frozen=True)
class Count:
    """Cumulative joules of one device since its source was made; they never fall.

    variance: J², sum of the squared half-widths of what sampling may have missed.
    missing: joules that may have gone uncounted (a restart); they widen upwards.
    epoch: changes where counting was interrupted; a window across is unknown.
    watts: power now, for windows shorter than a step of the counter.
    """

    joules: float
    variance: float = 0.0
    missing: float = 0.0
    epoch: int = 0
    watts: float | None = None


class Source(Protocol):
    """A reader of counters or of power. Thread-safe; never raises; never blocks for long.

    name: "RAPL". whole_machine: it counts the machine as a whole, beside the sum of devices.
    samples: it integrates power, so it must be read often to be exact.
    notes: what went wrong so far, one line each.
    """

    @property
    def name(self) -> str: ...
    @property
    def whole_machine(self) -> bool: ...
    @property
    def samples(self) -> bool: ...
    @property
    def notes(self) -> list[str]: ...

    @property
    def devices(self) -> tuple[Device, ...]:
        """What is counted, found when the source was made."""

    def read(self, now: float) -> dict[str, Count]:
        """Counts by device name at ``now`` (seconds on a clock that never goes back).

        A device that cannot be read now is absent, with a note.
        """

    def close(self) -> None:
        """Lets go of drivers and threads. May be called twice."""


def note(notes: list[str], text: str) -> None:
    """Adds a line once."""
    if text not in notes:
        notes.append(text)


class Tally:
    """Cumulative joules of a counter that may wrap, restart or jump.

    name: for notes. raw, now: the counter in joules, the clock in seconds.
    limit: most watts believed; a faster move is no energy. turn: joules of a full
    turn of a counter that wraps, ``None`` where a smaller value is a restart.
    rests: it may draw nothing at all, so that standing still is no fault.
    """

    def __init__(
        self,
        name: str,
        raw: float,
        now: float,
        *,
        limit: float,
        turn: float | None = None,
        rests: bool = False,
        notes: list[str],
    ) -> None:
        self._name, self._raw, self._now = name, raw, now
        self._limit, self._turn, self._notes = limit, turn, notes
        self._rests = rests
        self._joules = self._missing = self._top = self._still = 0.0

    def add(self, raw: float, now: float) -> Count:
        """The count after one more value of the counter."""
        dt = max(0.0, now - self._now)
        step = raw - self._raw
        most = self._limit * dt + _SLACK
        believed = True
        if step < 0 and self._turn is not None:
            step += self._turn
            if not 0 <= step <= most:
                believed = False
                note(self._notes, f"{self._name}: the counter went back; some joules are lost")
        elif step < 0:
            note(self._notes, f"{self._name}: the counter started over; some joules are lost")
            step = raw if raw <= most else 0.0
            self._missing += max(0.0, self._plausible(dt) - step)
        elif step > most:
            believed = False
            note(self._notes, f"{self._name}: the counter jumped ahead; some joules are lost")
        if not believed:
            step = 0.0
            self._missing += self._plausible(dt)
        if self._turn is not None and dt * _TURN_WATTS > self._turn:
            note(
                self._notes,
                f"{self._name}: not read for {dt:.0f} s, so a turn of the counter may be missing",
            )
            self._missing += self._turn
        self._still = self._still + dt if raw == self._raw and not self._rests else 0.0
        if self._still > _STILL_SECONDS:
            note(self._notes, f"{self._name}: the counter stood still; some joules may be lost")
            self._missing += self._plausible(self._still)
            self._still = 0.0
        if dt > 0.02:
            self._top = max(self._top, step / dt)
        self._raw, self._now = raw, max(now, self._now)
        self._joules += max(0.0, step)
        return Count(self._joules, missing=self._missing)

    def _plausible(self, dt: float) -> float:
        """Joules that an unseen stretch may have taken: at twice the most power seen so far."""
        return dt * (min(self._limit, 2 * self._top) if self._top > 0 else self._limit)


class PowerSum:
    """Joules from samples of power, by trapezoid. Not thread-safe: its owner locks.

    A stretch between two samples may have drawn anything between them: half their
    difference, times the time, is its half-width, independent of other stretches'.
    gap: seconds above which a stretch counts as unseen, good to 50 % at best.
    hold: seconds for which the last sample stands for the present.
    """

    def __init__(self, gap: float, hold: float) -> None:
        self._gap, self._hold = gap, hold
        self._last: tuple[float, float] | None = None
        self._joules = self._variance = self._given = 0.0
        self._epoch = 0
        self.gaps = 0
        """Stretches that went unseen."""

    def add(self, t: float, watts: float) -> None:
        """One sample. A clock that stands or goes back adds nothing."""
        if self._last is not None:
            then, before = self._last
            if t <= then:
                return
            dt, mean = t - then, 0.5 * (before + watts)
            half = 0.5 * abs(watts - before) * dt
            if dt > self._gap:
                self.gaps += 1
                half = max(half, 0.5 * mean * dt)
            self._joules += mean * dt
            self._variance += half * half
        self._last = (t, watts)

    def interrupt(self) -> None:
        """What comes next has nothing to do with what was before."""
        if self._last is not None:
            self._last = None
            self._epoch += 1

    def count(self, now: float) -> Count | None:
        """The count at ``now``; ``None`` where the last sample is too old."""
        if self._last is None:
            return None
        then, watts = self._last
        age = max(0.0, now - then)
        if age > self._hold:
            return None
        # What was held too high is taken back later only as far as counts never fall.
        self._given = max(self._given, self._joules + watts * age)
        return Count(self._given, variance=self._variance, epoch=self._epoch, watts=watts)


def believable(watts: float, most: float = 1e5) -> float | None:
    """``watts`` if that can be a power at all, else ``None``."""
    return watts if math.isfinite(watts) and 0 <= watts < most else None


class Patient:
    """Calls that may never come back, made from a thread that can be left behind.

    name: of the driver, for the message. seconds: longest wait for one call.
    While a call hangs, further ones fail at once; when it comes back they work again.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] | None = None
        self._job: _Job | None = None
        self._pid = 0
        self._stop: Callable[[], object] = lambda: None

    def call(self, function: Callable[[], _T], seconds: float | None = None) -> _T:
        """What ``function`` returns or raises. Raises TimeoutError when it takes too long."""
        wait = self.seconds if seconds is None else seconds
        late = TimeoutError(f"{self.name} does not answer")
        if not self._lock.acquire(timeout=wait):
            raise late
        try:
            if self._pid != os.getpid():  # threads do not survive a fork
                self._start()
            if self._job is not None and not self._job.done.is_set():
                raise late
            job = self._job = _Job(function)
            assert self._jobs is not None
            self._jobs.put(job)
            if not job.done.wait(wait):
                raise late
        finally:
            self._lock.release()
        if job.error is not None:
            raise job.error
        result: _T = job.value
        return result

    def close(self) -> None:
        """Ends the thread once what it is at has come back."""
        with self._lock:
            self._stop()
            self._pid, self._job = 0, None

    def _start(self) -> None:
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._pid, self._job, self._jobs = os.getpid(), None, jobs
        self._stop = weakref.finalize(self, jobs.put, None)
        threading.Thread(
            target=_work, args=(jobs,), name=f"joulesmith-{self.name}", daemon=True
        ).start()


class _Job:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job.value = job.function()
        except BaseException as e:
            job.error = e
        job.done.set()
        del job
