"""Peak resident memory of processes over spans of time.

Knows processes; knows no joules. Between two looks a process's peak is the
kernel's own high-water mark where that rose meanwhile (Linux), else the larger of
what it held at both; the peaks of several processes are added, so the sum is exact
for one process and an upper bound for several within one step. Pages that
processes share count once for each of them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable

_LINUX = sys.platform.startswith("linux")
_KIB = 1024


class Resident:
    """Follows the resident memory of a changing set of processes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[int, tuple[int, int | None]] = {}
        self._held: int | None = None
        self._looked = False

    def look(self, pids: Iterable[int]) -> tuple[int | None, int | None]:
        """Bytes held now, and the most held since the last look; ``None`` when unknown.

        The first look knows no earlier one: both are what is held now.
        """
        with self._lock:
            before, self._last = self._last, {}
            looked, self._looked = self._looked, True
            held = peak = 0
            for pid in pids:
                found = resident(pid)
                if found is None:
                    continue
                now, mark = self._last[pid] = found
                held += now
                peak += _since(before.get(pid), now, mark, new=looked)
            if not self._last:
                self._held = None
                return None, None
            most = max(peak, held, self._held or 0)
            self._held = held
            return held, most


def _since(before: tuple[int, int | None] | None, now: int, mark: int | None, new: bool) -> int:
    """Most bytes that one process held since the last look."""
    if before is None:
        # A process that came since has its whole life, and so its mark, inside.
        return max(now, mark or 0) if new else now
    then, old = before
    rose = mark is not None and old is not None and mark > old
    return max(then, now, mark or 0) if rose else max(then, now)


def resident(pid: int) -> tuple[int, int | None] | None:
    """Resident bytes of a process and its high-water mark; ``None`` when it cannot be read."""
    if _LINUX:
        try:
            with open(f"/proc/{pid}/status", "rb") as f:
                text = f.read()
        except OSError:
            return None
        now, mark = _field(text, b"\nVmRSS:"), _field(text, b"\nVmHWM:")
        return None if now is None else (now, mark)
    try:
        import psutil

        info = psutil.Process(pid).memory_info()
    except Exception:
        return None
    # Windows keeps the mark; on macOS only the process itself can ask for its own.
    mark = getattr(info, "peak_wset", None)
    if mark is None and pid == os.getpid():
        mark = _own_mark()
    return int(info.rss), mark


def own_peak() -> int | None:
    """Largest resident set of this process so far, bytes; ``None`` when it is not told.

    Not ru_maxrss on Linux: that survives exec and would tell the parent's peak.
    """
    found = resident(os.getpid())
    return None if found is None else found[1]


def _field(text: bytes, name: bytes) -> int | None:
    at = text.find(name)
    if at < 0:  # a process that has ended and was not waited for holds nothing
        return None
    try:
        return int(text[at + len(name) :].split(None, 1)[0]) * _KIB
    except (ValueError, IndexError):
        return None


def _own_mark() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(size) if sys.platform == "darwin" else int(size) * _KIB
