"""Conversions and the way quantities are printed. Knows no devices and no models."""

from __future__ import annotations

import re

from joulesmith.errors import JoulesmithError

JOULES_PER_WATT_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6

_PREFIXES = (
    (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"),
    (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"),
)  # fmt: skip


def joules_to_kwh(joules: float) -> float:
    """Joules -> kilowatt-hours."""
    return joules / JOULES_PER_KWH


def si(value: float | None, unit: str, digits: int = 3) -> str:
    """``si(0.0123, "J") == "12.3 mJ"``. ``None`` (unknown) prints as "unknown", never as 0."""
    if value is None:
        return "unknown"
    if value == 0 or value != value or value in (float("inf"), float("-inf")):
        return f"{value:g} {unit}"
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}"


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units: ``size(98362432) == "98.4 MB"``."""
    return si(n_bytes, "B")


def duration(seconds: float) -> str:
    """``duration(75) == "1 min 15 s"``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "m": 1e-3}


def parse_joules(text: str, option: str) -> float:
    """ "50kJ", "1.5 MJ", "200 J", "0.1kWh", "20Wh" -> joules. Raises `JoulesmithError`, naming the
    option, for anything else and for nothing."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([kMGm]?)(J|Wh)\s*", text)
    value = 0.0
    if match is not None:
        factor = JOULES_PER_WATT_HOUR if match[3] == "Wh" else 1.0
        value = float(match[1]) * _FACTORS[match[2]] * factor
    if value <= 0:
        raise JoulesmithError(f"{option} {text[:40]!r}: give joules such as 50kJ, 2MJ or 0.1kWh")
    return value


_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def parse_count(text: str, option: str) -> float:
    """ "8e9", "8B", "70b", "15T", "135M", "1.5k", "15_000" -> a count above 0. Raises
    `JoulesmithError`, naming the option, for anything else."""
    match = re.fullmatch(
        r"\s*(\d[\d_,]{0,30}(?:\.\d{1,12})?(?:[eE]\+?\d{1,2})?)\s*([kKmMbBgGtT]?)\s*", text
    )
    value = 0.0
    if match is not None:
        value = float(re.sub("[_,]", "", match[1])) * _COUNTS[match[2].lower()]
    if not 0 < value <= 1e30:
        raise JoulesmithError(f"{option} {text[:40]!r}: give a number such as 8e9, 8B or 15T")
    return value
