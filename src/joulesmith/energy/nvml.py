"""Joules and memory of NVIDIA GPUs through NVML.

Knows the NVML calls; knows no windows. Where the board counts energy (Volta and
later) the counter is used; elsewhere power is sampled and integrated by the
trapezoid rule, each call of `Gpu.read` adding one point. A driver that hangs is
left behind: its joules are unknown until it answers again.

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules since
the driver was loaded) and nvmlDeviceGetPowerUsage (milliwatts, +-5 %).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

from joulesmith.energy.source import Count, Device, Patient, PowerSum, Tally, believable, note

STEP_SECONDS = 0.1
"""Counter and power sensor refresh every 20 to 100 ms, by generation."""
RELATIVE_ERROR = 0.05
PATIENCE_SECONDS = 2.0
_OPENING = 5.0
"""Opening the driver takes seconds on machines with many boards: so many times the patience."""
_LIMIT_WATTS = 3000.0
"""Where the board tells no power limit: more than any draws."""
_HEADROOM = 2.0
"""Short peaks go above the enforced limit."""
_GAP_SECONDS, _HOLD_SECONDS = 1.0, 0.5
_MILLI = 1e-3
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpu:
    """One board. Thread-safe; never raises; failures become lines in `notes`."""

    def __init__(self, lib: Any, handle: Any, index: int) -> None:
        self._lib = lib
        self._handle = handle
        self._lock = threading.Lock()
        self.index = index
        self.notes: list[str] = []
        self.name = self._ask_name()
        self.limit = self._ask_limit()
        """Enforced power limit, watts; ``None`` where the board does not say."""
        self._sum = PowerSum(_GAP_SECONDS, _HOLD_SECONDS)
        self._tally: Tally | None = None
        raw = self._counter(quiet=True)
        if raw is not None:
            self._tally = Tally(
                f"GPU {index}",
                raw,
                time.perf_counter(),
                limit=_HEADROOM * self.limit if self.limit else _LIMIT_WATTS,
                notes=self.notes,
            )
        self.mig = self._ask_mig()
        if self.mig:
            note(self.notes, f"GPU {index} is split (MIG): its joules are the whole board's")

    @property
    def counts(self) -> bool:
        """True where the board has an energy counter, False where power is sampled."""
        return self._tally is not None

    @property
    def device(self) -> str:
        """Name used in a `Part`: "gpu0"."""
        return f"gpu{self.index}"

    def watts(self, quiet: bool = False) -> float | None:
        """Power now, watts; ``None`` where the board does not say. quiet: make no note."""
        try:
            value = float(self._lib.nvmlDeviceGetPowerUsage(self._handle)) * _MILLI
        except Exception as e:
            if not quiet:
                note(self.notes, f"GPU {self.index}: power cannot be read: {e}")
            return None
        if believable(value) is None and not quiet:
            note(self.notes, f"GPU {self.index}: no believable power: {value:g} W")
        return believable(value)

    def read(self, now: float) -> Count | None:
        """Joules since this reader was made; ``None`` when they cannot be had now.

        now: seconds on a clock that never goes back.
        """
        with self._lock:
            if self._tally is not None:
                raw = self._counter(quiet=False)
                if raw is None:
                    return None
                return replace(self._tally.add(raw, now), watts=self.watts(quiet=True))
            watts = self.watts()
            if watts is None:
                return None
            gaps = self._sum.gaps
            self._sum.add(now, watts)
            if self._sum.gaps > gaps:
                note(self.notes, f"GPU {self.index}: power was not sampled for a second or more")
            return self._sum.count(now)

    def memory(self, pids: Collection[int]) -> tuple[int, bool] | None:
        """Bytes in use on the board, and whether they are the processes' own.

        Where the driver does not say what ``pids`` hold, all that is in use counts.
        """
        own: list[int] = []
        for kind in ("Compute", "Graphics"):
            try:
                ask = getattr(self._lib, f"nvmlDeviceGet{kind}RunningProcesses")
                found = ask(self._handle)
                own += [int(p.usedGpuMemory) for p in found if p.pid in pids and p.usedGpuMemory]
            except Exception:  # not supported, or no permission
                continue
            if own:
                return sum(own), True
        try:
            used = int(self._lib.nvmlDeviceGetMemoryInfo(self._handle).used)
        except Exception:
            return None
        return (used, False) if used >= 0 else None

    def _counter(self, quiet: bool) -> float | None:
        """Joules that the board has counted since its driver was loaded."""
        try:
            raw = float(self._lib.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * _MILLI
        except Exception as e:
            if not quiet:
                note(self.notes, f"GPU {self.index}: the energy counter cannot be read: {e}")
            return None
        if raw >= 0 and raw < float("inf"):
            return raw
        note(self.notes, f"GPU {self.index}: the energy counter reads {raw:g} J")
        return None

    def _ask_name(self) -> str:
        try:
            name = self._lib.nvmlDeviceGetName(self._handle)
        except Exception:
            return "NVIDIA GPU"
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def _ask_limit(self) -> float | None:
        try:
            watts = float(self._lib.nvmlDeviceGetEnforcedPowerLimit(self._handle)) * _MILLI
        except Exception:
            return None
        return believable(watts) or None

    def _ask_mig(self) -> bool:
        try:
            return bool(self._lib.nvmlDeviceGetMigMode(self._handle)[0])
        except Exception:  # boards that cannot be split raise "not supported"
            return False


class Nvml:
    """The GPUs that this process may use. A `Source`.

    lib: an object with the functions of ``pynvml``; default is that module.
    patience: seconds to wait for a call of the driver (five times that to open it).
    No driver, no package or no GPU: `gpus` is empty and nothing is said.
    ``CUDA_VISIBLE_DEVICES`` narrows the list, since the others run no work of ours.
    """

    name = "NVML"
    whole_machine = False

    def __init__(self, lib: Any = None, patience: float = PATIENCE_SECONDS) -> None:
        self._lib = lib if lib is not None else _pynvml()
        self._open = False
        self._own: list[str] = []
        self._patient = Patient("NVIDIA's driver", patience)
        self.gpus: tuple[Gpu, ...] = ()
        self.failure: str | None = None
        """Why there are no GPUs, where the driver said so."""
        if self._lib is None:
            return
        try:
            self.gpus = self._patient.call(self._find, _OPENING * patience)
        except TimeoutError as e:
            self.failure = f"{e} to the first call"
            note(self._own, f"NVML: {self.failure}")
        except Exception as e:  # no driver on this machine
            self.failure = str(e) or type(e).__name__
        if not self.gpus:
            self.close()

    @property
    def samples(self) -> bool:
        """True where a board has no counter."""
        return any(not g.counts for g in self.gpus)

    @property
    def notes(self) -> list[str]:
        """What went wrong so far, in the driver and with each board."""
        return [*self._own, *(n for g in self.gpus for n in g.notes)]

    @property
    def devices(self) -> tuple[Device, ...]:
        """The boards."""
        return tuple(
            Device(
                g.device,
                "NVML energy counter" if g.counts else "NVML power samples",
                STEP_SECONDS,
                RELATIVE_ERROR,
            )
            for g in self.gpus
        )

    def read(self, now: float) -> dict[str, Count]:
        """Counts by board; empty, with a note, while the driver does not answer."""
        if not self.gpus:
            return {}
        try:
            counts = self._patient.call(lambda: {g.device: g.read(now) for g in self.gpus})
        except TimeoutError as e:
            note(self._own, f"NVML: {e} within {self._patient.seconds:g} s")
            return {}
        return {device: count for device, count in counts.items() if count is not None}

    def memory(self, pids: Collection[int]) -> int | None:
        """Bytes in use on the boards by ``pids``, or by all where the driver does not say whose."""
        if not self.gpus:
            return None
        try:
            found = self._patient.call(lambda: [g.memory(pids) for g in self.gpus])
        except TimeoutError:
            return None
        known = [f for f in found if f is not None]
        own = [size for size, ours in known if ours]
        if own:
            return sum(own)
        if known:
            note(
                self._own,
                "GPU memory is all that is in use: the driver does not say how much is ours",
            )
        return sum(size for size, _ in known) if known else None

    def close(self) -> None:
        """Lets go of the driver. May be called twice."""
        if self._open:
            self._open = False
            with suppress(Exception):  # nothing is left to lose
                self._patient.call(self._lib.nvmlShutdown)
        self._patient.close()

    def _find(self) -> tuple[Gpu, ...]:
        self._lib.nvmlInit()
        self._open = True
        gpus = []
        for i in range(int(self._lib.nvmlDeviceGetCount())):
            try:
                handle = self._lib.nvmlDeviceGetHandleByIndex(i)
                if self._visible(i, handle):
                    gpus.append(Gpu(self._lib, handle, i))
            except Exception as e:
                note(self._own, f"GPU {i}: cannot be opened: {e}")
        return tuple(gpus)

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
