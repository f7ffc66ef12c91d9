"""Rates as users write them: codes, numbers, tables, hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from joulesmith.energy.carbon import GridRow, PriceRow, grid, price
from joulesmith.energy.rates import carbon_rate, price_rate
from joulesmith.energy.series import Series
from joulesmith.errors import JoulesmithError

HOURS = "datetime_utc,zone,gco2e_per_kwh\n2026-01-01T00:00,A,100\n2026-01-01T00:00,B,300\n"
PRICES = "datetime_utc,price (EUR/MWh)\n2026-01-01T00:00,80\n2026-01-01T01:00,-10\n"
TABLE = "code,gco2e_per_kwh,name\nOSLO,12,the site in Oslo\nDE,350,\n"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_codes_and_numbers_go_to_the_shipped_tables() -> None:
    assert carbon_rate("FR") == grid("FR")
    assert price_rate("DE") == price("DE")
    assert isinstance(given := carbon_rate(" 42 "), GridRow)
    assert given.gco2e_per_kwh == 42
    with pytest.raises(JoulesmithError, match="unknown grid"):
        carbon_rate("Atlantis")


def test_hours_by_zone(tmp_path: Path) -> None:
    path = write(tmp_path, "hours.CSV", HOURS)
    series = carbon_rate(f"{path}:B")
    assert isinstance(series, Series)
    assert series.values == (300.0,)
    with pytest.raises(JoulesmithError, match="2 zones"):
        carbon_rate(path)
    with pytest.raises(JoulesmithError, match="no zone 'C'"):
        carbon_rate(f"{path}:C")


def test_prices_over_time(tmp_path: Path) -> None:
    series = price_rate(write(tmp_path, "p.csv", PRICES))
    assert isinstance(series, Series)
    assert (series.unit, series.values) == ("EUR", (0.08, -0.01))


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, "sites.csv", TABLE)
    row = carbon_rate(f"{path}:oslo")
    assert isinstance(row, GridRow)
    assert (row.gco2e_per_kwh, row.name, row.check) == (12, "the site in Oslo", "given")
    assert carbon_rate(f"{path}:FR") == grid("FR"), "what the table lacks, the shipped one has"
    with pytest.raises(JoulesmithError, match="name the one to take"):
        carbon_rate(path)
    only = write(tmp_path, "price.csv", "code,price_per_kwh,currency\nHOME,0.3,EUR\n")
    found = price_rate(only)
    assert isinstance(found, PriceRow)
    assert (found.price_per_kwh, found.currency) == (0.3, "EUR")


def test_a_file_of_the_other_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match="give the file to --price"):
        carbon_rate(write(tmp_path, "p.csv", PRICES))
    with pytest.raises(JoulesmithError, match="give the file to --grid"):
        price_rate(write(tmp_path, "h.csv", HOURS) + ":A")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b"code\nDE\n"])
def test_bad_files_are_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    for read in (carbon_rate, price_rate):
        with pytest.raises(JoulesmithError, match=r"x\.csv"):
            read(str(path))
    with pytest.raises(JoulesmithError, match="cannot read"):
        carbon_rate(str(tmp_path / "absent.csv"))
