"""The two numbers of a machine, kept: its watts when idle and with all CPUs busy.

Given once (``joulesmith calibrate-power --idle 42 --max 118``) or read from the log of
a wall meter, stored in the user's settings with the identity of the machine, and used
by `CpuPower.detect` from then on. Knows files and identity; knows no power model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joulesmith.energy.cpus import Cpu, identify
from joulesmith.energy.power_curve import Curve
from joulesmith.errors import JoulesmithError

if TYPE_CHECKING:
    from joulesmith.energy.wall_log import Sample

MOST_WATTS = 50_000.0
"""No single machine without its GPUs draws more: the number is a slip."""
_VERSION = 1
_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_AGAIN = "run  joulesmith calibrate-power  again, or with --forget"


@dataclass(frozen=True)
class Machine:
    """What makes a copied file noticed. id: a digest, ``None`` where the system has none."""

    name: str
    cpus: int
    sockets: int
    id: str | None


@dataclass(frozen=True)
class Calibration:
    """Watts of the whole machine at the wall, without GPUs.

    curve: between the two, where a log told it. how: where the numbers come from.
    when: ISO date. path: where it is stored.
    """

    idle_watts: float
    max_watts: float
    curve: Curve | None
    how: str
    when: str
    machine: Machine
    path: str

    @property
    def source(self) -> str:
        """In a sentence, for a reading."""
        return (
            f"idle {self.idle_watts:g} W and maximum {self.max_watts:g} W of the machine at the "
            f"wall, {self.how}, calibrated {self.when}, by CPU time"
        )

    def rows(self) -> list[tuple[str, str]]:
        """What to show, as label and text."""
        shape = "by class of processor"
        if self.curve is not None:
            shape = f"from the log (jump {self.curve.jump:.2f}, bend {self.curve.bend:.2f})"
        return [
            ("idle", f"{self.idle_watts:g} W"),
            ("all CPUs busy", f"{self.max_watts:g} W"),
            ("between", shape),
            ("boundary", "whole machine at the wall, without GPUs"),
            ("source", f"{self.how}, {self.when}"),
            ("machine", f"{self.machine.name}, {self.machine.cpus} CPUs"),
            ("stored in", self.path),
        ]


def path() -> Path:
    """Where the calibration is stored. Raises `JoulesmithError` where there is no home."""
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    if not Path(folder).is_absolute():  # as the XDG standard asks
        try:
            folder = str(Path.home() / ".config")
        except RuntimeError:
            raise JoulesmithError("no home folder: set XDG_CONFIG_HOME to a folder") from None
    return Path(folder) / "joulesmith" / "power.json"


def calibrate(
    idle: float | None = None,
    max: float | None = None,
    log: Path | str | None = None,
    *,
    step_seconds: float = 20.0,
    tell: Callable[[str], None] | None = None,
    cpu: Cpu | None = None,
) -> Calibration:
    """Stores the two numbers of this machine and returns them.

    idle, max: watts of the whole machine at the wall, without GPUs; both, or neither
    with a log. log: CSV of a wall meter, see `wall_log`. One without a column of load
    must be in the making: the load is stepped now (five steps of step_seconds), and the
    samples of that time are used. tell: gets a line before each step. cpu: default this
    machine's.
    Raises `JoulesmithError`; then the stored numbers stay as they were.
    """
    cpu = cpu or identify()
    curve = None
    if log is not None:
        if idle is not None or max is not None:
            raise JoulesmithError("give --idle and --max, or --log, not both")
        from joulesmith.energy import wall_log

        samples, quiet = _samples(log, step_seconds, tell, cpu.cpus)
        found = wall_log.ends(samples, quiet)
        idle, max, curve = round(found.idle_watts, 3), round(found.max_watts, 3), found.curve
        how = f"from a wall meter's log of {found.samples} samples"
    elif idle is None or max is None:
        raise JoulesmithError("give both --idle and --max in watts, or --log FILE")
    else:
        how = "given by hand"
    _check(idle, max)
    from datetime import date

    found_here = Calibration(
        float(idle), float(max), curve, how, date.today().isoformat(), machine(cpu), str(path())
    )
    _store(found_here)
    return found_here


def load() -> Calibration | None:
    """What is stored, of whichever machine; ``None`` where nothing is.

    Raises `JoulesmithError` where the file cannot be understood.
    """
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "not a text file"
        raise JoulesmithError(f"cannot read the calibration: {file}: {why}: {_AGAIN}") from None
    import json

    try:
        return _parse(json.loads(text), file)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise JoulesmithError(f"not a calibration: {file}: {_AGAIN}") from None
    except JoulesmithError as e:
        raise JoulesmithError(f"not a calibration: {file}: {e}: {_AGAIN}") from None


def forget() -> bool:
    """Removes what is stored; whether there was anything."""
    file = path()
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise JoulesmithError(f"cannot remove: {file}: {e.strerror or e}") from None
    return True


def recall(cpu: Cpu) -> tuple[Calibration | None, str]:
    """The calibration of this machine, and why there is none where one is stored. Never raises."""
    try:
        stored = load()
        if stored is None:
            return None, ""
        differs = difference(stored.machine, machine(cpu))
    except JoulesmithError as e:
        # Without a home there is no calibration, which is nothing to tell.
        return None, str(e) if "calibration" in str(e) else ""
    except Exception as e:  # metering must never stop the program metered
        return None, f"the calibration of power cannot be used: {e}"
    if differs:
        return None, f"the calibration in {stored.path} is of another machine ({differs}): not used"
    return stored, ""


def machine(cpu: Cpu) -> Machine:
    """The identity of this machine, with the processor as found."""
    import hashlib

    found = None
    for name in _IDS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            # The system asks that its id is not told to others as it is.
            found = hashlib.sha256(f"joulesmith power {text}".encode()).hexdigest()[:16]
            break
    return Machine(cpu.name, cpu.cpus, cpu.sockets, found)


def difference(stored: Machine, here: Machine) -> str:
    """What tells two machines apart; empty where nothing does."""
    if stored.name != here.name:
        return f"{stored.name}, here {here.name}"
    if (stored.cpus, stored.sockets) != (here.cpus, here.sockets):
        return f"{stored.cpus} CPUs, here {here.cpus}"
    if stored.id is not None and here.id is not None and stored.id != here.id:
        return "the same processor but another machine id"
    return ""


def _samples(
    log: Path | str, seconds: float, tell: Callable[[str], None] | None, cpus: int
) -> tuple[list[Sample], float]:
    """Samples with loads, and the load up to which they count as idle."""
    from joulesmith.energy import wall_log
    from joulesmith.energy.cpu_time import machine_busy

    samples = wall_log.read(log)
    if any(s.load is not None for s in samples):
        return samples, wall_log.IDLE_LOAD
    if not (math.isfinite(seconds) and seconds > 0):
        raise JoulesmithError(f"seconds of a step must be above 0, got {seconds:g}")
    steps = wall_log.step_load(seconds, cpus, machine_busy, tell)
    if steps[0].load > wall_log.QUIET_LOAD:
        raise JoulesmithError(
            f"this machine was {steps[0].load:.0%} busy before any load was started: stop other "
            "programs and run it again"
        )
    taken = wall_log.at_loads(wall_log.read(log), steps)
    if not taken:
        raise JoulesmithError(
            f"no sample of the log falls into the time of the steps: {log}: the meter must write "
            "to it meanwhile, with times as seconds since 1970 or ISO dates"
        )
    return taken, wall_log.QUIET_LOAD


def _check(idle: float, top: float) -> None:
    for name, value in (("idle", idle), ("max", top)):
        if not (math.isfinite(value) and 0 < value <= MOST_WATTS):
            raise JoulesmithError(
                f"{name} must be watts above 0 and up to {MOST_WATTS:g}, got {value:g}"
            )
    if not idle < top:
        raise JoulesmithError(
            f"idle watts must be below max watts, got {idle:g} and {top:g}: "
            "max is with all CPUs busy"
        )


def _store(c: Calibration) -> None:
    import json

    from joulesmith.atomic import atomic_path

    content = {"version": _VERSION, **asdict(c)}
    del content["path"]
    with atomic_path(c.path) as temp:
        temp.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parse(d: dict[str, Any], file: Path) -> Calibration:
    if d["version"] != _VERSION:
        raise JoulesmithError(f"version {d['version']} is not known")
    idle, top = float(d["idle_watts"]), float(d["max_watts"])
    _check(idle, top)
    m = d["machine"]
    curve = None if d["curve"] is None else Curve(**{k: float(v) for k, v in d["curve"].items()})
    return Calibration(
        idle,
        top,
        curve,
        str(d["how"]),
        str(d["when"]),
        Machine(
            str(m["name"]),
            int(m["cpus"]),
            int(m["sockets"]),
            None if m["id"] is None else str(m["id"]),
        ),
        str(file),
    )
