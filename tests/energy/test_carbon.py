from __future__ import annotations

from datetime import date, datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import cost, emission, grid, price
from joulesmith.energy.carbon import (
    bill,
    footprint,
    grids,
    prices,
    read_grids,
    read_prices,
    stale,
)
from joulesmith.energy.reading import Reading
from joulesmith.energy.series import Series
from joulesmith.errors import JoulesmithError

G20 = [
    "AR",
    "AU",
    "BR",
    "CA",
    "CN",
    "DE",
    "EU",
    "FR",
    "GB",
    "ID",
    "IN",
    "IT",
    "JP",
    "KR",
    "MX",
    "RU",
    "SA",
    "TR",
    "US",
    "ZA",
]
EU = [
    "AT",
    "BE",
    "BG",
    "CY",
    "CZ",
    "DE",
    "DK",
    "EE",
    "ES",
    "FI",
    "FR",
    "GR",
    "HR",
    "HU",
    "IE",
    "IT",
    "LT",
    "LU",
    "LV",
    "MT",
    "NL",
    "PL",
    "PT",
    "RO",
    "SE",
    "SI",
    "SK",
]


def test_a_kilowatt_hour_emits_the_intensity() -> None:
    assert emission(3.6e6, "FR") == pytest.approx(grid("FR").gco2e_per_kwh)
    assert emission(3.6e6, grid("FR"), pue=1.5) == pytest.approx(1.5 * grid("FR").gco2e_per_kwh)
    assert emission(1.8e6, 400.0) == pytest.approx(200.0)
    assert cost(7.2e6, "DE") == pytest.approx(2 * price("DE").price_per_kwh)
    assert cost(3.6e6, price("US"), 1.2) == pytest.approx(1.2 * price("US").price_per_kwh)
    assert cost(3.6e6, 0.3) == pytest.approx(0.3)


def test_defaults_and_names() -> None:
    assert grid().code == price().code == "WORLD"
    assert grid(" us-ca ").code == "US-CA"
    assert grid("germany").code == price("GERMANY").code == "DE"
    assert grid("DEU").code == price("deu").code == "DE"
    assert grid("uk").code == "GB" and grid("EL").code == "GR"


@pytest.mark.parametrize("code", ["FRX", "germny", "", "??", "Atlantis"])
def test_unknown_code_is_one_line_with_near_matches(code: str) -> None:
    for look in (grid, price):
        with pytest.raises(JoulesmithError) as e:
            look(code)
        assert "\n" not in str(e.value) and "did you mean" in str(e.value)


def test_near_matches_name_the_country() -> None:
    with pytest.raises(JoulesmithError, match=r"DE \(Germany\)"):
        grid("germny")
    with pytest.raises(JoulesmithError, match=r"FR \(France\)"):
        emission(1.0, "FRX")


@pytest.mark.parametrize("pue", [0.9, float("nan"), float("inf")])
def test_pue_below_one_is_refused(pue: float) -> None:
    for call in (emission, cost):
        with pytest.raises(ValueError, match="pue"):
            call(1.0, "FR", pue)
    for told in (footprint, bill):
        with pytest.raises(ValueError, match="pue"):
            told(1.0, "FR", pue=pue)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_joules_are_refused(bad: float) -> None:
    for call in (emission, cost, footprint, bill):
        with pytest.raises(ValueError, match="joules"):
            call(bad)


@given(st.floats(0, 1e15), st.floats(1, 3))
def test_emission_is_linear_and_never_negative(joules: float, pue: float) -> None:
    one = emission(joules, "WORLD", pue)
    assert one >= 0 and emission(2 * joules, "WORLD", pue) == pytest.approx(2 * one)


def test_tables_are_whole() -> None:
    assert len(grids()) >= 60 and set(G20) | set(EU) <= set(grids())
    for country in ("US", "CA", "AU", "IN"):
        assert sum(code.startswith(country + "-") for code in grids()) >= 5
    for code, g in grids().items():
        assert code == g.code == code.upper() and g.source and g.basis in ("lifecycle", "direct")
        assert 0 < g.gco2e_per_kwh < 1200 and g.year is not None and 2020 <= g.year <= 2026
        assert g.check in ("checked", "unchecked")
        assert len(g.iso3) == 3 or code in ("WORLD", "EU")
    assert len({g.name for g in grids().values()}) == len(grids())


@pytest.mark.parametrize("kind", ["business", "household"])
def test_prices_are_whole(kind: str) -> None:
    assert len(prices(kind)) > 25
    for code, p in prices(kind).items():
        assert code == p.code and len(p.currency) == 3 and p.kind == kind
        assert p.price_per_kwh > 0 and p.source and p.year and p.check in ("checked", "unchecked")
        assert code in grids()


def test_kind_of_price() -> None:
    assert price("DE").kind == "business" and price("DE", "household").kind == "household"
    assert price("DE", "household").price_per_kwh > price("DE").price_per_kwh
    assert price("AU").kind == "household"  # no business price is known there
    with pytest.raises(JoulesmithError, match="business or household"):
        price("DE", "wholesale")


# ---- the user's own figures


@pytest.mark.parametrize("number", [350, 350.0, "350", " 3.5e2 "])
def test_a_number_is_taken_as_given(number: str | float) -> None:
    row = grid(number)
    assert row.gco2e_per_kwh == 350 and row.year is None and row.check == "given"
    assert not stale(row)
    assert footprint(3.6e6, number).notes == ()
    assert emission(3.6e6, "350") == 350
    assert price("0.25", currency="EUR").currency == "EUR"


