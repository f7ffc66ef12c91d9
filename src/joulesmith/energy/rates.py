"""Carbon and money rates from what a user writes: a code, a number, or a file.

A file is a CSV, ``PATH.csv`` or ``PATH.csv:NAME``. With a column ``code`` it is a table
of rates (`carbon.read_grids`, `carbon.read_prices`) and NAME is the row; otherwise it is
a series over time (`series.read_series`) and NAME the zone.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from joulesmith.energy.carbon import (
    DEFAULT,
    GridRow,
    PriceRow,
    grid,
    price,
    read_grids,
    read_prices,
)
from joulesmith.energy.series import Series, read_series
from joulesmith.errors import JoulesmithError

CARBON_UNIT = "gCO2e"
_FILE = re.compile(r"(.+\.csv)(?::(.+))?", re.IGNORECASE)
_Row = TypeVar("_Row", GridRow, PriceRow)


def carbon_rate(text: str) -> GridRow | Series:
    """What ``--grid`` takes. Raises `JoulesmithError` as `grid` and `read_series` do."""
    match = _FILE.fullmatch(text.strip())
    if match is None:
        return grid(text)
    path, name = match[1], match[2]
    if _is_table(path):
        return _row(path, name, read_grids(path), lambda code: grid(code, path))
    series = read_series(path, zone=name)
    if series.unit != CARBON_UNIT:
        raise JoulesmithError(
            f"{path}: its values are prices in {series.unit}, not grams of CO2e per kWh: "
            "give the file to --price"
        )
    return series


def price_rate(text: str) -> PriceRow | Series:
    """What ``--price`` takes. Raises `JoulesmithError` as `price` and `read_series` do."""
    match = _FILE.fullmatch(text.strip())
    if match is None:
        return price(text)
    path, name = match[1], match[2]
    if _is_table(path):
        return _row(path, name, read_prices(path), lambda code: price(code, file=path))
    series = read_series(path, zone=name)
    if series.unit == CARBON_UNIT:
        raise JoulesmithError(
            f"{path}: its values are grams of CO2e per kWh, not prices: give the file to --grid"
        )
    return series


def price_for(grid: GridRow | Series) -> PriceRow | None:
    """The price of electricity where the grid is: its own, its country's, or none.

    That of the world where the place is not known: a number, a series, a user's table.
    """
    code = DEFAULT if isinstance(grid, Series) or grid.basis == "given" else grid.code
    for where in dict.fromkeys((code, code.partition("-")[0])):
        with contextlib.suppress(JoulesmithError):
            return price(where)
    return None


def _row(
    path: str, name: str | None, rows: Mapping[str, _Row], find: Callable[[str], _Row]
) -> _Row:
    if name is not None:
        return find(name)
    if len(rows) == 1:
        return next(iter(rows.values()))
    some = ", ".join(list(rows)[:6])
    raise JoulesmithError(
        f"{path}: {len(rows)} rows: name the one to take, {path}:CODE, of {some or 'none'}"
    )


def _is_table(path: str) -> bool:
    """Whether the header has a column ``code``; what cannot be read is told by the reader."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            return "code" in next(csv.reader(f), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
