from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.series import Series, read_series
from joulesmith.errors import JoulesmithError

T0 = datetime(2024, 1, 1, tzinfo=timezone.utc).timestamp()
LB = 0.45359237


def read(tmp_path: Path, text: str, **options: str) -> Series:
    file = tmp_path / "s.csv"
    file.write_text(text, encoding="utf-8")
    return read_series(file, **options)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("time,gco2e_per_kwh\n2024-01-01T00:00Z,100\n2024-01-01T01:00Z,200\n", (100, 200)),
        ("time,gCO2/kWh\n2024-01-01T01:00+01:00,100\n2024-01-01T01:00+00:00,200\n", (100, 200)),
        ("datetime_utc,gco2e_per_kwh\n2024-01-01 01:00:00,2\n2024-01-01 00:00:00,1\n", (1, 2)),
        # Electricity Maps' exports, old and new
        (
            "Datetime (UTC),Country,Zone name,Zone id,Carbon intensity gCO₂eq/kWh (direct),"
            "Carbon intensity gCO₂eq/kWh (Life cycle),Carbon-free energy percentage (CFE%)\n"
            "2024-01-01 00:00:00,Germany,Germany,DE,90,120,50\n",
            (120,),
        ),
        (
            "Datetime (UTC),Country,Zone Name,Zone Id,Carbon Intensity gCO₂eq/kWh (direct),"
            "Carbon Intensity gCO₂eq/kWh (LCA),Low Carbon Percentage\n"
            "2024-01-01 00:00:00,Spain,Spain,ES,90,140,50\n",
            (140,),
        ),
        ("datetime,carbonIntensity,zone\n2024-01-01T00:00:00.000Z,77,FR\n", (77,)),
        # WattTime
        ("point_time,value\n2024-01-01T00:00:00+00:00,1000\n", (1000 * LB,)),
        ("timestamp,MOER,MOER version\n2024-01-01T00:00:00+00:00,500,3.0\n", (500 * LB,)),
        ("point_time,units,value\n2024-01-01T00:00Z,lbs_co2_per_mwh,10\n", (10 * LB,)),
        # the British grid operator
        ("from,to,intensity.forecast,intensity.actual\n2024-01-01T00:00Z,x,266,263\n", (263,)),
        ("time,kgCO2/kWh\n2024-01-01T00:00Z,0.25\n", (250,)),
    ],
)
def test_formats(tmp_path: Path, text: str, values: tuple[float, ...]) -> None:
    s = read(tmp_path, text)
    assert s.values == pytest.approx(values) and s.unit == "gCO2e"
    assert s.times == tuple(T0 + 3600 * i for i in range(len(values)))


def test_prices(tmp_path: Path) -> None:
    s = read(tmp_path, "time,Price (EUR/MWhe)\n2024-01-01T00:00Z,-50\n2024-01-01T01:00Z,120\n")
    assert s.unit == "EUR" and s.values == pytest.approx((-0.05, 0.12))
    assert read(tmp_path, "time,price £/kWh\n2024-01-01T00:00Z,0.2\n").unit == "GBP"
    s = read(tmp_path, "time,tariff\n2024-01-01T00:00Z,0.2\n", column="tariff", unit="CHF")
    assert s.unit == "CHF" and s.values == (0.2,)


def test_a_step_function(tmp_path: Path) -> None:
    s = read(tmp_path, "time,gCO2/kWh\n2024-01-01T00:00Z,100\n2024-01-01T01:00Z,300\n")
    assert s.at(T0) == s.at(T0 + 3599.9) == 100 and s.at(T0 + 3600) == s.at(T0 + 7199) == 300
    assert s.at(T0 - 1) is None and s.at(T0 + 7200) is None
    assert s.mean(T0, T0 + 7200) == (200, ())
    assert s.mean(T0 + 2700, T0 + 4500) == (200, ())
    assert s.mean(T0 + 10, T0 + 10) == (100, ())
    for a, b in ((T0 - 1, T0 + 5), (T0, T0 + 7201), (T0 + 9000, T0 + 9001), (T0 - 1, T0 - 1)):
        value, notes = s.mean(a, b)
        assert value is None and "outside of s.csv" in notes[0]
    with pytest.raises(ValueError, match="ends before"):
        s.mean(T0 + 1, T0)


def test_a_gap_is_unknown(tmp_path: Path) -> None:
    s = read(
        tmp_path,
        "time,gCO2/kWh\n2024-01-01T00:00Z,100\n2024-01-01T01:00Z,\n2024-01-01T02:00Z,300\n"
        "2024-01-01T03:00Z,300\n",
    )
    # The step is told by the median, an hour at least.
    assert s.hold == 5400 and s.at(T0 + 5399) == 100 and s.at(T0 + 5400) is None
    value, notes = s.mean(T0, T0 + 7200)
    assert value is None and "a gap" in notes[0]
    assert s.mean(T0 + 7200, T0 + 7300)[0] == 300


