from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from joulesmith.energy import calibrate_power, wall_log
from joulesmith.energy.cpus import Cpu
from joulesmith.energy.power_curve import Curve
from joulesmith.errors import JoulesmithError

CPU = Cpu("GenuineIntel", 6, 85, "Intel Xeon", 8, 1, 4, 2, False)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "joulesmith" / "power.json"


def test_stores_loads_and_forgets(home: Path) -> None:
    assert calibrate_power.load() is None and not calibrate_power.forget()
    c = calibrate_power.calibrate(42, 118.5, cpu=CPU)
    assert home.is_file() and [p.name for p in home.parent.iterdir()] == ["power.json"]
    assert calibrate_power.load() == c
    assert (c.idle_watts, c.max_watts, c.curve, c.how) == (42, 118.5, None, "given by hand")
    shown = dict(c.rows())
    assert shown["idle"] == "42 W" and shown["stored in"] == str(home)
    assert calibrate_power.recall(CPU) == (c, "")
    assert calibrate_power.forget() and calibrate_power.load() is None
    assert calibrate_power.recall(CPU) == (None, "")


@pytest.mark.parametrize(
    ("idle", "top"),
    [
        (118, 42),
        (42, 42),
        (-1, 50),
        (0, 50),
        (math.nan, 50),
        (10, math.nan),
        (10, math.inf),
        (10, 1e6),
    ],
)
def test_bad_numbers_change_nothing(home: Path, idle: float, top: float) -> None:
    calibrate_power.calibrate(1, 2, cpu=CPU)
    before = home.read_bytes()
    with pytest.raises(JoulesmithError) as e:
        calibrate_power.calibrate(idle, top, cpu=CPU)
    assert "\n" not in str(e.value) and e.value.exit_code == 2
    assert home.read_bytes() == before


@pytest.mark.parametrize("kw", [{}, {"idle": 4}, {"max": 4}, {"idle": 4, "max": 9, "log": "x"}])
def test_half_or_both_ways_are_refused(kw: dict[str, float]) -> None:
    with pytest.raises(JoulesmithError, match="--idle"):
        calibrate_power.calibrate(**kw, cpu=CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        replace(CPU, name="AMD EPYC"),
        replace(CPU, cpus=16),
        replace(CPU, sockets=2),
    ],
)
def test_a_copied_file_is_noticed(other: Cpu) -> None:
    calibrate_power.calibrate(42, 118, cpu=CPU)
    found, why = calibrate_power.recall(other)
    assert found is None and "another machine" in why


def test_the_same_product_with_another_machine_id(home: Path) -> None:
    calibrate_power.calibrate(42, 118, cpu=CPU)
    d = json.loads(home.read_text())
    here = replace(calibrate_power.machine(CPU), id="aaaa")
    assert "machine id" in calibrate_power.difference(replace(here, id="bbbb"), here)
    assert calibrate_power.difference(replace(here, id=None), here) == ""
    assert d["machine"]["name"] == "Intel Xeon" and "path" not in d


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "\x00",
        "null",
        '{"version": 2}',
        '{"version": 1, "idle_watts": 5}',
        json.dumps({"version": 1, "idle_watts": 9, "max_watts": 5, "machine": {}, "curve": None}),
        json.dumps({"version": 1, "idle_watts": math.nan, "max_watts": 5, "machine": {}}),
    ],
)
def test_a_broken_file_is_one_line_and_never_stops_a_meter(home: Path, text: str) -> None:
    home.parent.mkdir(parents=True)
    home.write_text(text)
    with pytest.raises(JoulesmithError, match="not a calibration") as e:
        calibrate_power.load()
    assert "--forget" in str(e.value) and "\n" not in str(e.value)
    found, why = calibrate_power.recall(CPU)
    assert found is None and "not a calibration" in why
    assert calibrate_power.calibrate(1, 2, cpu=CPU) == calibrate_power.load()


def test_a_folder_in_its_place(home: Path) -> None:
    home.mkdir(parents=True)
    for call in (calibrate_power.load, calibrate_power.forget):
        with pytest.raises(JoulesmithError, match="cannot"):
            call()
    with pytest.raises(JoulesmithError, match="regular file"):
        calibrate_power.calibrate(1, 2, cpu=CPU)
    assert calibrate_power.recall(CPU)[0] is None


def test_a_relative_config_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibrate_power.path() == tmp_path / ".config" / "joulesmith" / "power.json"


def test_a_log_with_loads(tmp_path: Path) -> None:
    log = tmp_path / "meter.csv"
    true = Curve(1.0, jump=0.2, bend=0.3)
    rows = [f"{40 + 80 * true(k / 20)},{k * 5}" for k in range(21) for _ in range(3)]
    log.write_text("watts,load_percent\n" + "\n".join(rows) + "\n")
    c = calibrate_power.calibrate(log=log, cpu=CPU)
    assert (c.idle_watts, c.max_watts) == pytest.approx((40, 120), rel=0.05)
    assert c.curve is not None
    assert all(abs(c.curve(x / 10) - true(x / 10)) < 0.06 for x in range(11))
    assert calibrate_power.load() == c and "log" in c.source


def test_a_log_with_times_is_matched_to_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "meter.csv"
    log.write_text("time,watts\n")
    loads = (0.01, 0.25, 0.5, 0.75, 1.0)
    steps = [wall_log.Step(1e9 + 10 * k, 1e9 + 10 * k + 9, x) for k, x in enumerate(loads)]

    def stepping(*_: object) -> list[wall_log.Step]:
        # The meter writes while the load is stepped; 300 W lies between two steps.
        lines = [f"{s.begin + j},{20 + 80 * s.load}" for s in steps for j in range(1, 5)]
        log.write_text("time,watts\n" + "\n".join([*lines, "1000000009.5,300", "10000000"]))
        return steps

    monkeypatch.setattr(wall_log, "step_load", stepping)
    c = calibrate_power.calibrate(log=log, cpu=CPU)
    assert (c.idle_watts, c.max_watts) == pytest.approx((20.8, 100))
    assert c.curve is not None and c.curve.jump == pytest.approx(0, abs=0.05)
    assert "20 samples" in c.how


def test_a_log_that_misses_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "meter.csv"
    log.write_text("2001-01-01T00:00:00,50\n")
    monkeypatch.setattr(wall_log, "step_load", lambda *_: [wall_log.Step(1, 2, 0.05)])
    with pytest.raises(JoulesmithError, match="falls into the time"):
        calibrate_power.calibrate(log=log, cpu=CPU)
    monkeypatch.setattr(wall_log, "step_load", lambda *_: [wall_log.Step(1, 2, 0.5)])
    with pytest.raises(JoulesmithError, match="50% busy before"):
        calibrate_power.calibrate(log=log, cpu=CPU)
    with pytest.raises(JoulesmithError, match="seconds of a step"):
        calibrate_power.calibrate(log=log, cpu=CPU, step_seconds=0)
    assert calibrate_power.load() is None
