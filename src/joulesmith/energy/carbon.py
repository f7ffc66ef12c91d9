"""Grams of CO2 equivalent and money for joules. Knows tables; knows no meters.

Both tables are yearly averages restated from public figures and rounded; each row
names its source. They are `assumed` in the sense of a reading's pedigree.
"""

from __future__ import annotations

import csv
import difflib
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TypeVar

from joulesmith.errors import JoulesmithError
from joulesmith.units import joules_to_kwh

DEFAULT = "WORLD"
_Row = TypeVar("_Row", "GridRow", "PriceRow")


@dataclass(frozen=True)
class GridRow:
    """Yearly mean intensity of a grid.

    basis: "lifecycle" (building the plants and upstream fuel included) or "direct"
    (what leaves the stack); compare rows of one basis only.
    """

    code: str
    name: str
    gco2e_per_kwh: float
    year: int
    basis: str
    source: str


@dataclass(frozen=True)
class PriceRow:
    """Price of a kilowatt-hour in ``currency``; kind: "industrial" or "household"."""

    code: str
    name: str
    price_per_kwh: float
    currency: str
    kind: str
    year: int
    source: str


def _read(file: str) -> list[dict[str, str]]:
    text = (resources.files("joulesmith.energy") / "data" / file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@lru_cache(maxsize=1)
def grids() -> dict[str, GridRow]:
    """All grids by code."""
    return {
        r["code"]: GridRow(
            code=r["code"],
            name=r["name"],
            gco2e_per_kwh=float(r["gco2e_per_kwh"]),
            year=int(r["year"]),
            basis=r["basis"],
            source=r["source"],
        )
        for r in _read("grid.csv")
    }


@lru_cache(maxsize=1)
def prices() -> dict[str, PriceRow]:
    """All prices by code."""
    return {
        r["code"]: PriceRow(
            code=r["code"],
            name=r["name"],
            price_per_kwh=float(r["price_per_kwh"]),
            currency=r["currency"],
            kind=r["kind"],
            year=int(r["year"]),
            source=r["source"],
        )
        for r in _read("price.csv")
    }


def grid(code: str = DEFAULT) -> GridRow:
    """The grid of a code ("FR", "US-CA", "WORLD") or a country's name, any case.

    Raises `JoulesmithError`, naming near matches, when there is none.
    """
    return _find(grids(), code, "grid")


def price(code: str = DEFAULT) -> PriceRow:
    """The price for a code or a country's name, any case.

    Raises `JoulesmithError`, naming near matches, when there is none.
    """
    return _find(prices(), code, "price")


def emission(joules: float, grid: GridRow | str | float = DEFAULT, pue: float = 1.0) -> float:
    """Grams of CO2 equivalent.

    joules: at the machine. grid: a `GridRow`, its code, or gCO2e per kWh. pue: power
    usage effectiveness of the building, facility energy / machine energy, >= 1.
    Raises `JoulesmithError` for an unknown grid, ValueError for values out of range.
    """
    if pue < 1.0 or not math.isfinite(pue):
        raise ValueError(f"pue must be 1 or more, got {pue}")
    if isinstance(grid, str):
        grid = _find(grids(), grid, "grid")
    rate = grid.gco2e_per_kwh if isinstance(grid, GridRow) else float(grid)
    return _times(joules, rate) * pue


def cost(joules: float, price: PriceRow | str | float = DEFAULT, pue: float = 1.0) -> float:
    """Money in the currency of the price.

    joules: at the machine. price: a `PriceRow`, its code, or money per kWh. pue: as
    in `emission`.
    Raises `JoulesmithError` for an unknown price, ValueError for values out of range.
    """
    if pue < 1.0 or not math.isfinite(pue):
        raise ValueError(f"pue must be 1 or more, got {pue}")
    if isinstance(price, str):
        price = _find(prices(), price, "price")
    rate = price.price_per_kwh if isinstance(price, PriceRow) else float(price)
    return _times(joules, rate) * pue


def _times(joules: float, per_kwh: float) -> float:
    for value, what in ((joules, "joules"), (per_kwh, "the rate per kWh")):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be 0 or more, got {value}")
    return joules_to_kwh(joules) * per_kwh


def _find(rows: dict[str, _Row], code: str, what: str) -> _Row:
    key: str = code.strip()
    row = rows.get(key.upper())
    if row is not None:
        return row
    names: dict[str, _Row] = {r.name.lower(): r for r in rows.values()}
    if key.lower() in names:
        return names[key.lower()]
    near = [
        *(names[n].code for n in difflib.get_close_matches(key.lower(), names, n=2, cutoff=0.6)),
        *difflib.get_close_matches(key.upper(), rows, n=3, cutoff=0.5),
    ]
    hint = ", ".join(f"{c} ({rows[c].name})" for c in dict.fromkeys(near))
    known = hint or f"one of {', '.join(list(rows)[:8])} ..."
    raise JoulesmithError(f"unknown {what} {code!r}: did you mean {known}?")
