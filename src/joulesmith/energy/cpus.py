"""Which processor this is, and what the table says of it. Knows no power model.

A virtual machine hides the exact product but not its family and model numbers,
and those name the generation, hence its watts per core.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

_WATTS_PER_CORE = {"server": 4.0, "arm": 2.0, "desktop": 10.0, "laptop": 4.0}
"""Fallback by class: TDP per core of the table's rows of the last ten years, rounded."""
_CORES = {"server": 64, "arm": 64}
"""Cores of the socket behind a virtual machine on an unknown processor."""
_BOARDS = (
    "/sys/class/dmi/id/sys_vendor",
    "/sys/class/dmi/id/product_name",
    "/proc/device-tree/model",
)


@dataclass(frozen=True)
class Cpu:
    """What the system tells of its processor.

    cpus: logical processors seen; threads_per_core: as exposed, which on a virtual
    machine need not be the hardware's; virtual: whether a hypervisor is below.
    """

    vendor: str
    family: int | None
    model: int | None
    name: str
    cpus: int
    sockets: int
    cores: int
    threads_per_core: int
    virtual: bool
    board: str = ""


@dataclass(frozen=True)
class CpuRow:
    """One socket: physical cores, threads a core, TDP in watts; ``coarse`` when a guess."""

    name: str
    cores: int
    threads_per_core: int
    tdp: float
    kind: str
    coarse: bool
    source: str


def _read(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read().strip("\0\n ")
    except OSError:
        return ""


def _int(text: str | None) -> int | None:
    try:
        return int(text, 0) if text else None
    except ValueError:
        return None


def identify(cpuinfo: str | None = None, board: str | None = None) -> Cpu:
    """This machine's processor.

    cpuinfo: the text of ``/proc/cpuinfo``; default reads it. board: maker and model
    of the machine. Never raises; what is not told is ``None`` or one.
    """
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    if board is None:
        board = " ".join(filter(None, map(_read, _BOARDS)))
    if not text.strip():
        return _without_cpuinfo(board)
    blocks = [b for b in re.split(r"\n\s*\n", text) if re.search(r"^processor\s*:", b, re.M)]
    fields = [dict(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", b, re.M)) for b in blocks]
    first = fields[0] if fields else {}
    cpus = len(fields) or os.cpu_count() or 1
    sockets = len({f["physical id"] for f in fields if "physical id" in f}) or 1
    arm = "CPU implementer" in first
    per_socket = _int(first.get("cpu cores")) or max(1, cpus // sockets)
    siblings = _int(first.get("siblings")) or per_socket
    vendor = "ARM" if arm else first.get("vendor_id", "unknown")
    name = first.get("model name") or first.get("Model") or board or vendor
    return Cpu(
        vendor=vendor,
        family=_int(first.get("CPU implementer" if arm else "cpu family")),
        model=_int(first.get("CPU part" if arm else "model")),
        name=name.strip(),
        cpus=cpus,
        sockets=sockets,
        cores=per_socket * sockets,
        threads_per_core=max(1, siblings // per_socket),
        virtual="hypervisor" in first.get("flags", "").split()
        or bool(re.search(r"Amazon EC2|Google Compute|Virtual Machine|KVM|QEMU|VMware", board)),
        board=board,
    )


def _without_cpuinfo(board: str) -> Cpu:
    import platform
    import subprocess

    cpus = os.cpu_count() or 1
    name = platform.processor() or platform.machine() or "unknown"
    if sys.platform == "darwin":
        # On failure the bare architecture still names a class.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            name = subprocess.run(
                ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True,
                text=True,
                timeout=2,
                check=True,
            ).stdout.strip()
    vendor = "Apple" if name.startswith("Apple") else "unknown"
    return Cpu(vendor, None, None, name, cpus, 1, cpus, 1, virtual=False, board=board)


def _holds(spec: str, value: int | None) -> bool:
    if not spec:
        return True
    if value is None:
        return False
    for item in spec.split(";"):
        low, _, high = item.partition("-")
        if int(low, 0) <= value <= int(high or low, 0):
            return True
    return False


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, str], ...]:
    file = resources.files("joulesmith.energy") / "data" / "cpus.csv"
    return tuple(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def look_up(cpu: Cpu) -> CpuRow | None:
    """The first row that fits, or ``None``. Rows go from particular to general."""
    text = f"{cpu.name} | {cpu.board}"
    for r in _table():
        if (
            r["vendor"] == cpu.vendor
            and _holds(r["family"], cpu.family)
            and _holds(r["models"], cpu.model)
            and (not r["match"] or re.search(r["match"], text))
        ):
            return CpuRow(
                name=r["name"],
                cores=int(r["cores"]),
                threads_per_core=int(r["threads_per_core"]),
                tdp=float(r["tdp_w"]),
                kind=r["kind"],
                coarse=r["coarse"] == "1",
                source=r["source"],
            )
    return None


def fall_back(cpu: Cpu) -> CpuRow:
    """An unknown processor by its class: watts per core times cores, always coarse."""
    if cpu.vendor == "ARM":
        kind = "arm"
    elif cpu.virtual or re.search(r"xeon|epyc|opteron|server", cpu.name, re.I):
        kind = "server"
    else:
        kind = "laptop" if any(_batteries()) else "desktop"
    cores = _CORES.get(kind, cpu.cores) if cpu.virtual else max(1, cpu.cores // cpu.sockets)
    threads = 1 if kind == "arm" else (2 if cpu.virtual else cpu.threads_per_core)
    return CpuRow(
        name=f"unknown {kind} processor",
        cores=cores,
        threads_per_core=threads,
        tdp=_WATTS_PER_CORE[kind] * cores,
        kind=kind,
        coarse=True,
        source=f"{_WATTS_PER_CORE[kind]:g} W per core assumed for its class",
    )


def _batteries() -> list[Path]:
    try:
        return list(Path("/sys/class/power_supply").glob("BAT*"))
    except OSError:
        return []
