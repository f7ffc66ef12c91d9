"""Joules from NVIDIA GPUs through NVML.

Knows the NVML calls; knows no windows. Where the board counts energy (Volta and
later) the counter is used; elsewhere power is sampled and integrated by the
trapezoid rule, each call of `Gpu.read` adding one point.

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules since
the driver was loaded) and nvmlDeviceGetPowerUsage (milliwatts, +-5 %).
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

STEP_SECONDS = 0.1
"""Counter and power sensor refresh every 20 to 100 ms, by generation."""
RELATIVE_ERROR = 0.05
_MILLI = 1e-3
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpu:
    """One board. Thread-safe; never raises; failures become lines in `notes`."""

    def __init__(self, lib: Any, handle: Any, index: int) -> None:
        self._lib = lib
        self._handle = handle
        self._lock = threading.Lock()
        self._last_raw: float | None = None
        self._last_power: tuple[float, float] | None = None
        self._joules = 0.0
        self.index = index
        self.notes: list[str] = []
        self.name = self._ask_name()
        self._last_raw = self._counter(quiet=True)
        self.counts = self._last_raw is not None
        """True where the board has an energy counter, False where power is sampled."""
        self.mig = self._ask_mig()
        if self.mig:
            self._note(f"GPU {index} is split (MIG): its joules are the whole board's")

    @property
    def device(self) -> str:
        """Name used in a `Part`: "gpu0"."""
        return f"gpu{self.index}"

    def watts(self) -> float | None:
        """Power now, watts; ``None`` where the board does not say."""
        try:
            value = float(self._lib.nvmlDeviceGetPowerUsage(self._handle)) * _MILLI
        except Exception as e:
            self._note(f"GPU {self.index}: power cannot be read: {e}")
            return None
        return value if 0 <= value < 1e5 else None

    def read(self, now: float) -> float | None:
        """Joules since this reader was made; ``None`` when they cannot be had now.

        now: seconds on a clock that never goes back, used where power is integrated.
        """
        with self._lock:
            return self._read_counter() if self.counts else self._integrate(now)

    def _read_counter(self) -> float | None:
        raw = self._counter(quiet=False)
        if raw is None:
            return None
        step = raw - (self._last_raw or 0.0)
        if step < 0:
            # The driver was reloaded: what it counted since then is all we know.
            self._note(f"GPU {self.index}: the energy counter started over; some joules are lost")
            step = raw
        self._last_raw = raw
        self._joules += step * _MILLI
        return self._joules

    def _integrate(self, now: float) -> float | None:
        watts = self.watts()
        if watts is None:
            return None
        if self._last_power is not None:
            then, before = self._last_power
            if now <= then:
                return self._joules
            self._joules += 0.5 * (before + watts) * (now - then)
        self._last_power = (now, watts)
        return self._joules

    def _counter(self, quiet: bool) -> float | None:
        try:
            raw = float(self._lib.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except Exception as e:
            if not quiet:
                self._note(f"GPU {self.index}: the energy counter cannot be read: {e}")
            return None
        return raw if raw >= 0 else None

    def _ask_name(self) -> str:
        try:
            name = self._lib.nvmlDeviceGetName(self._handle)
        except Exception:
            return "NVIDIA GPU"
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def _ask_mig(self) -> bool:
        try:
            return bool(self._lib.nvmlDeviceGetMigMode(self._handle)[0])
        except Exception:  # boards that cannot be split raise "not supported"
            return False

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class Nvml:
    """The GPUs that this process may use.

    lib: an object with the functions of ``pynvml``; default is that module.
    No driver, no package or no GPU: `gpus` is empty and nothing is said.
    ``CUDA_VISIBLE_DEVICES`` narrows the list, since the others run no work of ours.
    """

    def __init__(self, lib: Any = None) -> None:
        self._lib = lib if lib is not None else _pynvml()
        self._open = False
        self.notes: list[str] = []
        self.gpus: tuple[Gpu, ...] = ()
        if self._lib is None:
            return
        try:
            self._lib.nvmlInit()
            self._open = True
            count = int(self._lib.nvmlDeviceGetCount())
        except Exception:  # no driver on this machine
            self.close()
            return
        gpus = []
        for i in range(count):
            try:
                handle = self._lib.nvmlDeviceGetHandleByIndex(i)
                if self._visible(i, handle):
                    gpus.append(Gpu(self._lib, handle, i))
            except Exception as e:
                self.notes.append(f"GPU {i}: cannot be opened: {e}")
        self.gpus = tuple(gpus)

    def close(self) -> None:
        """Lets go of the driver. May be called twice."""
        if self._open:
            self._open = False
            try:
                self._lib.nvmlShutdown()
            except Exception:  # nothing is left to lose
                return

    def _visible(self, index: int, handle: Any) -> bool:
        wanted = os.environ.get(_VISIBLE)
        if wanted is None:
            return True
        entries = [e.strip() for e in wanted.split(",") if e.strip()]
        if any(e.startswith("MIG") for e in entries):
            return True  # which board a slice is on is not in its name
        if str(index) in entries:
            return True
        try:
            uuid = self._lib.nvmlDeviceGetUUID(handle)
        except Exception:
            return False
        uuid = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
        return any(e.startswith("GPU-") and uuid.startswith(e) for e in entries)


def _pynvml() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pynvml
    except Exception:  # absent, or a broken install: same as no GPU
        return None
    return pynvml
