"""Progress of long work, with the time left. Knows nothing of what the work is.

A terminal gets one live line; a pipe or a log gets a plain line now and then.
The estimate starts from each stage's expected share, is rescaled by the time that
the finished part really took, and follows the pace of the stage that runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from joulesmith.units import duration

_SETTLE = 5.0
"""Seconds after which a stage's own pace counts as much as what was expected of it."""
Tick = Callable[[float], None]
"""Called with the share of a stage that is done, 0 to 1."""


def silent(_: float) -> None:
    """A tick that shows nothing."""


class Progress:
    """Stages with expected costs (any unit; only their proportions matter).

    >>> with Progress({"load": 1, "measure": 9}).stage("load") as tick:
    ...     tick(0.5)
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.expected = dict(expected)
        self.stream = stream if stream is not None else sys.stderr
        self.every = every
        self.clock = clock
        self.started = clock()
        self.done: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._live = bool(getattr(self.stream, "isatty", lambda: False)())
        self._last = -1e9
        self._width = 0

    def skip(self, name: str, why: str = "done before") -> None:
        """Leave a stage out of what is still to do."""
        self.expected[name] = 0.0
        self.say(f"{name}: {why}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def left(self, name: str, share: float) -> float | None:
        """Seconds left over all stages, ``None`` while there is nothing to go by. What a stage had
        behind it when it first told, as one that goes on after a kill, took no time of this run.
        The rest of a stage goes by its own pace, the more the longer it has run."""
        known = {n: self._first.get(n, (0.0, 0.0)) for n in (*self.done, name)}
        first, waited = known[name]
        elapsed = self.clock() - self.started - sum(w for _, w in known.values())
        before = sum(self.expected.get(n, 0.0) * (1 - known[n][0]) for n in self.done)
        now = self.expected.get(name, 0.0)
        progressed = before + now * (share - first)
        if progressed <= 0 or elapsed < 1.0:
            return None
        others = sum(c for n, c in self.expected.items() if n not in self.done and n != name)
        pace = elapsed / progressed
        here = now * (1 - share) * pace
        if share > first and name in self._begun:
            spent = self.clock() - self._begun[name] - waited
            trust = spent / (spent + _SETTLE)
            here += trust * (spent * (1 - share) / (share - first) - here)
        return max(0.0, others * pace + here)

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Run one stage; yields the tick. Stages may be nested only by the caller's own ticks."""
        self.expected.setdefault(name, 0.0)
        begun = self._begun[name] = self.clock()
        self._first.pop(name, None)  # of a stage of that name before
        self._show(name, 0.0, force=not self._live)

        def tick(share: float) -> None:
            share = min(1.0, max(0.0, share))
            if share < 1:  # what tells nothing before its end is all of this run
                self._first.setdefault(name, (share, self.clock() - begun))
            self._show(name, share)

        yield tick
        self.done[name] = self.clock() - begun
        self.say(f"{name}: {duration(self.done[name])}")

    def _show(self, name: str, share: float, force: bool = False) -> None:
        now = self.clock()
        if not force and now - self._last < (0.2 if self._live else self.every):
            return
        self._last = now
        left = self.left(name, share)
        tail = f"about {duration(left)} left" if left is not None else "estimating the time left"
        total = max(len([n for n, c in self.expected.items() if c > 0 or n in self.done]), 1)
        line = f"[{min(len(self.done) + 1, total)}/{total}] {name} {share:4.0%} · {tail}"
        if self._live:
            self._clear()
            self.stream.write("\r" + line)
            self.stream.flush()
            self._width = len(line)
        else:
            print(line, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0