@pytest.mark.parametrize("bad", ["-1", "nan", "inf", -3.0])
def test_impossible_numbers(bad: str | float) -> None:
    for look in (grid, price):
        with pytest.raises(JoulesmithError, match="0 or more"):
            look(bad)


def test_a_users_table_goes_first(tmp_path: Path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("\ufeffcode,gco2e_per_kwh,year\nfr,10,2026\nHOME,33,\n", encoding="utf-8")
    assert read_grids(mine)["HOME"].year is None
    assert grid("France", mine).gco2e_per_kwh == 10
    assert grid("FR", mine).gco2e_per_kwh == 10 and grid("home", mine).gco2e_per_kwh == 33
    assert grid("DE", mine) == grid("DE")
    tariff = tmp_path / "tariff.csv"
    tariff.write_text("code,price_per_kwh,currency,kind\nHOME,0.4,EUR,household\nWORK,0.2,EUR,\n")
    assert price("HOME", file=tariff).kind == "household"
    assert price("WORK", file=tariff).price_per_kwh == 0.2
    assert list(read_prices(tariff, "household")) == ["HOME", "WORK"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column 'code'"),
        ("code,year\nFR,2024\n", "gco2e_per_kwh"),
        ("code,gco2e_per_kwh\nFR,ten\n", "line 2.*'ten'"),
        ("code,gco2e_per_kwh\nDE,1\nFR,-4\n", "line 3.*'-4'"),
        ("code,gco2e_per_kwh\nDE\n", "line 2"),
        ("code,gco2e_per_kwh\n,5\n", "code is empty"),
        ("code,gco2e_per_kwh,year\nDE,5,last\n", "year"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(JoulesmithError, match=says) as e:
        read_grids(file)
    assert "bad.csv" in str(e.value) and "\n" not in str(e.value)


def test_a_missing_or_binary_table(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match="cannot read"):
        read_grids(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(JoulesmithError, match="not a text file"):
        read_prices(tmp_path / "b.csv")


# ---- amounts


def test_an_amount_carries_interval_pedigree_and_source() -> None:
    reading = Reading(3.6e6, 60.0, low=3e6, high=5e6, pedigree="measured")
    a = footprint(reading, "FR", pue=1.2, today=date(2025, 1, 1))
    rate = 1.2 * grid("FR").gco2e_per_kwh
    assert a.value == pytest.approx(rate) and a.unit == "gCO2e" and a.notes == ()
    assert a.low == pytest.approx(rate * 3 / 3.6) and a.high == pytest.approx(rate * 5 / 3.6)
    assert a.pedigree == "assumed" and "France" in a.source and "Ember" in a.source
    money = bill(reading, "DE")
    assert money.unit == "EUR" and money.value == pytest.approx(price("DE").price_per_kwh)
    assert "business" in money.source


def test_unknown_energy_stays_unknown() -> None:
    for energy in (None, Reading(None, 5.0)):
        for told in (footprint(energy, "FR"), bill(energy, "FR")):
            assert told.value is None and told.low is None and told.pedigree is None
            assert "the energy is unknown" in told.notes


def test_old_rows_say_so() -> None:
    row = grid("US-VA")
    assert row.year == 2023
    assert not stale(row, date(2025, 12, 31)) and stale(row, date(2026, 1, 1))
    assert footprint(1.0, row, today=date(2025, 12, 31)).notes == ()
    (note,) = footprint(1.0, row, today=date(2026, 1, 1)).notes
    assert "US-VA is of 2023" in note and "2 years" in note
    assert any("2023" in n for n in bill(1.0, "US-VA", today=date(2026, 1, 1)).notes)


def test_unchecked_rows_say_so() -> None:
    notes = bill(1.0, "CN", today=date(2025, 1, 1)).notes
    assert len(notes) == 1 and "not checked" in notes[0]


def test_hourly_series() -> None:
    day = datetime(2024, 5, 1, tzinfo=timezone.utc)
    t = day.timestamp()
    s = Series((t, t + 3600), (100.0, 300.0), 3600, "gCO2e", "hours.csv")
    r = Reading(3.6e6, 3600.0, low=1.8e6, high=7.2e6, pedigree="modelled")
    a = footprint(r, s, start=t + 1800, pue=2.0)
    assert a.value == pytest.approx(400) and a.low == pytest.approx(200) and not a.notes
    assert a.source == "hours.csv"
    assert footprint(r, s, start=day).value == pytest.approx(100)
    out = footprint(r, s, start=t + 3601)
    assert out.value is None and "outside" in out.notes[0]
    assert footprint(None, s, start=t).value is None
    with pytest.raises(ValueError, match="start"):
        footprint(r, s)
    with pytest.raises(ValueError, match="reading"):
        footprint(3.6e6, s, start=t)


def test_negative_hourly_prices_turn_the_interval() -> None:
    s = Series((0.0,), (-0.1,), 3600, "EUR", "prices.csv")
    b = bill(Reading(3.6e6, 60.0, low=1.8e6, high=7.2e6, pedigree="measured"), s, start=0.0)
    assert b.value == pytest.approx(-0.1) and b.unit == "EUR"
    assert b.low == pytest.approx(-0.2) and b.high == pytest.approx(-0.05)
