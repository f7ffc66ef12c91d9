"""An external meter: watts at the wall from a file or a command of the user's.

Knows the protocol; knows no meters. `file:/path`: a file that some other program
rewrites or appends to; `command:some --program`: a program that is run over and
over and prints. The last line holds one number, with W, mW or kW or nothing behind
it (watts), or a JSON object with the key "watts". Power is integrated by trapezoid.
A value that is stale, negative or no number is a note and no sample.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
import subprocess
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from joulesmith.energy.source import Count, Device, PowerSum, believable, note
from joulesmith.errors import JoulesmithError

ENV = "JOULESMITH_METER"
STEP_SECONDS = 1.0
"""Plug meters refresh about once a second."""
RELATIVE_ERROR = 0.03
"""Plug meters are sold as good to 1 to 2 % of the value plus some tenths of a watt."""
STALE_SECONDS = 10.0
_GAP_SECONDS = 5.0
_PATIENCE_SECONDS = 5.0
_FIRST_SECONDS = 2.0
_TAIL_BYTES = 4096
_MOST_WATTS = 1e6
_LINE = re.compile(r"^([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(m|k)?(?:[Ww](?:atts?)?)?$")
_UNIT = {None: 1.0, "m": 1e-3, "k": 1e3}


def parse(line: str) -> float:
    """Watts that a line gives. Raises ValueError, with the reason, when it gives none."""
    text = line.strip()
    match = _LINE.match(text)
    if match and not (match[2] and text.endswith(match[2])):  # "5 k" is no power
        watts = float(match[1]) * _UNIT[match[2]]
    elif text.startswith("{"):
        try:
            found = json.loads(text)["watts"]
            watts = float(found) if type(found) in (int, float) else math.nan
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(f'no {{"watts": number}}: {text[:60]!r}') from None
    else:
        raise ValueError(f"no number of watts: {text[:60]!r}")
    if watts < 0:
        raise ValueError(f"negative watts: {text[:60]!r}")
    if believable(watts, _MOST_WATTS) is None:
        raise ValueError(f"no believable watts: {text[:60]!r}")
    return watts


def last_line(text: str) -> str:
    """The last line that is whole; one without its end counts only where it is the only one."""
    lines = [x for x in text.splitlines() if x.strip()]
    if len(lines) > 1 and not text.endswith(("\n", "\r")):
        lines.pop()
    return lines[-1] if lines else ""


class External:
    """The whole machine as one device, "machine". A `Source`.

    spec: "file:PATH" or "command:PROGRAM ARGUMENTS" (split as a shell would, but no
    shell is started). interval: seconds between two runs of the command.
    Raises `JoulesmithError` for a spec of another form.
    """

    name = "external meter"
    whole_machine = True
    samples = True

    def __init__(self, spec: str, interval: float = STEP_SECONDS) -> None:
        kind, _, rest = spec.partition(":")
        if kind not in ("file", "command") or not rest.strip():
            raise JoulesmithError(
                f"external meter: {spec!r}: give file:PATH or command:PROGRAM ARGUMENTS"
            )
        self.spec = spec
        self.notes: list[str] = []
        self._log = _Log(notes=self.notes)
        self._path: Path | None = None
        self._seen: tuple[int, int] | None = None
        self._stop: weakref.finalize[[], External] | None = None
        if kind == "file":
            self._path = Path(rest.strip()).expanduser()
            self._look(time.perf_counter())
            return
        try:
            command = shlex.split(rest)
        except ValueError as e:
            raise JoulesmithError(f"external meter: {spec!r}: {e}: mend the quotes") from None
        stop, first = threading.Event(), threading.Event()
        self._stop = weakref.finalize(self, stop.set)
        threading.Thread(
            target=_repeat,
            args=(command, interval, self._log, stop, first),
            name="joulesmith-external",
            daemon=True,
        ).start()
        first.wait(_FIRST_SECONDS)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The machine."""
        return (Device("machine", f"external meter ({self.spec})", STEP_SECONDS, RELATIVE_ERROR),)

    def read(self, now: float) -> dict[str, Count]:
        """The count at ``now``; empty, with a note, while the meter says nothing new."""
        if self._path is not None:
            self._look(now)
        count = self._log.count(now)
        return {} if count is None else {"machine": count}

    def close(self) -> None:
        """Ends the runs of the command."""
        if self._stop is not None:
            self._stop()

    def _look(self, now: float) -> None:
        assert self._path is not None
        try:
            # Opened without blocking: a pipe nobody writes to must not stop the program.
            handle = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            with open(handle, "rb") as f:
                about = os.fstat(handle)
                if not stat.S_ISREG(about.st_mode):
                    note(self.notes, f"external meter: not a regular file: {self._path}")
                    return
                state = (about.st_mtime_ns, about.st_size)
                if state == self._seen:
                    return
                f.seek(max(0, about.st_size - _TAIL_BYTES))
                text = f.read(_TAIL_BYTES).decode("utf-8", errors="replace")
        except OSError as e:
            note(self.notes, f"external meter: cannot read {self._path}: {e.strerror or e}")
            return
        self._seen = state
        age = max(0.0, time.time() - about.st_mtime)
        if age <= STALE_SECONDS:
            self._log.take(text, now - age)
        else:
            note(
                self.notes,
                f"external meter: stale: {self._path} was last written {age:.0f} s ago",
            )


@dataclass
class _Log:
    """Samples so far; shared with the thread that runs the command."""

    notes: list[str]
    lock: threading.Lock = field(default_factory=threading.Lock)
    sum: PowerSum = field(default_factory=lambda: PowerSum(_GAP_SECONDS, STALE_SECONDS))
    known: bool = False

    def take(self, text: str, t: float) -> None:
        try:
            watts = parse(last_line(text))
        except ValueError as e:
            note(self.notes, f"external meter: {e}")
            return
        with self.lock:
            gaps = self.sum.gaps
            self.sum.add(t, watts)
            self.known = True
            if self.sum.gaps > gaps:
                note(
                    self.notes,
                    f"external meter: no new value for {_GAP_SECONDS:g} s or more at times",
                )

    def count(self, now: float) -> Count | None:
        with self.lock:
            count = self.sum.count(now)
            if count is None and self.known:
                note(self.notes, f"external meter: no new value for {STALE_SECONDS:g} s")
            return count


def _repeat(
    command: list[str],
    interval: float,
    log: _Log,
    stop: threading.Event,
    first: threading.Event,
) -> None:
    """Runs the command until told to stop. Its own time lies before the value it prints."""
    while not stop.is_set():
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            note(
                log.notes,
                f"external meter: {command[0]} took more than {_PATIENCE_SECONDS:g} s: stopped",
            )
        except (OSError, ValueError) as e:
            note(log.notes, f"external meter: cannot run {command[0]}: {e}")
        else:
            if done.returncode == 0:
                log.take(done.stdout, time.perf_counter())
            else:
                why = last_line(done.stderr + "\n")[:100]
                note(
                    log.notes,
                    f"external meter: {command[0]} ended with code {done.returncode}: {why}",
                )
        first.set()
        stop.wait(max(interval - (time.perf_counter() - begin), 0.1 * interval))
