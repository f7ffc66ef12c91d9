"""Stand-ins for the kernel's counter files and for NVIDIA's library."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

MAX_UJ = 262143328850


def zone(folder: Path, name: str, uj: int | str, range_uj: int | str | None = MAX_UJ) -> Path:
    """One powercap zone; returns its counter file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{uj}\n")
    if range_uj is not None:
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder / "energy_uj"


class FakeBoard:
    """A board's state; None for what it does not support, an exception to raise it.

    A value that can be called is called: it may hang.
    energy in mJ, power and limit in mW, used in bytes, processes: bytes by pid.
    """

    def __init__(
        self,
        energy: Any = None,
        power: Any = None,
        mig: Any = None,
        name: Any = b"Fake",
        limit: Any = None,
        used: Any = None,
        processes: Any = None,
    ) -> None:
        self.energy, self.power, self.mig, self.name = energy, power, mig, name
        self.limit, self.used, self.processes = limit, used, processes


class FakeNvml:
    """The functions of pynvml that are used."""

    def __init__(self, *boards: FakeBoard, init: Any = None) -> None:
        self.boards, self.init, self.shut = boards, init, 0

    @staticmethod
    def _give(value: Any) -> Any:
        if callable(value):
            value = value()
        if value is None:
            raise RuntimeError("Not Supported")
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init:
            self._give(self.init)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> FakeBoard:  # noqa: N802
        return self.boards[i]

    def nvmlDeviceGetName(self, b: FakeBoard) -> Any:  # noqa: N802
        return self._give(b.name)

    def nvmlDeviceGetUUID(self, b: FakeBoard) -> str:  # noqa: N802
        return f"GPU-{self.boards.index(b):04d}-aaaa"

    def nvmlDeviceGetTotalEnergyConsumption(self, b: FakeBoard) -> Any:  # noqa: N802
        return self._give(b.energy)

    def nvmlDeviceGetPowerUsage(self, b: FakeBoard) -> Any:  # noqa: N802
        return self._give(b.power)

    def nvmlDeviceGetEnforcedPowerLimit(self, b: FakeBoard) -> Any:  # noqa: N802
        return self._give(b.limit)

    def nvmlDeviceGetMigMode(self, b: FakeBoard) -> Any:  # noqa: N802
        return self._give(b.mig)

    def nvmlDeviceGetMemoryInfo(self, b: FakeBoard) -> Any:  # noqa: N802
        return SimpleNamespace(used=self._give(b.used))

    def nvmlDeviceGetComputeRunningProcesses(self, b: FakeBoard) -> Any:  # noqa: N802
        found = self._give(b.processes)
        return [SimpleNamespace(pid=p, usedGpuMemory=size) for p, size in found.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, b: FakeBoard) -> Any:  # noqa: N802
        return []
