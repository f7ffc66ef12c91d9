"""Joules of AMD GPUs, Apple silicon and Jetson boards through the Zeus package.

Knows the interface of `zeus.device` (0.10 to 0.16: method names of both styles);
knows no windows. Part of the extra `joulesmith[zeus]`. Zeus is imported only where
such hardware shows itself, since NVIDIA GPUs and RAPL are read without it.

Source: Zeus, zeus/device/gpu/common.py and zeus/device/soc/{apple,jetson}.py:
cumulative millijoules; milliwatts for GPUs without a counter.
"""

from __future__ import annotations

import importlib
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from joulesmith.energy.source import Count, Device, Patient, PowerSum, Tally, believable, note

STEP_SECONDS = 0.1
RELATIVE_ERROR = 0.10
"""No maker states one; twice that of NVML and RAPL."""
_PATIENCE_SECONDS = 5.0
_OPENING_SECONDS = 20.0
_LIMIT_WATTS = 3000.0
_GAP_SECONDS, _HOLD_SECONDS = 1.0, 0.5
_MILLI = 1e-3
_APPLE = {
    "cpu_total_mj": "cpu",
    "dram_mj": "dram",
    "gpu_mj": "gpu0",
    "gpu_sram_mj": "gpu0-sram",
    "ane_mj": "ane",
}
_JETSON = {"total_energy_mj": "module", "cpu_energy_mj": "cpu", "gpu_energy_mj": "gpu0"}


def expected() -> str | None:
    """Which hardware here needs Zeus to be counted: "Apple silicon", ...; ``None``: none."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "Apple silicon"
    if Path("/etc/nv_tegra_release").exists() or Path("/usr/lib/aarch64-linux-gnu/tegra").exists():
        return "Jetson"
    if Path("/dev/kfd").exists():
        return "AMD GPU"
    return None


class Zeus:
    """What Zeus counts here. A `Source`.

    load: gives a module by its name; default `importlib.import_module`. Without that,
    and without hardware that needs it, Zeus is not imported.
    Absent or empty: `devices` is empty; a failure is a note.
    """

    name = "Zeus"
    whole_machine = False

    def __init__(
        self,
        load: Callable[[str], Any] | None = None,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._patient = Patient("Zeus", patience)
        self._devices: list[Device] = []
        self._tallies: dict[str, Tally] = {}
        self._sums: dict[str, PowerSum] = {}
        self._soc: Any = None
        self._gpus: Any = None
        self.expected = expected()
        if load is None and self.expected is None:
            return
        try:
            self._patient.call(
                lambda: self._find(load or importlib.import_module),
                max(patience, _OPENING_SECONDS if load is None else patience),
            )
        except ImportError as e:
            absent = e.name is None or e.name.partition(".")[0] == "zeus"
            why = "" if absent else f" (it is there, but lacks {e.name})"
            note(
                self.notes,
                f"{self.expected or 'this hardware'} is counted through Zeus{why}: run  "
                "pip install 'joulesmith[zeus]'",
            )
        except Exception as e:
            note(self.notes, f"Zeus cannot be opened: {e}")
        if not self._devices:
            self._patient.close()

    @property
    def samples(self) -> bool:
        """True where a GPU has no counter."""
        return bool(self._sums)

    @property
    def devices(self) -> tuple[Device, ...]:
        """GPUs and parts of the chip."""
        return tuple(self._devices)

    def read(self, now: float) -> dict[str, Count]:
        """Counts by device; a device that fails now is absent, with a note."""
        if not self._devices:
            return {}
        try:
            raw = self._patient.call(self._ask)
        except TimeoutError as e:
            note(self.notes, f"Zeus: {e} within {self._patient.seconds:g} s")
            return {}
        out: dict[str, Count] = {}
        with self._lock:
            for device, value in raw.items():
                if device in self._tallies:
                    out[device] = self._tallies[device].add(value, now)
                elif device in self._sums:
                    self._sums[device].add(now, value)
                    count = self._sums[device].count(now)
                    if count is not None:
                        out[device] = count
        return out

    def close(self) -> None:
        """Ends the thread that calls Zeus."""
        self._patient.close()

    def _find(self, load: Callable[[str], Any]) -> None:
        soc = load("zeus.device.soc")
        try:
            self._soc = soc.get_soc()
        except Exception:  # "no observable SoC": nothing of the kind here
            self._soc = None
        try:
            gpus = load("zeus.device.gpu").get_gpus()
            # NVIDIA's are read without Zeus.
            self._gpus = None if "NVIDIA" in type(gpus).__name__ else gpus
        except Exception:  # neither driver
            self._gpus = None
        now = time.perf_counter()
        for device, value in self._ask().items():
            within = "module" if "module" in self._tallies and device != "module" else None
            if device.startswith("gpu") and self._gpus is not None and not self._counts(device):
                self._sums[device] = PowerSum(_GAP_SECONDS, _HOLD_SECONDS)
                how = "Zeus power samples"
            else:
                self._tallies[device] = Tally(
                    f"Zeus: {device}", value, now, limit=_LIMIT_WATTS, notes=self.notes
                )
                how = "Zeus energy counter"
            cpu = device in ("cpu", "module")
            self._devices.append(Device(device, how, STEP_SECONDS, RELATIVE_ERROR, within, cpu))

    def _ask(self) -> dict[str, float]:
        """Joules by device, or watts of GPUs that do not count, as Zeus gives them now."""
        out: dict[str, float] = {}
        if self._soc is not None:
            try:
                found = _call(self._soc, "get_total_energy_consumption")
                for names in (_JETSON, _APPLE):
                    for field, device in names.items():
                        self._put(out, device, getattr(found, field, None))
            except Exception as e:
                note(self.notes, f"Zeus: the chip's counters cannot be read: {e}")
        for i in range(len(self._gpus) if self._gpus is not None else 0):
            device = f"gpu{i}"
            ask = "get_total_energy_consumption"
            try:
                if not self._counts(device):
                    ask = "get_instant_power_usage"
                self._put(out, device, _call(self._gpus, ask, i))
            except Exception as e:
                note(self.notes, f"Zeus: {device} cannot be read: {e}")
        return out

    def _put(self, out: dict[str, float], device: str, milli: Any) -> None:
        if milli is None:
            return
        value = float(milli) * _MILLI
        if believable(value, 1e15) is None:
            note(self.notes, f"Zeus: {device} reads {value:g}, which is left out")
        else:
            out[device] = value

    def _counts(self, device: str) -> bool:
        try:
            index = int(device.removeprefix("gpu"))
            return bool(_call(self._gpus, "supports_get_total_energy_consumption", index))
        except Exception:
            return False


def _call(thing: Any, method: str, *args: Any) -> Any:
    """Calls ``method``, or its older name: get_name was getName."""
    if not hasattr(thing, method):
        first, *rest = method.split("_")
        method = first + "".join(word.capitalize() for word in rest)
    return getattr(thing, method)(*args)
