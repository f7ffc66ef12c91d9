"""Joules from the RAPL counters that Linux shows under /sys/class/powercap.

Knows files and wraparound; knows no processes and no windows. A package counter
already includes its cores and its graphics; memory (`dram`) is counted apart by
the hardware and is added. `psys` is the whole board, packages included: it is
used only where no package can be read. Intel and AMD processors share the layout.

Source: Linux kernel, Documentation/power/powercap/powercap.rst; Khan et al.,
"RAPL in Action", ACM TOMPECS 2018 (update step about 1 ms, error a few per cent).
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("/sys/class/powercap")
STEP_SECONDS = 0.001
"""The counters move about once a millisecond."""
RELATIVE_ERROR = 0.05
"""Half-width of the 90 % interval of a long window, as a share."""

_TOP = re.compile(r"^(intel-rapl(?:-mmio)?):(\d+)$")
_MICRO = 1e-6


@dataclass(frozen=True)
class Zone:
    """One counted zone: its name ("package-0", "dram-0", "psys"), folder, range in µJ."""

    name: str
    folder: Path
    range_uj: int | None


def _text(path: Path) -> str:
    with open(path, encoding="ascii", errors="replace") as f:
        return f.read().strip()


def _number(path: Path) -> int:
    """The file's whole number. Raises OSError, or ValueError on garbage or a negative number."""
    value = int(_text(path))
    if value < 0:
        raise ValueError(f"negative counter: {value}")
    return value


class Rapl:
    """The counted zones of one powercap tree.

    root: the powercap folder. Nothing there: `zones` is empty and no note is made.
    Never raises: what cannot be read becomes a line in `notes`.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else DEFAULT_ROOT
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}
        self._joules: dict[str, float] = {}
        self.zones: tuple[Zone, ...] = ()
        try:
            self.zones = tuple(self._discover())
        except OSError as e:
            self._note(f"RAPL: cannot list {self.root}: {e.strerror or e}")

    def read(self) -> dict[str, float]:
        """Joules by zone since this reader was made, wraparound undone.

        A zone that cannot be read now is absent from the answer, with a note.
        A counter that wraps twice between two calls loses a turn (a turn is tens
        of minutes), so a long window needs a call now and then.
        """
        with self._lock:
            out = {}
            for zone in self.zones:
                raw = self._counter(zone)
                if raw is None:
                    continue
                step = raw - self._last[zone.name]
                if step < 0:
                    # Without a range a smaller value can only be a counter that started over.
                    step = step + zone.range_uj if zone.range_uj is not None else raw
                self._last[zone.name] = raw
                self._joules[zone.name] += max(0, step) * _MICRO
                out[zone.name] = self._joules[zone.name]
            return out

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _counter(self, zone: Zone) -> int | None:
        path = zone.folder / "energy_uj"
        try:
            raw = _number(path)
        except PermissionError:
            self._note(
                f"RAPL is present but not readable: {path}: run  "
                f"sudo chmod a+r {self.root}/intel-rapl*/energy_uj"
            )
        except OSError as e:
            self._note(f"RAPL: {zone.name}: cannot read {path}: {e.strerror or e}")
        except ValueError:
            self._note(f"RAPL: {zone.name}: not a counter: {path}")
        else:
            if zone.range_uj is None or raw <= zone.range_uj:
                return raw
            self._note(f"RAPL: {zone.name}: counter beyond its range: {path}")
        return None

    def _open(self, name: str, folder: Path) -> Zone | None:
        """The zone if its counter can be read now."""
        try:
            limit: int | None = _number(folder / "max_energy_range_uj") or None
        except (OSError, ValueError):
            limit = None
        zone = Zone(name, folder, limit)
        raw = self._counter(zone)
        if raw is None:
            return None
        self._last[name] = raw
        self._joules[name] = 0.0
        return zone

    def _folders(self) -> list[Path]:
        """Top-level zones, whether the tree is flat (class view) or nested (device view)."""
        found: dict[str, Path] = {}
        for base in (self.root, self.root / "intel-rapl", self.root / "intel-rapl-mmio"):
            if base.is_dir():
                for child in base.iterdir():
                    if _TOP.match(child.name):
                        found.setdefault(child.name, child)
        # The memory-mapped view repeats the package of the register view.
        if any(name.startswith("intel-rapl:") for name in found):
            found = {n: p for n, p in found.items() if n.startswith("intel-rapl:")}
        return sorted(found.values(), key=lambda p: int(p.name.rsplit(":", 1)[1]))

    def _discover(self) -> list[Zone]:
        packages: list[Zone] = []
        board: list[tuple[str, Path]] = []
        for folder in self._folders():
            name = self._name(folder)
            if name is None:
                continue
            if not name.startswith("package"):
                if name.startswith("psys"):
                    board.append((name, folder))
                continue
            if any(z.name == name for z in packages):
                name = f"{name}-{folder.name.rsplit(':', 1)[1]}"
            zone = self._open(name, folder)
            if zone is None:
                continue
            packages.append(zone)
            packages.extend(self._memory(name, folder))
        if packages:
            return packages
        return [z for name, folder in board[:1] if (z := self._open(name, folder))]

    def _name(self, folder: Path) -> str | None:
        try:
            return _text(folder / "name").lower()
        except OSError as e:
            self._note(f"RAPL: cannot read {folder / 'name'}: {e.strerror or e}")
            return None

    def _memory(self, package: str, folder: Path) -> list[Zone]:
        subs: dict[str, Path] = {}
        for base in (folder, self.root):
            if base.is_dir():
                for child in base.iterdir():
                    if child.name.startswith(folder.name + ":"):
                        subs.setdefault(child.name, child)
        suffix = package.removeprefix("package")
        zones = (
            self._open("dram" + suffix, sub)
            for _, sub in sorted(subs.items())
            if self._name(sub) == "dram"
        )
        return [z for z in zones if z is not None]
