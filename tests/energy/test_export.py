from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.energy.carbon import footprint, grid
from joulesmith.energy.export import (
    CODECARBON_COLUMNS,
    READING_COLUMNS,
    CsvLines,
    JsonLines,
    codecarbon_row,
    reading_row,
)
from joulesmith.energy.reading import Part, Reading
from joulesmith.errors import JoulesmithError

PARTS = (
    Part("package-0", 3.6e5, 3e5, 4e5, "measured", "RAPL"),
    Part("package-1", 3.6e5, 3e5, 4e5, "measured", "RAPL"),
    Part("dram-0", 3.6e4, 3e4, 4e4, "measured", "RAPL"),
    Part("core-0", 1.8e5, 1e5, 2e5, "measured", "RAPL", within="package-0"),
    Part("gpu0", None, None, None, None, "NVML"),
)
READING = Reading(7.56e5, 100.0, 6e5, 9e5, "measured", None, 5.0, PARTS, ('a, "b"\nc',))
CELL = st.one_of(
    st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


# ---- files of lines


def test_json_lines_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "r.jsonl"
    for fsync in (False, True):
        with JsonLines(path, fsync=fsync) as out:
            out.append(reading_row(READING, "train"))
            out.append({"x": math.nan, "y": [math.inf, 1], "z": Path("p"), "ü": "é\n"})
    lines = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4 and tuple(lines[0]) == READING_COLUMNS
    assert lines[0]["parts"]["gpu0"] is None and lines[0]["notes"] == ['a, "b"\nc']
    assert lines[1] == {"x": None, "y": [None, 1], "z": "p", "ü": "é\n"}


def test_csv_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    for _ in range(2):
        with CsvLines(path, READING_COLUMNS) as out:
            out.append(reading_row(READING, "train"))
    rows = rows_of(path)
    assert len(rows) == 2 and rows[0] == {**rows[1], "time": rows[0]["time"]}
    assert float(rows[0]["joules"]) == 7.56e5 and rows[0]["marginal"] == ""
    assert json.loads(rows[0]["notes"]) == ['a, "b"\nc']


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5), cut=st.integers(1, 60))
def test_a_torn_end_costs_only_the_torn_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, Any]], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    for kind in ("csv", "jsonl"):
        path = folder / f"x.{kind}"

        def make(path: Path = path, kind: str = kind) -> Any:
            return CsvLines(path, ("a", "b")) if kind == "csv" else JsonLines(path)

        sizes = []
        with make() as out:
            sizes.append(path.stat().st_size)
            for a, b in rows:
                out.append({"a": a, "b": b})
                sizes.append(path.stat().st_size)
        whole = path.read_bytes()
        keep = max(0, len(whole) - cut)
        path.write_bytes(whole[:keep])
        with make() as out:
            out.append({"a": "last", "b": None})
        data = path.read_bytes()
        full = [s for s in sizes if s <= keep]
        # JSON that lacks only its line end is whole.
        if kind == "jsonl" and keep + 1 in sizes:
            full.append(keep + 1)
        good = whole[: max(full, default=0)] or (b"a,b\n" if kind == "csv" else b"")
        assert data.startswith(good) and data.count(b"last") >= 1
        assert data[len(good) :] in (b"last,\n", b'{"a":"last","b":null}\n')
        assert bool(out.notes) == (keep not in (0, *sizes))


def test_zeros_of_a_power_cut_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a":1}\n' + b"\0" * 500)
    with JsonLines(path) as out:
        out.append({"a": 2})
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n' and "torn" in out.notes[0]


def test_a_disk_that_fills_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path, real, calls = tmp_path / "x.jsonl", os.write, [0]

    def half(handle: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(28, "No space left on device")
        return real(handle, data[:5])

    with JsonLines(path) as out:
        out.append({"a": 1})
        with monkeypatch.context() as m:
            m.setattr("os.write", half)
            with pytest.raises(JoulesmithError, match="No space left"):
                out.append({"a": 2})
        out.append({"a": 3})
    assert path.read_bytes() == b'{"a":1}\n{"a":3}\n'


def test_bad_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path, tmp_path / "file" / "below.csv"):
        with pytest.raises(JoulesmithError, match="cannot write") as e:
            JsonLines(bad)
        assert "\n" not in str(e.value)


