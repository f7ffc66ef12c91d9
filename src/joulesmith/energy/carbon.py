"""Grams of CO2 equivalent and money for joules. Knows tables; knows no meters.

Both tables are restated from public figures; each row names its year and source, and
"unchecked" where the figure could not be looked up again. Grid rows are yearly means
and location-based: what the grid delivers there, not what a contract buys and not what
one more kilowatt-hour causes. They are `assumed` in the sense of a reading's pedigree;
an interval of grams or money is that of the joules and leaves the row's error out.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timezone
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from joulesmith.energy.reading import Pedigree, Reading, worst
from joulesmith.errors import JoulesmithError
from joulesmith.units import joules_to_kwh

if TYPE_CHECKING:
    from joulesmith.energy.series import Series

DEFAULT = "WORLD"
FRESH_YEARS = 2
BUSINESS, HOUSEHOLD = "business", "household"
_ALIASES = {"UK": "GB", "EL": "GR", "GLOBAL": "WORLD", "EU27": "EU"}
_Row = TypeVar("_Row", "GridRow", "PriceRow")


@dataclass(frozen=True)
class GridRow:
    """Yearly mean intensity of a grid, location-based.

    basis: "lifecycle" (building the plants and upstream fuel included), "direct" (what
    leaves the stack) or "given"; compare rows of one basis only. year: None where the
    user gave a number. check: "checked", "unchecked" or "given". iso3: of the country.
    """

    code: str
    name: str
    gco2e_per_kwh: float
    year: int | None
    basis: str
    source: str
    check: str = "checked"
    iso3: str = ""


@dataclass(frozen=True)
class PriceRow:
    """Price of a kilowatt-hour in ``currency``; kind: "business", "household" or "given".

    Household prices hold all taxes, business prices none that are paid back (VAT).
    """

    code: str
    name: str
    price_per_kwh: float
    currency: str
    kind: str
    year: int | None
    source: str
    check: str = "checked"


@dataclass(frozen=True)
class Amount:
    """Grams of CO2 equivalent (unit "gCO2e") or money (unit: a currency code).

    value: None when the joules or the rate are unknown. low, high: interval of the joules
    at this rate. pedigree: the least sure of the joules' and the rate's.
    """

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    pedigree: Pedigree | None = None
    source: str = ""
    notes: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def grids() -> dict[str, GridRow]:
    """All grids by code."""
    return _grid_rows(_shipped("grid.csv"), "grid.csv", "unchecked")


@lru_cache(maxsize=2)
def prices(kind: str = BUSINESS) -> dict[str, PriceRow]:
    """All prices of a kind by code."""
    return _price_rows(_shipped("price.csv"), "price.csv", kind, "unchecked")


def read_grids(path: Path | str) -> dict[str, GridRow]:
    """A user's grids by code: a CSV with the columns of `GridRow`.

    ``code`` and ``gco2e_per_kwh`` are needed, the rest may be absent.
    Raises `JoulesmithError` naming the file and the line.
    """
    return _grid_rows(_file(path), str(path), "given")


def read_prices(path: Path | str, kind: str = BUSINESS) -> dict[str, PriceRow]:
    """A user's prices by code; ``code``, ``price_per_kwh`` and ``currency`` are needed."""
    return _price_rows(_file(path), str(path), kind, "given")


def grid(code: str | float = DEFAULT, file: Path | str | None = None) -> GridRow:
    """The grid of a code ("FR", "FRA", "US-CA", "WORLD"), a country's name, or a number.

    code: any case; a number (350 or "350") is gCO2e per kWh as the user gives it.
    file: a user's table (`read_grids`) that goes before the shipped one.
    Raises `JoulesmithError`, naming near matches, when there is none.
    """
    given = _number(code, "the grid intensity in gCO2e per kWh")
    if given is not None:
        return GridRow("given", "as given", given, None, "given", "given by the user", "given")
    rows = {**grids(), **read_grids(file)} if file is not None else grids()
    return _find(rows, str(code), "grid")


def price(
    code: str | float = DEFAULT,
    kind: str | None = None,
    file: Path | str | None = None,
    currency: str = "",
) -> PriceRow:
    """The price for a code or a country's name, any case, or a number.

    kind: "business" or "household"; by default business where known, else household.
    file: a user's table (`read_prices`) that goes before the shipped one. currency: of
    a price given as a number.
    Raises `JoulesmithError`, naming near matches, when there is none.
    """
    given = _number(code, "the price per kWh")
    if given is not None:
        return PriceRow(
            "given", "as given", given, currency, "given", None, "given by the user", "given"
        )
    if kind is not None and kind not in (BUSINESS, HOUSEHOLD):
        raise JoulesmithError(f"unknown kind of price {kind!r}: give business or household")
    kinds = (kind,) if kind else (HOUSEHOLD, BUSINESS)  # the later one wins
    rows: dict[str, PriceRow] = {}
    for one in kinds:
        rows |= prices(one)
    for one in kinds if file is not None else ():
        rows |= read_prices(str(file), one)
    return _find(rows, str(code), "price")


