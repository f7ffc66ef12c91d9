"""Conversions and the way quantities are printed. Knows no devices and no models."""

from __future__ import annotations

JOULES_PER_WATT_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


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
