"""Grid intensity or price over time, from a file. Knows no meters and no network.

A value holds from its own time until the next one, an hour at most (or the usual
step of the file where that is longer), the last one as long as the one before it: a
step function with gaps where the file has none. Means are over time;
`Series.weighted` follows the joules instead.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

from joulesmith.errors import JoulesmithError

_HOUR = 3600.0
_LB_PER_MWH = 0.45359237
"""Pounds per megawatt-hour in grams per kilowatt-hour."""
_TIME = ("time", "datetime", "timestamp", "pointtime", "date", "from", "start", "starttime")
_UTC = re.compile(r"utc|gmt|\bz\b", re.IGNORECASE)


@dataclass(frozen=True)
class Series:
    """Values per kilowatt-hour over time.

    times: Unix seconds, rising. values: from each time on. hold: seconds that a value
    holds at most. unit: "gCO2e" or a currency code; source: said in results.
    """

    times: tuple[float, ...]
    values: tuple[float, ...]
    hold: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.times))
        if not (len(self.times) == len(self.values) > 0 and rising and self.hold > 0):
            raise ValueError("a series needs rising times, a value for each, and a hold above 0")

    def at(self, time: float) -> float | None:
        """The value at a Unix time; None outside of the series or in a gap."""
        i = bisect_right(self.times, time) - 1
        return self.values[i] if i >= 0 and time < self._end(i) else None

    def mean(self, start: float, end: float) -> tuple[float | None, tuple[str, ...]]:
        """Mean over time from ``start`` to ``end`` (Unix seconds), and notes.

        None, with the reason, where any part lies outside of the series or in a gap.
        """
        if end < start:
            raise ValueError("a window ends before it starts")
        if end == start:
            value = self.at(start)
            return value, () if value is not None else (self._outside(start),)
        i = bisect_right(self.times, start) - 1
        parts, t = [], start
        while t < end:
            if not (0 <= i < len(self.times)) or not self.times[i] <= t < self._end(i):
                return None, (self._outside(t),)
            stop = min(end, self._end(i))
            parts.append(self.values[i] * (stop - t))
            t, i = stop, i + 1
        return math.fsum(parts) / (end - start), ()

    def weighted(
        self, points: Sequence[tuple[float, float]]
    ) -> tuple[float | None, tuple[str, ...]]:
        """Sum of joules x value / 3.6e6 (grams or money) along a curve of energy, and notes.

        points: (Unix time, cumulative joules), rising; power is even between two points.
        None, with the reason, where any joule lies outside of the series.
        """
        total = []
        for (t0, e0), (t1, e1) in pairwise(points):
            if e1 < e0 or t1 < t0:
                raise ValueError("times and cumulative joules must not fall")
            if e1 == e0:
                continue
            value, notes = self.mean(t0, t1)
            if value is None:
                return None, notes
            total.append((e1 - e0) / 3.6e6 * value)
        return math.fsum(total), ()

    def _end(self, i: int) -> float:
        t = self.times
        if i + 1 < len(t):
            return min(t[i] + self.hold, t[i + 1])
        # Nothing follows the last value: it holds for as long as the one before it.
        return t[i] + (min(self.hold, t[i] - t[i - 1]) if i else self.hold)

    def _outside(self, time: float) -> str:
        when = _iso(time)
        if self.times[0] <= time < self._end(len(self.times) - 1):
            return f"no value for {when}: a gap in {self.source}"
        return (
            f"{when} is outside of {self.source}, {_iso(self.times[0])} to {_iso(self.times[-1])}"
        )


def read_series(
    path: Path | str,
    *,
    column: str | None = None,
    zone: str | None = None,
    unit: str | None = None,
) -> Series:
    """Grid intensity or prices from a CSV file with a header.

    Times are ISO 8601 with an offset, or UTC where the column's name says so
    (``datetime_utc``, ``Datetime (UTC)``). Intensity columns known by name: gCO2 per
    kWh in any spelling (life cycle before direct), Electricity Maps' exports, and
    WattTime's ``value`` or ``MOER`` in pounds per MWh (marginal, not mean). Price
    columns: a name with "price", per MWh where it says so, currency from the name.

    column: of the values, where the name is not known; then unit: "gCO2e" (default) or
    a currency, per kWh. zone: the rows to take from a file of several zones.
    Raises `JoulesmithError` naming the file and the line.
    """
    header, rows = _read(path)
    keys = [_key(h) for h in header]
    time = next((keys.index(name) for name in _TIME if name in keys), None)
    if time is None:
        time = next((i for i, k in enumerate(keys) if k.startswith(_TIME[:3])), None)
    if time is None:
        raise JoulesmithError(f"{path}: no column of times: name one time or datetime_utc")
    at, factor, name = _values(path, header, keys, rows, column, unit)
    utc = bool(_UTC.search(header[time].replace("_", " ")))
    place = next(
        (keys.index(k) for k in ("zoneid", "zone", "zonename", "region", "ba") if k in keys), None
    )
    zones = {r[place] for _, r in rows if place < len(r)} if place is not None else set()
    if zone is not None and zone not in zones:
        raise JoulesmithError(f"{path}: no zone {zone!r}")
    if zone is None and len(zones) > 1:
        raise JoulesmithError(f"{path}: {len(zones)} zones in one file: name the one to take")

    found: dict[float, float] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) <= max(time, at):
            raise JoulesmithError(f"{where}: too few columns")
        if (zone is not None and place is not None and row[place] != zone) or not row[at].strip():
            continue  # an empty cell is a gap
        t = _time(row[time], utc, where)
        try:
            value = float(row[at]) * factor
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (value < 0 and name == "gCO2e"):
            raise JoulesmithError(f"{where}: not a value: {row[at]!r}")
        if found.setdefault(t, value) != value:
            raise JoulesmithError(f"{where}: two values for {_iso(t)}")
    if not found:
        raise JoulesmithError(f"{path}: no values in it")
    times = sorted(found)
    steps = [b - a for a, b in pairwise(times)]
    hold = max(_HOUR, statistics.median(steps)) if steps else _HOUR
    source = f"{Path(path).name} ({header[at]})"
    return Series(tuple(times), tuple(found[t] for t in times), hold, name, source)


def _read(path: Path | str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise JoulesmithError(
            f"cannot read: {path}: {e.strerror or e}: give a CSV file of times and values"
        ) from e
    except UnicodeDecodeError as e:
        raise JoulesmithError(f"not a text file: {path}: give a CSV file in UTF-8") from e
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        rows = [(reader.line_num, r) for r in reader if any(c.strip() for c in r)]
    except csv.Error as e:
        raise JoulesmithError(f"{path}, line {reader.line_num}: not CSV: {e}") from e
    if not rows:
        raise JoulesmithError(f"{path}: the file is empty")
    return [h.strip() for h in rows[0][1]], rows[1:]


def _key(name: str) -> str:
    """A column's name without case, units in brackets, UTC and punctuation."""
    return re.sub(r"\(.*?\)|utc|[^a-z0-9]", "", name.lower().replace("₂", "2"))