def test_closed_files_and_strange_columns(tmp_path: Path) -> None:
    out = CsvLines(tmp_path / "x.csv", ("a", "b"))
    with pytest.raises(ValueError, match="no column 'c'"):
        out.append({"c": 1})
    out.close()
    out.close()
    with pytest.raises(ValueError, match="closed"):
        out.append({"a": 1})
    before = (tmp_path / "x.csv").read_bytes()
    with pytest.raises(JoulesmithError, match=r"other columns.*'a'"):
        CsvLines(tmp_path / "x.csv", ("b", "c"))
    assert (tmp_path / "x.csv").read_bytes() == before
    with CsvLines(tmp_path / "x.csv", ("b", "a")) as out:
        out.append({"b": 2, "a": 1})  # the file's order is kept
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,2\n"


# ---- CodeCarbon


def test_codecarbon_row(tmp_path: Path) -> None:
    amount = footprint(READING, "FR", pue=1.5)
    row = codecarbon_row(
        READING, emissions=amount, grid=grid("FR"), pue=1.5, project="p", gpu_model="H100"
    )
    assert tuple(row) == CODECARBON_COLUMNS
    assert row["energy_consumed"] == pytest.approx(0.21 * 1.5)
    assert row["cpu_energy"] == pytest.approx(0.2 * 1.5)
    assert row["ram_energy"] == pytest.approx(0.01 * 1.5)
    assert row["cpu_power"] == pytest.approx(7200 * 1.5) and row["gpu_energy"] is None
    assert row["emissions"] == pytest.approx(0.21 * 1.5 * grid("FR").gco2e_per_kwh / 1e3)
    assert row["emissions_rate"] == pytest.approx(row["emissions"] / 100)
    assert row["country_iso_code"] == "FRA" and row["region"] is None and row["gpu_count"] == 1
    assert row["codecarbon_version"] is None and row["gpu_model"] == "H100"
    path = tmp_path / "emissions.csv"
    with CsvLines(path, CODECARBON_COLUMNS) as out:
        out.append(row)
    (back,) = rows_of(path)
    assert float(back["energy_consumed"]) == row["energy_consumed"] and back["gpu_energy"] == ""


def test_codecarbon_of_a_region_and_of_unknown_energy() -> None:
    row = codecarbon_row(Reading(None, 3.0), emissions=footprint(None, "US-CA"), grid=grid("US-CA"))
    assert row["emissions"] is None and row["emissions_rate"] is None
    assert row["energy_consumed"] is None and row["cpu_energy"] is None
    assert row["country_name"] == "United States" and row["region"] == "california"
    assert codecarbon_row(READING, grid=grid(300))["country_name"] is None
    with pytest.raises(ValueError, match="not a column"):
        codecarbon_row(READING, watts=3)
    with pytest.raises(ValueError, match="pue"):
        codecarbon_row(READING, pue=0.5)


def test_a_file_that_an_older_codecarbon_began(tmp_path: Path) -> None:
    # The header of its version 2.4.
    old = (
        "timestamp,project_name,run_id,duration,emissions,emissions_rate,cpu_power,gpu_power,"
        "ram_power,cpu_energy,gpu_energy,ram_energy,energy_consumed,country_name,"
        "country_iso_code,region,cloud_provider,cloud_region,os,python_version,"
        "codecarbon_version,cpu_count,cpu_model,gpu_count,gpu_model,longitude,latitude,"
        "ram_total_size,tracking_mode,on_cloud,pue\n"
    )
    path = tmp_path / "emissions.csv"
    path.write_text(old + "2024-05-27T11:31:35,old,1," + "," * 27 + "1.0\n")
    with CsvLines(path, CODECARBON_COLUMNS) as out:
        out.append(codecarbon_row(READING, project="new"))
    first, second = rows_of(path)
    assert path.read_text().startswith(old) and first["pue"] == "1.0"
    assert second["project_name"] == "new" and float(second["energy_consumed"]) == 0.21
