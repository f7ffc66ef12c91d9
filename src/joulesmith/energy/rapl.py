"""Joules from the RAPL counters that Linux shows under /sys/class/powercap.

Knows files and zones; knows no processes and no windows. A package counter already
includes its cores (`core`) and its graphics (`uncore`): they are shown, within it.
Memory (`dram`) is counted apart by the hardware and is added. A package of several
dies has a zone for each (`package-0-die-1`), each counted once. `psys` is the whole
board, packages included: it is used only where no package can be read. Intel and
AMD processors share the layout.

Source: Linux kernel, Documentation/power/powercap/powercap.rst; Khan et al.,
"RAPL in Action", ACM TOMPECS 2018 (update step about 1 ms, error a few per cent).
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from joulesmith.energy.source import Count, Device, Tally, note

DEFAULT_ROOT = Path("/sys/class/powercap")
STEP_SECONDS = 0.001
"""The counters move about once a millisecond."""
RELATIVE_ERROR = 0.05
"""Half-width of the 90 % interval of a long window, as a share."""
_LIMIT_WATTS = 5000.0
"""More than any zone draws: a counter that moves faster has jumped."""
_SAME_UJ = 1_000_000
"""Two zones of one name whose counters differ by less are one counter seen twice."""

_TOP = re.compile(r"^(intel-rapl(?:-mmio)?):(\d+)$")
_DIE = re.compile(r"^(package-\d+)-die-\d+$")
_INSIDE = ("core", "uncore")
_MICRO = 1e-6


@dataclass(frozen=True)
class Zone:
    """One counted zone: its name ("package-0", "dram-0", "psys"), folder, range in µJ.

    within: name of the zone that already holds its joules, if any.
    """

    name: str
    folder: Path
    range_uj: int | None
    within: str | None = None


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
    """The counted zones of one powercap tree. A `Source`.

    root: the powercap folder. Nothing there: `zones` is empty and no note is made.
    """

    name = "RAPL"
    whole_machine = False
    samples = False

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else DEFAULT_ROOT
        self.notes: list[str] = []
        self.denied = False
        """True where a counter is there but may not be read."""
        self._lock = threading.Lock()
        self._tallies: dict[str, Tally] = {}
        self.zones: tuple[Zone, ...] = ()
        try:
            self.zones = tuple(self._discover())
        except OSError as e:
            note(self.notes, f"RAPL: cannot list {self.root}: {e.strerror or e}")

    @property
    def devices(self) -> tuple[Device, ...]:
        """The zones."""
        return tuple(
            Device(
                z.name,
                self.name,
                STEP_SECONDS,
                RELATIVE_ERROR,
                z.within,
                cpu=z.name.startswith(("package", "psys")),
            )
            for z in self.zones
        )

    def read(self, now: float | None = None) -> dict[str, Count]:
        """Counts by zone since this reader was made, wraparound undone.

        A zone that cannot be read now is absent from the answer, with a note.
        A counter that wraps twice between two calls loses a turn (a turn is tens
        of minutes), so a long window needs a call now and then.
        """
        now = time.perf_counter() if now is None else now
        with self._lock:
            out = {}
            for zone in self.zones:
                raw = self._counter(zone)
                if raw is not None:
                    out[zone.name] = self._tallies[zone.name].add(raw * _MICRO, now)
            return out

    def close(self) -> None:
        """Nothing to let go of."""

    @property
    def hint(self) -> str:
        """The command that opens the counters to everybody until the next start."""
        return f"sudo chmod a+r {self.root}/intel-rapl*/energy_uj"

    def _counter(self, zone: Zone) -> int | None:
        path = zone.folder / "energy_uj"
        try:
            raw = _number(path)
        except PermissionError:
            self.denied = True
            note(self.notes, f"RAPL is present but not readable: {path}: run  {self.hint}")
        except OSError as e:
            note(self.notes, f"RAPL: {zone.name}: cannot read {path}: {e.strerror or e}")
        except ValueError:
            note(self.notes, f"RAPL: {zone.name}: not a counter: {path}")
        else:
            if zone.range_uj is None or raw <= zone.range_uj:
                return raw
            note(self.notes, f"RAPL: {zone.name}: counter beyond its range: {path}")
        return None

    def _open(self, name: str, folder: Path, within: str | None = None) -> Zone | None:
        """The zone if its counter can be read now."""
        try:
            limit: int | None = _number(folder / "max_energy_range_uj") or None
        except (OSError, ValueError):
            limit = None
        zone = Zone(name, folder, limit, within)
        raw = self._counter(zone)
        if raw is None:
            return None
        self._tallies[name] = Tally(
            f"RAPL: {name}",
            raw * _MICRO,
            time.perf_counter(),
            limit=_LIMIT_WATTS,
            turn=None if limit is None else limit * _MICRO,
            rests=within is not None,
            notes=self.notes,
        )
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
        zones: list[Zone] = []
        shut: list[str] = []
        board: list[tuple[str, Path]] = []
        named = [(n, f) for f in self._folders() if (n := self._name(f)) is not None]
        whole = {n for n, _ in named}
        for name, folder in named:
            if not name.startswith("package"):
                if name.startswith("psys"):
                    board.append((name, folder))
                continue
            if self._seen(name, folder, zones):
                continue
            if any(z.name == name for z in zones):
                name = f"{name}-{folder.name.rsplit(':', 1)[1]}"
            die = _DIE.match(name)
            zone = self._open(name, folder, die[1] if die and die[1] in whole else None)
            if zone is None:
                shut.append(name)
            else:
                zones.append(zone)
                zones.extend(self._below(zone))
        if zones and shut:
            # Half of the processors would pass for all of them.
            note(self.notes, f"RAPL is not used: {', '.join(shut)} cannot be read")
        elif zones:
            return zones
        return [z for name, folder in board[:1] if (z := self._open(name, folder))]

    def _seen(self, name: str, folder: Path, zones: list[Zone]) -> bool:
        """True for a second view of a counter already taken."""
        for zone in zones:
            if zone.name == name:
                try:
                    apart = abs(_number(zone.folder / "energy_uj") - _number(folder / "energy_uj"))
                except (OSError, ValueError):
                    continue
                if apart < _SAME_UJ:
                    note(self.notes, f"RAPL: {folder.name} repeats {name} and is not counted")
                    return True
        return False

    def _name(self, folder: Path) -> str | None:
        try:
            return _text(folder / "name").lower()
        except OSError as e:
            note(self.notes, f"RAPL: cannot read {folder / 'name'}: {e.strerror or e}")
            return None

    def _below(self, package: Zone) -> list[Zone]:
        """Memory, cores and graphics of a package, in that order."""
        folder = package.folder
        subs: dict[str, Path] = {}
        for base in (folder, self.root):
            if base.is_dir():
                for child in base.iterdir():
                    if child.name.startswith(folder.name + ":"):
                        subs.setdefault(child.name, child)
        suffix = package.name.removeprefix("package")
        whole = package.within and "dram" + package.within.removeprefix("package")
        kinds = [(self._name(sub), sub) for _, sub in sorted(subs.items())]
        found = []
        for kind, sub in kinds:
            if kind == "dram":
                found.append(self._open(kind + suffix, sub, whole))
        for kind, sub in kinds:
            if kind in _INSIDE:
                found.append(self._open(kind + suffix, sub, package.name))
        return [z for z in found if z is not None]
