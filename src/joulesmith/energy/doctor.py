"""Which sources of joules this machine has, which are blocked and how to open them.

Knows how to look; measures nothing. Used by ``joulesmith doctor``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from joulesmith.energy import battery as _battery
from joulesmith.energy import external as _external
from joulesmith.energy import nvml as _nvml
from joulesmith.energy import rapl as _rapl
from joulesmith.energy import zeus_extra as _zeus
from joulesmith.energy.cpu_power import IDLE_ENV, MAX_ENV, CpuPower
from joulesmith.energy.cpus import identify
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from rich.console import Console

State = Literal["present", "blocked", "absent"]
_NVIDIA = Path("/proc/driver/nvidia/version")
_PATIENCE = 0.3
_STYLE = {"present": "green", "blocked": "yellow", "absent": "dim"}


@dataclass(frozen=True)
class Finding:
    """One source.

    source: "RAPL". state: "present" (in use), "blocked" (there, but closed to this
    user) or "absent". found: what was seen, or why nothing was. open: what to do to
    get it, "" where nothing is to be done. accuracy: what to expect of its joules.
    """

    source: str
    state: State
    found: str
    open: str
    accuracy: str

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


def examine(
    *,
    rapl_root: Path | str | None = None,
    supply_root: Path | str | None = None,
    nvml: Any = None,
    zeus: Callable[[str], Any] | None = None,
    external: str | None = None,
) -> list[Finding]:
    """Every kind of source that joulesmith can read, in the order of trust, with its state.

    The arguments stand in for the machine's own, as in `EnergyMeter`. Takes well under
    half a second, unless the NVIDIA driver hangs (some seconds) or Zeus is imported
    (only on Apple silicon, Jetson and AMD GPUs). Never raises.
    """
    return [
        _look_rapl(_rapl.Rapl(rapl_root)),
        _look_nvml(nvml),
        _look_zeus(zeus),
        _look_battery(supply_root),
        _look_external(external),
        _look_model(),
    ]


def render(findings: Iterable[Finding], console: Console) -> None:
    """Prints the findings as a table, and under it what can be opened and how."""
    from rich.table import Table

    findings = list(findings)
    table = Table(title="Sources of joules on this machine", title_justify="left")
    for heading in ("source", "state", "what is there", "accuracy"):
        table.add_column(heading, overflow="fold")
    for f in findings:
        table.add_row(f.source, f"[{_STYLE[f.state]}]{f.state}[/]", _plain(f.found), f.accuracy)
    console.print(table)
    for f in findings:
        if f.open:
            console.print(f"{f.source}: {_plain(f.open)}", soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    """Square brackets of a path or an extra are no markup."""
    return text.replace("[", r"\[")


def _share(error: float) -> str:
    return f"+-{error:.0%}"


def _look_rapl(rapl: _rapl.Rapl) -> Finding:
    accuracy = f"measured, {_share(_rapl.RELATIVE_ERROR)}, windows of 10 ms and more"
    if rapl.zones:
        zones = ", ".join(z.name for z in rapl.zones)
        return Finding("RAPL", "present", f"processor counters: {zones}", "", accuracy)
    if rapl.denied:
        found = f"counters under {rapl.root} are closed to this user"
        todo = (
            f"run  {rapl.hint}  (until the next start; any user can then watch this "
            "machine's power, which may tell about other users' work)"
        )
        return Finding("RAPL", "blocked", found, todo, accuracy)
    if rapl.notes:
        return Finding("RAPL", "blocked", rapl.notes[0], "", accuracy)
    found, todo = f"nothing under {rapl.root}", ""
    if not sys.platform.startswith("linux"):
        found = f"only Linux shows these counters, this is {sys.platform}"
    elif identify().virtual:
        found += ": a virtual machine, whose host keeps the counters"
        todo = (
            "rent or use bare metal, or give the power of this machine: "
            f"{IDLE_ENV} and {MAX_ENV} (watts), or  joulesmith calibrate-power"
        )
    elif Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        todo = f"start the container with  -v {rapl.root}:{rapl.root}:ro"
    else:
        todo = "run  sudo modprobe intel_rapl_msr  (Intel since 2011, AMD since 2017)"
    return Finding("RAPL", "absent", found, todo, accuracy)


def _look_nvml(lib: Any) -> Finding:
    accuracy = (
        f"measured, {_share(_nvml.RELATIVE_ERROR)}, windows of 0.2 s and more (Volta and later)"
    )
    nvml = _nvml.Nvml(lib, patience=_PATIENCE)
    try:
        if nvml.gpus:
            said = []
            for g in nvml.gpus:
                how = "energy counter" if g.counts else "power samples"
                said.append(f"{g.device} {g.name} ({how}{', split: MIG' if g.mig else ''})")
            return Finding("NVML", "present", ", ".join(said), "", accuracy)
        if nvml.notes:
            todo = "see  nvidia-smi  and the kernel's log; a reset or restart may be needed"
            return Finding("NVML", "blocked", nvml.notes[0], todo, accuracy)
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and nvml.failure is None:
            found = "no GPU among those that CUDA_VISIBLE_DEVICES allows"
            return Finding("NVML", "blocked", found, "unset CUDA_VISIBLE_DEVICES", accuracy)
        if lib is None and _NVIDIA.exists():
            found = f"the kernel has NVIDIA's driver, but: {nvml.failure}"
            todo = "install the driver's library libnvidia-ml.so.1 of the same version"
            return Finding("NVML", "blocked", found, todo, accuracy)
        return Finding("NVML", "absent", "no NVIDIA GPU or driver", "", accuracy)
    finally:
        nvml.close()


def _look_zeus(load: Callable[[str], Any] | None) -> Finding:
    name = "Zeus (AMD, Apple, Jetson)"
    accuracy = f"measured, {_share(_zeus.RELATIVE_ERROR)}, windows of 0.2 s and more"
    expected = _zeus.expected()
    if load is None and expected is None:
        found = "no AMD GPU, Apple silicon or Jetson"
        return Finding(name, "absent", found, "", accuracy)
    if load is None and importlib.util.find_spec("zeus") is None:
        todo = "run  pip install 'joulesmith[zeus]'"
        return Finding(name, "blocked", f"{expected} is here, Zeus is not", todo, accuracy)
    zeus = _zeus.Zeus(load)
    try:
        if zeus.devices:
            said = ", ".join(f"{d.name} ({d.how})" for d in zeus.devices)
            return Finding(name, "present", said, "", accuracy)
        found = zeus.notes[0] if zeus.notes else "Zeus finds nothing to count"
        return Finding(name, "blocked", found, "", accuracy)
    finally:
        zeus.close()


def _look_battery(root: Path | str | None) -> Finding:
    battery = _battery.Battery(root)
    power = battery.by_power
    step = _battery.POWER_STEP_SECONDS if power else _battery.ENERGY_STEP_SECONDS
    accuracy = (
        f"measured, {_share(_battery.RELATIVE_ERROR)}, whole machine, "
        f"windows of {2 * step:.0f} s and more"
    )
    if not battery.devices:
        return Finding("battery", "absent", "no battery", "", accuracy)
    what = battery.devices[0].how
    if battery.discharging:
        return Finding("battery", "present", f"{what}, discharging", "", accuracy)
    todo = "unplug the charger to have the whole machine measured"
    return Finding("battery", "blocked", f"{what}, but on mains", todo, accuracy)


def _look_external(spec: str | None) -> Finding:
    accuracy = (
        f"measured, {_share(_external.RELATIVE_ERROR)}, whole machine at the wall, "
        f"windows of {2 * _external.STEP_SECONDS:.0f} s and more"
    )
    spec = spec if spec is not None else os.environ.get(_external.ENV, "").strip()
    if not spec:
        todo = f"set {_external.ENV} to file:PATH or command:PROGRAM that prints watts"
        return Finding("external meter", "absent", "none given", todo, accuracy)
    try:
        meter = _external.External(spec)
    except JoulesmithError as e:
        return Finding("external meter", "blocked", str(e), f"mend {_external.ENV}", accuracy)
    try:
        count = meter.read(time.perf_counter()).get("machine")
        if count is not None and count.watts is not None:
            return Finding("external meter", "present", f"{spec}: {count.watts:g} W", "", accuracy)
        why = meter.notes[0] if meter.notes else "no value yet"
        todo = 'its last line must be a number of watts or {"watts": number}'
        return Finding("external meter", "blocked", f"{spec}: {why}", todo, accuracy)
    finally:
        meter.close()


def _look_model() -> Finding:
    name = "power model"
    try:
        m = CpuPower.detect()
    except JoulesmithError as e:
        return Finding(name, "blocked", str(e), f"mend or unset {IDLE_ENV} and {MAX_ENV}", "")
    found = (
        f"{m.source}; {m.machine_idle_watts:.3g} W idle to {m.machine_max_watts:.3g} W with all "
        "CPUs busy, used where no counter is"
    )
    accuracy = f"modelled, for the processor {m.said_interval}"
    return Finding(name, "present", found, "", accuracy)
