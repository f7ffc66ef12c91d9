from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import wall_log
from joulesmith.energy.cpu_time import machine_busy
from joulesmith.energy.power_curve import Curve
from joulesmith.energy.wall_log import Sample, Step
from joulesmith.errors import JoulesmithError


def read(tmp_path: Path, text: str) -> list[Sample]:
    file = tmp_path / "log.csv"
    file.write_text(text)
    return wall_log.read(file)


@pytest.mark.parametrize(
    ("text", "sample"),
    [
        ("time,watts\n1700000000,42.5\n", Sample(42.5, 1.7e9)),
        ("1700000000,42.5\n", Sample(42.5, 1.7e9)),
        ("1700000000000;42.5 W\n", Sample(42.5, 1.7e9)),
        ("2023-11-14T22:13:20Z\t42.5\n", Sample(42.5, 1.7e9)),
        ("# meter 7\nTimestamp,Power (W)\n2023-11-14 22:13:20+00:00,42.5\n", Sample(42.5, 1.7e9)),
        ("load,watts\n0.5,42.5\n", Sample(42.5, None, 0.5)),
        ("watts,CPU %\n42.5,50%\n", Sample(42.5, None, 0.5)),
        ("watts,cpu_percent\n42.5,1\n", Sample(42.5, None, 0.01)),
        ("watts,cpu\n42.5,1\n", Sample(42.5, None, 1.0)),
        ("time,load,power\nlunch,50,42.5\n", Sample(42.5, None, 0.5)),
        ("watts,load\n42.5,0.5\n41.0,0", Sample(42.5, None, 0.5)),
        ("watts,load\n42.5,0.5\n41.0", Sample(42.5, None, 0.5)),
    ],
)
def test_reads_the_usual_forms(tmp_path: Path, text: str, sample: Sample) -> None:
    assert read(tmp_path, text)[0] == sample


def test_local_time_without_a_zone(tmp_path: Path) -> None:
    from datetime import datetime

    got = read(tmp_path, "2024-02-03T04:05:06,7\n")[0].time
    assert got == datetime(2024, 2, 3, 4, 5, 6).timestamp()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("# only words\n\n", "empty"),
        ("watts\n5\n", "lacks a column"),
        ("a,b\n1,2\n", "lacks a column"),
        ("time,watts\n1,5\n2,five\n3,5\n", "line 3"),
        ("time,watts\n1,-5\n", "line 2: not a number of watts"),
        ("time,watts\n1,nan\n", "line 2: not a number of watts"),
        ("time,watts\n1\n2,3\n", "line 2: a column is missing"),
        ("time,watts\nyesterday,3\n", "line 2"),
        ("load,watts\n-1,3\n", "line 2: not a load"),
        ("load,watts\n170,3\n", "above 100 %"),
    ],
)
def test_a_bad_log_is_one_line_that_says_where(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(JoulesmithError, match=why) as e:
        read(tmp_path, text)
    assert "\n" not in str(e.value) and "log.csv" in str(e.value)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(JoulesmithError, match="cannot read the log"):
        wall_log.read(tmp_path / "absent.csv")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JoulesmithError, match="not a text file"):
        wall_log.read(tmp_path / "b")


@given(st.floats(0, 0.6), st.floats(0, 1), st.floats(1, 100), st.floats(2, 900))
def test_ends_and_curve_come_back(jump: float, bend: float, idle: float, more: float) -> None:
    true = Curve(1.0, jump, bend)
    loads = [k / 10 for k in range(11) for _ in range(3)]
    found = wall_log.ends([Sample(idle + more * true(x), None, x) for x in loads])
    assert found.idle_watts == pytest.approx(idle)
    assert found.max_watts == pytest.approx(idle + more)
    assert found.curve is not None and found.samples == len(loads)
    assert all(abs(found.curve(x) - true(x)) < 1e-6 for x in loads)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-2, 2)), max_size=20))
def test_any_points_give_a_curve(points: list[tuple[float, float]]) -> None:
    c = wall_log.fit_curve(points)
    assert 0 <= c(0.3) <= c(0.6) <= 1


def test_few_loads_give_no_curve_and_outliers_do_not_count() -> None:
    ends = [Sample(10, None, 0.0)] * 5 + [Sample(50, None, 1.0)] * 5
    found = wall_log.ends([*ends, Sample(9999, None, 1.0), Sample(30, None, 0.5)])
    assert (found.idle_watts, found.max_watts, found.curve) == (10, 50, None)


@pytest.mark.parametrize(
    ("loads", "watts", "why"),
    [
        ([0.0] * 5, 10.0, "0 samples of full load"),
        ([1.0] * 5, 10.0, "0 samples of idle"),
        ([0.0] * 3 + [1.0] * 3, 10.0, "is it of this machine"),
        ([], 0.0, "0 samples of idle"),
    ],
)
def test_a_log_without_an_end(loads: list[float], watts: float, why: str) -> None:
    with pytest.raises(JoulesmithError, match=why):
        wall_log.ends([Sample(watts, None, x) for x in loads])


def test_samples_are_matched_to_steps() -> None:
    steps = [Step(10, 20, 0.0), Step(30, 40, 0.5)]
    got = wall_log.at_loads([Sample(1, t) for t in (5, 10, 25, 35, None, 41)], steps)
    assert [(s.time, s.load) for s in got] == [(10, 0.0), (35, 0.5)]


def test_stepping_burns_and_ends() -> None:
    said: list[str] = []
    clock = iter(float(k) for k in range(100))
    steps = wall_log.step_load(0.05, 2, lambda: next(clock), said.append)
    assert [s[0] for s in said] == ["0", "1", "2"]
    assert len(steps) == 3 and all(s.begin < s.end and 0 <= s.load <= 1 for s in steps)
    assert all(a.end <= b.begin for a, b in pairwise(steps))


def test_the_burner_burns() -> None:
    before = machine_busy() or math.nan
    wall_log.step_load(0.5, 1, machine_busy)
    assert (machine_busy() or math.nan) > before


def test_a_machine_that_does_not_tell_its_load() -> None:
    with pytest.raises(JoulesmithError, match="load of this machine"):
        wall_log.step_load(0.01, 1, lambda: None)
