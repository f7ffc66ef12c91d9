"""Readings as rows of files: CSV, JSON lines, CodeCarbon's columns.

Knows formats; knows no meters beyond their readings. Unknown is an empty cell or
null, never 0. CodeCarbon: the columns of its emissions.csv, version 3.
"""

from __future__ import annotations

import csv
import io
import json
import math
import mmap
import os
import platform
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from joulesmith.energy.carbon import Amount, GridRow
from joulesmith.energy.reading import Reading
from joulesmith.errors import JoulesmithError
from joulesmith.units import joules_to_kwh

# ---- files of lines

_SHOWN = 80


class Appender(Protocol):
    """A file of rows."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""

    def close(self) -> None:
        """Closes the file. May be called twice."""


class _Lines:
    """Appends whole lines: each is one write, and what a crash tore off is cut at opening.

    fsync: also wait until the disk has each line. Meant for one writer at a time.
    Raises `JoulesmithError` when the file cannot be opened or the disk is full; the file
    then ends with the last whole line.
    """

    def __init__(self, path: Path | str, *, fsync: bool = False) -> None:
        self.path = Path(path)
        self.fsync = fsync
        self.notes: list[str] = []
        """What was repaired when the file was opened."""
        self._lock = threading.Lock()
        self._handle: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._handle = os.open(self.path, flags, 0o666)
            self._repair(self._handle)
        except OSError as e:
            self.close()
            raise self._refused(e) from e
        except JoulesmithError:
            self.close()
            raise

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def _whole(self, data: mmap.mmap, size: int) -> int:
        """Where the whole lines among the first ``size`` bytes end."""
        return data.rfind(b"\n", 0, size) + 1

    def _repair(self, handle: int) -> None:
        full = size = os.fstat(handle).st_size
        if not full:
            return
        with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as data:
            # A power cut may leave zeros where a line was to be.
            while size and data[size - 1] == 0:
                size -= 1
            good = self._whole(data, size)
            torn = bytes(data[good : min(size, good + _SHOWN)])
            ended = good < size and self._is_whole(data[good:size])
        if ended:
            os.truncate(handle, size)
            os.write(handle, b"\n")
            self.notes.append(f"{self.path}: ended its last line")
        elif good < full:
            os.truncate(handle, good)
            shown = torn.decode("utf-8", "replace")
            self.notes.append(f"{self.path}: cut off a torn line at its end: {shown!r}")

    def _is_whole(self, line: bytes) -> bool:
        """Whether a last line lacks nothing but its end."""
        return False

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._handle is None:
                raise ValueError(f"the file is closed: {self.path}")
            before = os.fstat(self._handle).st_size
            try:
                done = os.write(self._handle, line)
                while done < len(line):
                    done += os.write(self._handle, line[done:])
                if self.fsync:
                    os.fsync(self._handle)
            except OSError as e:
                os.truncate(self._handle, before)
                raise self._refused(e) from e

    def _refused(self, e: OSError) -> JoulesmithError:
        return JoulesmithError(
            f"cannot write: {self.path}: {e.strerror or e}: give a writable place with room"
        )


class JsonLines(_Lines):
    """One JSON object a line. NaN and infinity become null."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""
        text = json.dumps(_plain(row), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        self._write(text.encode() + b"\n")

    def _is_whole(self, line: bytes) -> bool:
        try:
            return isinstance(json.loads(line), dict)
        except ValueError:
            return False


class CsvLines(_Lines):
    """A CSV file with a header.

    columns: in order; a file that exists keeps its own header, which must name no column
    that is not among ``columns``. Cells: None is empty, lists and dicts are JSON.
    """

    def __init__(self, path: Path | str, columns: Sequence[str], *, fsync: bool = False) -> None:
        self.columns = tuple(columns)
        super().__init__(path, fsync=fsync)
        try:
            self._header()
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row. Raises ValueError for a key that is no column."""
        strange = set(row) - set(self._known)
        if strange:
            raise ValueError(f"no column {sorted(strange)[0]!r} in {self.path}")
        self._write(_csv(_cell(row.get(c)) for c in self.columns))

    def _header(self) -> None:
        self._known = self.columns
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as f:
            found = next(csv.reader(f), None)
        if not found:
            self._write(_csv(self.columns))
            return
        strange = [c for c in found if c not in self.columns]
        if strange:
            raise JoulesmithError(
                f"other columns in the file: {self.path}: {strange[0]!r}: give another file name"
            )
        self.columns = tuple(found)

    def _whole(self, data: mmap.mmap, size: int) -> int:
        # A cell may hold line ends inside quotes: a row ends where the quotes are closed.
        good, at, quotes = 0, 0, 0
        while (end := data.find(b"\n", at, size)) >= 0:
            quotes += data[at:end].count(b'"')
            at = end + 1
            if quotes % 2 == 0:
                good = at
        return good


def _csv(cells: Iterable[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()


def _cell(value: Any) -> str:
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return str(value)


def _plain(value: Any) -> Any:
    """Values that JSON has; unknown numbers are null."""
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)


# ---- rows

READING_COLUMNS = (
    "time",
    "window",
    "seconds",
    "joules",
    "low",
    "high",
    "marginal",
    "watts",
    "cpu_seconds",
    "pedigree",
    "parts",
    "machine_joules",
    "peak_memory_bytes",
    "device_memory_bytes",
    "notes",
)


def reading_row(reading: Reading, window: str = "", time: datetime | None = None) -> dict[str, Any]:
    """A reading as a row of `READING_COLUMNS`. time: when it ended; default now."""
    return {
        "time": (time or datetime.now(timezone.utc)).isoformat(timespec="milliseconds"),
        "window": window,
        "seconds": reading.seconds,
        "joules": reading.joules,
        "low": reading.low,
        "high": reading.high,
        "marginal": reading.marginal,
        "watts": reading.watts,
        "cpu_seconds": reading.cpu_seconds,
        "pedigree": reading.pedigree,
        "parts": {p.device: p.joules for p in reading.parts},
        "machine_joules": None if reading.machine is None else reading.machine.joules,
        "peak_memory_bytes": reading.peak_memory_bytes,
        "device_memory_bytes": reading.device_memory_bytes,
        "notes": list(reading.notes),
    }


CODECARBON_COLUMNS = (
    "timestamp",
    "project_name",
    "run_id",
    "experiment_id",
    "duration",
    "emissions",
    "emissions_rate",
    "cpu_power",
    "gpu_power",
    "ram_power",
    "cpu_energy",
    "gpu_energy",
    "ram_energy",
    "energy_consumed",
    "water_consumed",
    "country_name",
    "country_iso_code",
    "region",
    "cloud_provider",
    "cloud_region",
    "os",
    "python_version",
    "codecarbon_version",
    "cpu_count",
    "cpu_model",
    "gpu_count",
    "gpu_model",
    "longitude",
    "latitude",
    "ram_total_size",
    "tracking_mode",
    "cpu_utilization_percent",
    "gpu_utilization_percent",
    "ram_utilization_percent",
    "ram_used_gb",
    "on_cloud",
    "pue",
    "wue",
)
_FAMILIES = {"cpu": ("cpu", "package"), "gpu": ("gpu",), "ram": ("dram", "ram", "memory")}


def codecarbon_row(
    reading: Reading,
    *,
    emissions: Amount | None = None,
    grid: GridRow | None = None,
    pue: float = 1.0,
    project: str = "joulesmith",
    run_id: str = "",
    time: datetime | None = None,
    **known: Any,
) -> dict[str, Any]:
    """A reading as a row of CodeCarbon's emissions.csv; what is not known stays empty.

    duration in s, emissions in kg, their rate in kg/s, power in W, energy in kWh, the
    last two times ``pue`` as CodeCarbon does. emissions: of `footprint`, with the same
    pue in it. known: further columns by name, such as ``gpu_model`` or ``cloud_region``.
    Write it with ``CsvLines(path, CODECARBON_COLUMNS)``, which also goes on with a file
    that an older CodeCarbon began.
    Raises ValueError for a column that CodeCarbon has not.
    """
    strange = set(known) - set(CODECARBON_COLUMNS)
    if strange:
        raise ValueError(f"not a column of CodeCarbon: {sorted(strange)[0]}")
    if pue < 1.0 or not math.isfinite(pue):
        raise ValueError(f"pue must be 1 or more, got {pue}")
    row: dict[str, Any] = dict.fromkeys(CODECARBON_COLUMNS)
    kilos = None if emissions is None or emissions.value is None else emissions.value / 1e3
    seconds = reading.seconds
    row |= {
        "timestamp": (time or datetime.now()).strftime("%Y-%m-%dT%H:%M:%S"),
        "project_name": project,
        "run_id": run_id,
        "duration": seconds,
        "emissions": kilos,
        "emissions_rate": kilos / seconds if kilos is not None and seconds > 0 else None,
        "energy_consumed": None if reading.joules is None else joules_to_kwh(reading.joules) * pue,
        "os": platform.platform(),
        "python_version": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "pue": pue,
    }
    whole = [p for p in reading.parts if p.within is None]
    for family, names in _FAMILIES.items():
        parts = [p.joules for p in whole if p.device.startswith(names)]
        if parts and all(j is not None for j in parts):
            joules = math.fsum(j for j in parts if j is not None) * pue
            row[f"{family}_energy"] = joules_to_kwh(joules)
            row[f"{family}_power"] = joules / seconds if seconds > 0 else None
    gpus = {p.device for p in whole if p.device.startswith("gpu")}
    if gpus:
        row["gpu_count"] = len(gpus)
    if sys.platform.startswith("linux"):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        row["ram_total_size"] = size / 2**30
    if grid is not None and grid.check != "given":
        country, _, region = grid.code.partition("-")
        row["country_iso_code"] = grid.iso3 or None
        row["country_name"] = grid.name if not region else _country(country)
        row["region"] = grid.name.lower() if region else None
    return row | known


def _country(code: str) -> str | None:
    from joulesmith.energy.carbon import grids

    found = grids().get(code)
    return found.name if found else None
