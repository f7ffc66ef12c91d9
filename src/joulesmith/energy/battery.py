"""Joules that a laptop's batteries give, from /sys/class/power_supply.

Knows the kernel's files; knows no windows. Only while discharging: on mains the
battery says nothing about the machine. It counts the whole machine, screen and all,
and is kept apart from the sum of devices. Power (`power_now`, or current times
voltage) is integrated where the battery tells it; else the stored energy's fall
counts. A battery's gauge refreshes every few seconds, so short windows say little.

Source: Linux kernel, Documentation/power/power_supply_class.rst (µW, µA, µV, µWh, µAh).
"""

from __future__ import annotations

import threading
from pathlib import Path

from joulesmith.energy.source import Count, Device, PowerSum, believable, note

DEFAULT_ROOT = Path("/sys/class/power_supply")
POWER_STEP_SECONDS = 5.0
ENERGY_STEP_SECONDS = 60.0
"""Gauges of stored energy move in steps of 10 mWh or so: a minute at 1 to 20 W."""
RELATIVE_ERROR = 0.10
_GAP_SECONDS, _HOLD_SECONDS = 10.0, 1.0
_MICRO = 1e-6
_HOUR = 3600.0
_MOST_WATTS = 2000.0


class Battery:
    """The machine's batteries as one device, "battery". A `Source`.

    root: the power_supply folder. No battery: `devices` is empty and nothing is said.
    """

    name = "battery"
    whole_machine = True

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root) if root is not None else DEFAULT_ROOT
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._sum = PowerSum(_GAP_SECONDS, _HOLD_SECONDS)
        self._stored: float | None = None
        self._joules, self._epoch = 0.0, 0
        self._folders = _batteries(self.root)
        self.by_power = any(_watts(f) is not None for f in self._folders)
        """True where the battery tells power, False where only stored energy."""
        if not self.by_power and all(_joules(f) is None for f in self._folders):
            self._folders = ()

    @property
    def samples(self) -> bool:
        """True where power is integrated."""
        return bool(self._folders) and self.by_power

    @property
    def devices(self) -> tuple[Device, ...]:
        """All batteries together, or nothing."""
        if not self._folders:
            return ()
        how = "battery's power" if self.by_power else "battery's stored energy"
        step = POWER_STEP_SECONDS if self.by_power else ENERGY_STEP_SECONDS
        return (Device("battery", how, step, RELATIVE_ERROR),)

    @property
    def discharging(self) -> bool:
        """True while the batteries, and nothing else, feed the machine."""
        states = [_word(f / "status").lower() for f in self._folders]
        return "discharging" in states and "charging" not in states and not _mains(self.root)

    def read(self, now: float) -> dict[str, Count]:
        """The count while discharging; empty on mains or when a file cannot be read."""
        if not self._folders:
            return {}
        with self._lock:
            if not self.discharging:
                self._sum.interrupt()
                if self._stored is not None:
                    self._stored, self._epoch = None, self._epoch + 1
                return {}
            count = self._by_power(now) if self.by_power else self._by_energy()
        return {} if count is None else {"battery": count}

    def close(self) -> None:
        """Nothing to let go of."""

    def _by_power(self, now: float) -> Count | None:
        found = [w for f in self._folders if (w := _watts(f)) is not None]
        if not found:
            note(self.notes, "battery: its power cannot be read, or is none while it discharges")
            return None
        self._sum.add(now, sum(found))
        return self._sum.count(now)

    def _by_energy(self) -> Count | None:
        found = [_joules(f) for f in self._folders]
        known = [j for j in found if j is not None]
        if len(known) < len(found):
            note(self.notes, "battery: its stored energy cannot be read")
            return None
        stored = sum(known)
        if self._stored is not None:
            if stored > self._stored:
                note(self.notes, "battery: its stored energy rose while it discharged")
                self._epoch += 1
            else:
                self._joules += self._stored - stored
        self._stored = stored
        return Count(self._joules, epoch=self._epoch)


def _batteries(root: Path) -> tuple[Path, ...]:
    """Batteries that feed the machine; those of mice and pens have the scope "Device"."""
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return ()
    return tuple(
        f
        for f in folders
        if _word(f / "type").lower() == "battery" and _word(f / "scope").lower() != "device"
    )


def _mains(root: Path) -> bool:
    try:
        folders = list(root.iterdir())
    except OSError:
        return False
    return any(
        _word(f / "type").lower() in ("mains", "usb") and _word(f / "online") == "1"
        for f in folders
    )


def _word(path: Path) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return f.read().strip()
    except OSError:
        return ""


def _micro(path: Path) -> float | None:
    """The file's number in whole units; some drivers give what flows out a minus sign."""
    try:
        return abs(int(_word(path))) * _MICRO
    except ValueError:
        return None


def _watts(folder: Path) -> float | None:
    """Power in watts; ``None`` when unknown, or none at all, which no running machine draws."""
    watts = _micro(folder / "power_now")
    if not watts:
        current, voltage = _micro(folder / "current_now"), _micro(folder / "voltage_now")
        watts = current * voltage if current and voltage else None
    return believable(watts, _MOST_WATTS) if watts else None


def _joules(folder: Path) -> float | None:
    """Stored energy in joules."""
    energy = _micro(folder / "energy_now")
    if energy is not None:
        return energy * _HOUR
    charge, voltage = _micro(folder / "charge_now"), _micro(folder / "voltage_now")
    return charge * voltage * _HOUR if charge is not None and voltage else None