# `emission` and `cost` have parameters of these names.
_grid_of, _price_of = grid, price


def emission(joules: float, grid: GridRow | str | float = DEFAULT, pue: float = 1.0) -> float:
    """Grams of CO2 equivalent.

    joules: at the machine. grid: a `GridRow`, its code, or gCO2e per kWh. pue: power
    usage effectiveness of the building, facility energy / machine energy, >= 1.
    Raises `JoulesmithError` for an unknown grid, ValueError for values out of range.
    """
    _check_pue(pue)
    if isinstance(grid, str):
        grid = _grid_of(grid)
    rate = grid.gco2e_per_kwh if isinstance(grid, GridRow) else float(grid)
    return _times(joules, rate) * pue


def cost(joules: float, price: PriceRow | str | float = DEFAULT, pue: float = 1.0) -> float:
    """Money in the currency of the price.

    joules: at the machine. price: a `PriceRow`, its code, or money per kWh. pue: as
    in `emission`.
    Raises `JoulesmithError` for an unknown price, ValueError for values out of range.
    """
    _check_pue(pue)
    if isinstance(price, str):
        price = _price_of(price)
    rate = price.price_per_kwh if isinstance(price, PriceRow) else float(price)
    return _times(joules, rate) * pue


def footprint(
    energy: Reading | float | None,
    source: GridRow | Series | str | float = DEFAULT,
    *,
    pue: float = 1.0,
    start: datetime | float | None = None,
    today: date | None = None,
) -> Amount:
    """Grams of CO2 equivalent with interval, pedigree, source and notes.

    energy: a reading, or joules at the machine; None is unknown and stays so.
    source: what `grid` takes, a `GridRow`, or an hourly `Series`; a series needs a
    reading (for its seconds) and ``start``, an aware datetime or Unix seconds.
    today: the day that freshness is judged on; default now.
    Raises `JoulesmithError` for an unknown grid, ValueError for values out of range.
    """
    _check_pue(pue)
    if isinstance(source, str | int | float):
        source = grid(source)
    if isinstance(source, GridRow):
        label = source.source if source.check == "given" else f"{source.name}, {source.source}"
        return _amount(
            energy, source.gco2e_per_kwh, "gCO2e", pue, label, _row_notes(source, "grid", today)
        )
    return _from_series(energy, source, pue, start)


def bill(
    energy: Reading | float | None,
    source: PriceRow | Series | str | float = DEFAULT,
    *,
    pue: float = 1.0,
    start: datetime | float | None = None,
    today: date | None = None,
) -> Amount:
    """Money, as `footprint`; source: what `price` takes, a `PriceRow`, or a `Series` of prices."""
    _check_pue(pue)
    if isinstance(source, str | int | float):
        source = price(source)
    if isinstance(source, PriceRow):
        label = f"{source.name}, {source.kind}, {source.source}"
        return _amount(
            energy,
            source.price_per_kwh,
            source.currency,
            pue,
            source.source if source.check == "given" else label,
            _row_notes(source, "price", today),
        )
    return _from_series(energy, source, pue, start)


def stale(row: GridRow | PriceRow, today: date | None = None) -> bool:
    """True when the row's year ended more than two years ago."""
    today = today or datetime.now(timezone.utc).date()
    return row.year is not None and today > date(row.year + FRESH_YEARS, 12, 31)


# ---- amounts


def _row_notes(row: GridRow | PriceRow, what: str, today: date | None) -> tuple[str, ...]:
    notes = []
    if stale(row, today):
        notes.append(
            f"{what} {row.code} is of {row.year}, more than {FRESH_YEARS} years old: give a newer "
            "figure if you have one"
        )
    if row.check == "unchecked":
        notes.append(f"{what} {row.code}: rounded, and not checked against its source")
    return tuple(notes)


def _from_series(
    energy: Reading | float | None, series: Series, pue: float, start: datetime | float | None
) -> Amount:
    if energy is not None and not isinstance(energy, Reading):
        raise ValueError("a series needs a reading: joules alone have no time")
    if start is None:
        raise ValueError("a series needs the start of the window")
    if energy is None:
        return _amount(None, None, series.unit, pue, series.source, ())
    begin = start.timestamp() if isinstance(start, datetime) else float(start)
    rate, notes = series.mean(begin, begin + energy.seconds)
    return _amount(energy, rate, series.unit, pue, series.source, notes)


def _amount(
    energy: Reading | float | None,
    rate: float | None,
    unit: str,
    pue: float,
    source: str,
    notes: Iterable[str],
) -> Amount:
    low = high = None
    pedigree: Pedigree | None = "assumed"
    if isinstance(energy, Reading):
        joules, low, high = energy.joules, energy.low, energy.high
        pedigree = worst((energy.pedigree, "assumed"))
    else:
        joules = energy
    if joules is not None and not (math.isfinite(joules) and joules >= 0):
        raise ValueError(f"joules must be 0 or more, got {joules}")
    if joules is None or rate is None:
        told = (*notes, "the energy is unknown") if joules is None else tuple(notes)
        return Amount(None, unit, source=source, notes=told)

    def times(j: float | None) -> float | None:
        return None if j is None else joules_to_kwh(j) * rate * pue

    ends = (times(low), times(high))
    if rate < 0:  # prices of an hour may be
        ends = (ends[1], ends[0])
    return Amount(times(joules), unit, ends[0], ends[1], pedigree, source, tuple(notes))


