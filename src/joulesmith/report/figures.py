"""How figures are written for people. Unknown is "unknown", never 0. Knows no layout."""

from __future__ import annotations

import math
import re

from joulesmith import units

UNKNOWN = "unknown"
PEDIGREES = {
    "measured": ("●", "read from an energy counter of the machine"),
    "modelled": ("◐", "from a power model driven by measured time and load, with an interval"),
    "assumed": ("○", "from a published constant, not from this machine"),
}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Control and direction-changing characters made visible as U+FFFD.

    Names come from files and hubs: they must neither drive a terminal nor
    break the XML of a chart.
    """
    return _CONTROL.sub("\ufffd", text)


def printable(text: str, encoding: str | None) -> str:
    """`clean` text in characters that a terminal of that encoding has."""
    safe = clean(text)
    encoding = encoding or "utf-8"
    try:
        safe.encode(encoding)
    except UnicodeEncodeError:
        plain = safe.replace("µ", "u").replace("±", "+-")
        return plain.encode(encoding, "replace").decode(encoding)
    return safe


def known(value: float | None) -> bool:
    """Whether there is a finite figure."""
    return value is not None and math.isfinite(value)


def quantity(value: float | None, unit: str) -> str:
    """Three significant digits, zeros kept: columns of figures then line up."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if not unit and 0 < value < 1:  # a count: "0.793", not "793 m"
        return f"{value:#.3g} "
    number, _, name = units.si(value, unit).partition(" ")
    return f"{float(number):#.3g}".rstrip(".") + f" {name}"


def joules(value: float | None) -> str:
    """``"62.1 mJ"``."""
    return quantity(value, "J")


def seconds(value: float | None) -> str:
    """``"1.20 ms"``."""
    return quantity(value, "s")


def interval(low: float | None, high: float | None, unit: str = "J") -> str:
    """``"31.0 to 93.2 mJ"``; a missing end makes the whole unknown."""
    if not (known(low) and known(high)):
        return UNKNOWN
    first, last = quantity(low, unit), quantity(high, unit)
    number, _, prefixed = first.partition(" ")
    return f"{number if last.endswith(f' {prefixed}') else first} to {last}"


def rate(seconds_per_token: float | None) -> str:
    """Tokens per second from seconds per token."""
    if seconds_per_token is None or not math.isfinite(seconds_per_token) or seconds_per_token <= 0:
        return UNKNOWN
    value = 1 / seconds_per_token
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(n_bytes: int | None) -> str:
    """``"98.4 MB"``."""
    return quantity(n_bytes, "B")


def duration(seconds: float) -> str:
    """``"1 min 15 s"``."""
    return units.duration(seconds) if math.isfinite(seconds) else UNKNOWN


def fixed(value: float | None, digits: int) -> str:
    """A number with ``digits`` decimals."""
    return f"{value:,.{digits}f}" if value is not None and math.isfinite(value) else UNKNOWN


def factor(value: float | None) -> str:
    """Two decimals, and two significant digits below a tenth."""
    if value is not None and 0 < value < 0.1:
        return f"{value:.2g}"
    return fixed(value, 2)


def small(value: float | None) -> str:
    """Three significant digits, for KL and damage."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:#.3g}".rstrip(".") if value else "0"


def count(value: int | None) -> str:
    """``"49,152"``."""
    return UNKNOWN if value is None else f"{value:,}"


def percent(share: float | None, digits: int = 1) -> str:
    """``percent(0.9123) == "91.2 %"``."""
    return f"{100 * share:.{digits}f} %" if share is not None and math.isfinite(share) else UNKNOWN


def change(before: float | None, after: float | None) -> str:
    """``change(100, 68) == "-32.0 %"`` with a true minus sign."""
    if before is None or after is None or not known(before) or not known(after) or before == 0:
        return UNKNOWN
    share = after / before - 1
    sign = "−" if share < 0 else "+"
    return f"{sign}{abs(100 * share):.1f} %"


def parameters(n: int) -> str:
    """``"135 M"``."""
    return units.si(n, "").strip()
