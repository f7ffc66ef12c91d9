from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import cost, emission, grid, price
from joulesmith.energy.carbon import grids, prices
from joulesmith.errors import JoulesmithError


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


@pytest.mark.parametrize("code", ["FRA", "germny", "", "??", "Atlantis"])
def test_unknown_code_is_one_line_with_near_matches(code: str) -> None:
    for look in (grid, price):
        with pytest.raises(JoulesmithError) as e:
            look(code)
        assert "\n" not in str(e.value) and "did you mean" in str(e.value)


def test_near_matches_name_the_country() -> None:
    with pytest.raises(JoulesmithError, match=r"DE \(Germany\)"):
        grid("germny")
    with pytest.raises(JoulesmithError, match=r"FR \(France\)"):
        emission(1.0, "FRA")


@pytest.mark.parametrize("pue", [0.9, float("nan"), float("inf")])
def test_pue_below_one_is_refused(pue: float) -> None:
    with pytest.raises(ValueError, match="pue"):
        emission(1.0, "FR", pue)
    with pytest.raises(ValueError, match="pue"):
        cost(1.0, "FR", pue)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_joules_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="joules"):
        emission(bad)
    with pytest.raises(ValueError, match="joules"):
        cost(bad)


@given(st.floats(0, 1e15), st.floats(1, 3))
def test_emission_is_linear_and_never_negative(joules: float, pue: float) -> None:
    one = emission(joules, "WORLD", pue)
    assert one >= 0 and emission(2 * joules, "WORLD", pue) == pytest.approx(2 * one)


def test_tables_are_whole() -> None:
    assert len(grids()) > 50 and len(prices()) > 25
    for code, g in grids().items():
        assert code == g.code == code.upper() and g.source and g.basis in ("lifecycle", "direct")
        assert 0 < g.gco2e_per_kwh < 1200 and 2020 <= g.year <= 2026
    for code, p in prices().items():
        assert code == p.code and len(p.currency) == 3 and p.kind in ("industrial", "household")
        assert p.price_per_kwh > 0 and p.source
        assert code in grids()
