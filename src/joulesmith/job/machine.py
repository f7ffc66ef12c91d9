"""What machine this is, and how much memory a run takes. Knows no models."""

from __future__ import annotations

import os
import platform
import threading
from typing import TYPE_CHECKING

from joulesmith.report.result import Machine

if TYPE_CHECKING:
    import psutil


def machine(threads: int) -> Machine:
    """This machine as a report names it; ``threads``: those that the engine uses."""
    import psutil

    from joulesmith.energy import EnergyMeter
    from joulesmith.energy.cpus import identify

    meter = EnergyMeter()
    try:
        source, idle, peak = meter.source, meter.idle_watts, meter.max_watts
    finally:
        meter.close()
    return Machine(
        cpu=identify().name,
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=int(psutil.virtual_memory().total),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        power_source=source,
        idle_watts=idle,
        max_watts=peak,
    )


def _gpus() -> tuple[str, ...]:
    from joulesmith.energy.nvml import Nvml

    nvml = Nvml()
    try:
        return tuple(g.name for g in nvml.gpus)
    finally:
        nvml.close()


class PeakMemory:
    """Peak resident bytes of this process and its children, sampled in a thread.

    Pages that several processes share are counted once where the platform tells
    (proportional set size), else once a process. ``peak`` is None where it tells nothing.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self.peak: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            total = 0
            try:
                for process in [me, *me.children(recursive=True)]:
                    try:
                        total += _resident(process)
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.peak = max(self.peak or 0, total)
            if self._stop.wait(self.interval):
                return


def _resident(process: psutil.Process) -> int:
    full = process.memory_full_info()
    return int(getattr(full, "pss", 0) or full.rss)