def _values(
    path: Path | str,
    header: list[str],
    keys: list[str],
    rows: Iterable[tuple[int, list[str]]],
    column: str | None,
    unit: str | None,
) -> tuple[int, float, str]:
    """Index of the column of values, factor to per kWh, unit."""
    if column is not None:
        if column not in header:
            raise JoulesmithError(f"{path}: no column {column!r}: it has {', '.join(header)}")
        return header.index(column), 1.0, unit or "gCO2e"
    carbon = [
        i
        for i, k in enumerate(keys)
        if ("co2" in k and "kwh" in k) or "carbonintensity" in k or k.startswith("intensity")
    ]
    if carbon:
        # Of "direct" and "life cycle" the whole one, of forecast and actual the latter.
        whole = [i for i in carbon if not re.search("direct|forecast", header[i].lower())]
        at = (whole or carbon)[0]
        low = header[at].lower()
        kilo = 1e3 if "kg" in low and "kwh" in low else 1.0
        return at, _LB_PER_MWH if "lb" in low else kilo, "gCO2e"
    for i, k in enumerate(keys):
        if k == "moer" or ("lb" in k and "mwh" in k):
            return i, _LB_PER_MWH, "gCO2e"
    if "value" in keys:
        units = keys.index("units") if "units" in keys else None
        said = {r[units].lower() for _, r in rows if units is not None and units < len(r)}
        if (units is None and "pointtime" in keys) or said == {"lbs_co2_per_mwh"}:
            return keys.index("value"), _LB_PER_MWH, "gCO2e"
    for i, k in enumerate(keys):
        if "price" in k:
            low = header[i].lower()
            money = re.search(r"\b(eur|usd|gbp|sek|nok|dkk|pln|chf|cad|aud|jpy|inr)", low)
            symbol = "EUR" if "€" in low else "GBP" if "£" in low else "USD" if "$" in low else ""
            name = unit or (money.group(1).upper() if money else symbol)
            if name:
                return i, 1e-3 if "mwh" in low else 1.0, name
    raise JoulesmithError(
        f"{path}: no column of values known by name in {', '.join(header)}: "
        "name it gco2e_per_kwh, or say which column"
    )


def _time(text: str, utc: bool, where: str) -> float:
    try:
        # Python 3.10 does not know the Z.
        t = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip()))
    except ValueError:
        raise JoulesmithError(f"{where}: not an ISO 8601 time: {text!r}") from None
    if t.tzinfo is None:
        if not utc:
            raise JoulesmithError(
                f"{where}: a time without UTC offset: write {text.strip()}+00:00, or name the "
                "column datetime_utc"
            )
        t = t.replace(tzinfo=timezone.utc)
    return t.timestamp()


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