def _check_pue(pue: float) -> None:
    if pue < 1.0 or not math.isfinite(pue):
        raise ValueError(f"pue must be 1 or more, got {pue}")


def _times(joules: float, per_kwh: float) -> float:
    for value, what in ((joules, "joules"), (per_kwh, "the rate per kWh")):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be 0 or more, got {value}")
    return joules_to_kwh(joules) * per_kwh


# ---- tables


def _shipped(file: str) -> str:
    return (resources.files("joulesmith.energy") / "data" / file).read_text(encoding="utf-8")


def _file(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise JoulesmithError(
            f"cannot read: {path}: {e.strerror or e}: give a CSV file with these columns"
        ) from e
    except UnicodeDecodeError as e:
        raise JoulesmithError(f"not a text file: {path}: give a CSV file in UTF-8") from e


def _lines(text: str, name: str, needed: tuple[str, ...]) -> Iterable[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [c for c in needed if c not in (reader.fieldnames or ())]
    if missing:
        raise JoulesmithError(f"{name}: no column {missing[0]!r}: it needs {', '.join(needed)}")
    try:
        for raw in reader:
            row = {k: (v or "").strip() for k, v in raw.items() if isinstance(k, str)}
            yield f"{name}, line {reader.line_num}", row
    except csv.Error as e:
        raise JoulesmithError(f"{name}, line {reader.line_num}: not CSV: {e}") from e


def _rate(text: str, where: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise JoulesmithError(f"{where}: {column} must be a number, 0 or more, got {text!r}")
    return value


def _year(text: str, where: str) -> int | None:
    if not text:
        return None
    if text.isdecimal() and 1900 <= int(text) <= 9990:
        return int(text)
    raise JoulesmithError(f"{where}: year must be a number like 2024, got {text!r}")


def _grid_rows(text: str, name: str, check: str) -> dict[str, GridRow]:
    rows = {}
    for where, r in _lines(text, name, ("code", "gco2e_per_kwh")):
        code = r["code"].upper()
        if not code:
            raise JoulesmithError(f"{where}: the code is empty")
        rows[code] = GridRow(
            code=code,
            name=r.get("name") or code,
            gco2e_per_kwh=_rate(r["gco2e_per_kwh"], where, "gco2e_per_kwh"),
            year=_year(r.get("year", ""), where),
            basis=r.get("basis") or "given",
            source=r.get("source") or name,
            check=r.get("check") or check,
            iso3=r.get("iso3", ""),
        )
    return rows


def _price_rows(text: str, name: str, kind: str, check: str) -> dict[str, PriceRow]:
    rows = {}
    for where, r in _lines(text, name, ("code", "price_per_kwh", "currency")):
        code = r["code"].upper()
        if not code or not r["currency"]:
            raise JoulesmithError(f"{where}: the code or the currency is empty")
        if (r.get("kind") or kind) != kind:
            continue
        rows[code] = PriceRow(
            code=code,
            name=r.get("name") or code,
            price_per_kwh=_rate(r["price_per_kwh"], where, "price_per_kwh"),
            currency=r["currency"],
            kind=kind,
            year=_year(r.get("year", ""), where),
            source=r.get("source") or name,
            check=r.get("check") or check,
        )
    return rows


def _number(code: str | float, what: str) -> float | None:
    """The number that was given instead of a code; None for a code."""
    try:
        value = float(code)
    except ValueError:
        return None
    if not (math.isfinite(value) and value >= 0):
        raise JoulesmithError(f"{what} must be 0 or more, got {code}")
    return value


def _find(rows: Mapping[str, _Row], code: str, what: str) -> _Row:
    key: str = code.strip()
    row = rows.get(key.upper()) or rows.get(_ALIASES.get(key.upper(), ""))
    if row is not None:
        return row
    for known in grids().values():
        iso3 = known.iso3 if len(known.code) == 2 else ""
        if key and key.lower() in (iso3.lower(), known.name.lower()) and known.code in rows:
            return rows[known.code]
    names: dict[str, _Row] = {r.name.lower(): r for r in rows.values()}
    if key.lower() in names:
        return names[key.lower()]
    near = [
        *(names[n].code for n in difflib.get_close_matches(key.lower(), names, n=2, cutoff=0.6)),
        *difflib.get_close_matches(key.upper(), rows, n=3, cutoff=0.5),
    ]
    hint = ", ".join(f"{c} ({rows[c].name})" for c in dict.fromkeys(near))
    hint = hint or f"one of {', '.join(list(rows)[:8])} ..."
    raise JoulesmithError(f"unknown {what} {code!r}: did you mean {hint}?")