def test_half_hours_and_hours_in_one_file(tmp_path: Path) -> None:
    s = read(
        tmp_path,
        "time,gCO2/kWh\n2024-01-01T00:00Z,1\n2024-01-01T01:00Z,2\n2024-01-01T01:30Z,3\n"
        "2024-01-01T02:00Z,4\n",
    )
    assert s.mean(T0, T0 + 9000)[0] == pytest.approx((2 * 1 + 2 + 3 + 4) / 5)
    assert s.at(T0 + 9001) is None  # the last holds as long as the one before it


def test_energy_along_the_series() -> None:
    s = Series((0.0, 3600.0), (100.0, 300.0), 3600.0, "gCO2e", "x")
    curve = [(0.0, 0.0), (1800.0, 3.6e6), (3600.0, 3.6e6), (7200.0, 7.2e6)]
    assert s.weighted(curve)[0] == pytest.approx(100 + 300)
    # Nothing is spent outside of the series: nothing is unknown.
    assert s.weighted([(-9.0, 5.0), (0.0, 5.0), (3600.0, 3.6e6 + 5)])[0] == pytest.approx(100)
    value, notes = s.weighted([(7000.0, 0.0), (8000.0, 1.0)])
    assert value is None and "outside" in notes[0]
    for bad in ([(0.0, 1.0), (1.0, 0.0)], [(1.0, 0.0), (0.0, 1.0)]):
        with pytest.raises(ValueError, match="fall"):
            s.weighted(bad)


def test_zones(tmp_path: Path) -> None:
    text = "time,zone,gCO2/kWh\n2024-01-01T00:00Z,DE,1\n2024-01-01T00:00Z,FR,2\n"
    assert read(tmp_path, text, zone="FR").values == (2,)
    with pytest.raises(JoulesmithError, match="2 zones"):
        read(tmp_path, text)
    with pytest.raises(JoulesmithError, match="no zone 'XX'"):
        read(tmp_path, text, zone="XX")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("time,gCO2/kWh\n", "no values"),
        ("hour,gCO2/kWh\n1,2\n", "no column of times"),
        ("time,load\n2024-01-01T00:00Z,5\n", "no column of values"),
        ("time,value\n2024-01-01T00:00Z,5\n", "no column of values"),
        ("time,price\n2024-01-01T00:00Z,5\n", "no column of values"),
        ("time,gCO2/kWh\n2024-01-01T00:00,5\n", "line 2: a time without UTC offset"),
        ("time,gCO2/kWh\nyesterday,5\n", "line 2: not an ISO 8601"),
        ("time,gCO2/kWh\n2024-01-01T00:00Z,much\n", "line 2: not a value"),
        ("time,gCO2/kWh\n2024-01-01T00:00Z,nan\n", "line 2: not a value"),
        ("time,gCO2/kWh\n2024-01-01T00:00Z,-5\n", "line 2: not a value"),
        ("time,gCO2/kWh\n2024-01-01T00:00Z\n", "line 2: too few"),
        ("time,gCO2/kWh\n2024-01-01T00:00Z,5\n2024-01-01T01:00+01:00,6\n", "two values"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(JoulesmithError, match=says) as e:
        read(tmp_path, text)
    assert "s.csv" in str(e.value) and "\n" not in str(e.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match="cannot read"):
        read_series(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(JoulesmithError, match="not a text file"):
        read_series(tmp_path / "b.csv")
    with pytest.raises(JoulesmithError, match="no column 'x'"):
        read(tmp_path, "time,y\n2024-01-01T00:00Z,1\n", column="x")


@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=30),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(0, 1000),
)
def test_means_add_up(values: list[float], a: int, b: int, c: int) -> None:
    n = len(values)
    s = Series(tuple(60.0 * i for i in range(n)), tuple(values), 60.0, "gCO2e", "x")
    x, y, z = sorted(60.0 * n * f / 1000 for f in (a, b, c))
    parts = [s.mean(p, q)[0] for p, q in ((x, y), (y, z), (x, z)) if q < 60.0 * n]
    if len(parts) < 3:
        return
    left, right, whole = (p or 0.0 for p in parts)
    assert whole * (z - x) == pytest.approx(left * (y - x) + right * (z - y), abs=1e-6)
    # An independent way: the integral as a sum over cells.
    brute = math.fsum(
        v * max(0.0, min(z, 60.0 * (i + 1)) - max(x, 60.0 * i)) for i, v in enumerate(values)
    )
    assert whole * (z - x) == pytest.approx(brute, abs=1e-6)
    assert min(values) - 1e-9 <= whole <= max(values) + 1e-9
