"""Which processor this is, and what the table says of it. Knows no power model.

A virtual machine often hides the exact product but not its family and model numbers,
and those name the generation, hence its watts per core. ``data/cpu_products.csv`` holds
common products by name, ``data/cpus.csv`` the top product of each generation.
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
    """One socket: physical cores, threads a core, TDP in watts.

    coarse: a guess. exact: of this very product, not of the top one of its generation.
    """

    name: str
    cores: int
    threads_per_core: int
    tdp: float
    kind: str
    coarse: bool
    source: str
    exact: bool = False


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
    """macOS by ``sysctl``, Windows by the processor's identifier, others by what Python says."""
    import platform

    cpus = os.cpu_count() or 1
    name = platform.processor() or platform.machine() or "unknown"
    if sys.platform == "darwin":
        told = _sysctl()
        name = told.get("machdep.cpu.brand_string") or name
        cores = min(cpus, _int(told.get("hw.physicalcpu")) or cpus)
        sockets = max(1, _int(told.get("hw.packages")) or 1)
        vendor = "Apple" if name.startswith("Apple") else told.get("machdep.cpu.vendor", "unknown")
        family, model = (_int(told.get(f"machdep.cpu.{k}")) for k in ("family", "model"))
        virtual = told.get("kern.hv_vmm_present") == "1"
        return Cpu(
            vendor, family, model, name, cpus, sockets, cores, max(1, cpus // cores), virtual, board
        )
    # Windows: "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel".
    if m := re.search(r"Family (\d+) Model (\d+).*?(\w+)$", name):
        return Cpu(m[3], int(m[1]), int(m[2]), name, cpus, 1, cpus, 1, virtual=False, board=board)
    return Cpu("unknown", None, None, name, cpus, 1, cpus, 1, virtual=False, board=board)


def _sysctl() -> dict[str, str]:
    """Names and values; what a machine does not know is left out, and all of it on failure."""
    import subprocess

    text = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # A name that this machine lacks makes the exit code, not the output, bad.
        text = subprocess.run(
            [
                "/usr/sbin/sysctl",
                "machdep.cpu",
                "hw.physicalcpu",
                "hw.packages",
                "kern.hv_vmm_present",
            ],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2,
            check=False,
        ).stdout
    return dict(re.findall(r"^([\w.]+): (.*)$", text, re.M))


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


@lru_cache(maxsize=1)
def _products() -> tuple[dict[str, str], ...]:
    file = resources.files("joulesmith.energy") / "data" / "cpu_products.csv"
    return tuple(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def look_up(cpu: Cpu) -> CpuRow | None:
    """The very product where its name tells it, else the row of its generation, or ``None``.

    Rows of generations go from particular to general; the first that fits is taken.
    """
    text = f"{cpu.name} | {cpu.board}"
    return _product(cpu) or next((_row(r) for r in _table() if _fits(r, cpu, text)), None)


def _product(cpu: Cpu) -> CpuRow | None:
    name = cpu.name.lower()
    for r in _products():
        product = r["product"].lower()
        # Neither "Gold 6230R" nor "E5-2620 v3" is a "Gold 6230" or an "E5-2620".
        if r["vendor"] == cpu.vendor and product in name:
            whole = rf"(?<![\w-]){re.escape(product)}(?![\w+-]| v\d)"
            if re.search(whole, name):
                return _row({**r, "name": r["product"], "coarse": "0"}, exact=True)
    return None


def _fits(r: dict[str, str], cpu: Cpu, text: str) -> bool:
    return (
        r["vendor"] == cpu.vendor
        and _holds(r["family"], cpu.family)
        and _holds(r["models"], cpu.model)
        and (not r["match"] or re.search(r["match"], text) is not None)
    )


def _row(r: dict[str, str], exact: bool = False) -> CpuRow:
    return CpuRow(
        name=r["name"],
        cores=int(r["cores"]),
        threads_per_core=int(r["threads_per_core"]),
        tdp=float(r["tdp_w"]),
        kind=r["kind"],
        coarse=r["coarse"] == "1",
        source=r["source"],
        exact=exact,
    )


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
