from __future__ import annotations

from pathlib import Path

import pytest

from joulesmith.energy.battery import Battery


def supply(root: Path, name: str = "BAT0", **files: object) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    for file, value in {"type": "Battery", "status": "Discharging", **files}.items():
        (folder / file).write_text(f"{value}\n")
    return folder


def joules(b: Battery, now: float) -> float | None:
    count = b.read(now).get("battery")
    return None if count is None else count.joules


def test_no_battery_is_quiet(tmp_path: Path) -> None:
    b = Battery(tmp_path / "none")
    assert b.devices == () and b.read(0.0) == {} and b.notes == []
    supply(tmp_path, "mouse", scope="Device", power_now=1_000_000)
    supply(tmp_path, "empty")
    assert Battery(tmp_path).devices == ()


@pytest.mark.parametrize("sign", [1, -1])
def test_power_is_integrated(tmp_path: Path, sign: int) -> None:
    supply(tmp_path, power_now=sign * 10_000_000)
    b = Battery(tmp_path)
    assert b.by_power and b.samples and b.discharging
    assert joules(b, 0.0) == 0.0
    supply(tmp_path, power_now=sign * 20_000_000)
    assert joules(b, 4.0) == pytest.approx(60.0)


def test_current_times_voltage(tmp_path: Path) -> None:
    supply(tmp_path, current_now=-2_000_000, voltage_now=11_500_000)
    b = Battery(tmp_path)
    joules(b, 0.0)
    assert joules(b, 2.0) == pytest.approx(46.0)


def test_two_batteries_add(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", power_now=10_000_000)
    supply(tmp_path, "BAT1", status="Not charging", power_now=0)
    b = Battery(tmp_path)
    joules(b, 0.0)
    assert joules(b, 1.0) == pytest.approx(10.0)
    supply(tmp_path, "BAT1", status="Charging")
    assert joules(b, 2.0) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"energy_now": 50_000_000}, {"energy_now": 49_990_000}),  # 10 mWh
        (
            {"charge_now": 5_000_000, "voltage_now": 12_000_000},
            {"charge_now": 4_999_167, "voltage_now": 12_000_000},
        ),
    ],
)
def test_stored_energy_where_power_is_not_told(
    tmp_path: Path, before: dict[str, int], after: dict[str, int]
) -> None:
    supply(tmp_path, power_now=0, **before)  # some firmware says 0 W while it discharges
    b = Battery(tmp_path)
    assert not b.by_power and not b.samples
    assert joules(b, 0.0) == 0.0
    supply(tmp_path, **after)
    assert joules(b, 9.0) == pytest.approx(36.0, rel=1e-3)


def test_stored_energy_that_rises_is_another_epoch(tmp_path: Path) -> None:
    supply(tmp_path, energy_now=50_000_000)
    b = Battery(tmp_path)
    first = b.read(0.0)["battery"]
    supply(tmp_path, energy_now=51_000_000)
    second = b.read(1.0)["battery"]
    assert second.joules == 0.0 and second.epoch > first.epoch and "rose" in b.notes[0]


@pytest.mark.parametrize("status", ["Charging", "Full", "Unknown", "Not charging"])
@pytest.mark.parametrize("files", [{"power_now": 10_000_000}, {"energy_now": 5_000_000}])
def test_on_mains_it_says_nothing_and_breaks_the_count(
    tmp_path: Path, status: str, files: dict[str, int]
) -> None:
    supply(tmp_path, **files)
    b = Battery(tmp_path)
    first = b.read(0.0)["battery"]
    supply(tmp_path, status=status)
    assert b.read(1.0) == {}
    supply(tmp_path, status="Discharging")
    assert b.read(2.0)["battery"].epoch > first.epoch


def test_a_charger_that_is_too_weak_hides_the_draw(tmp_path: Path) -> None:
    supply(tmp_path, power_now=10_000_000)
    b = Battery(tmp_path)
    supply(tmp_path, "AC", type="Mains", online=1)
    assert not b.discharging and b.read(0.0) == {}


@pytest.mark.parametrize("junk", ["", "x", "0", "99999999999999", "\x00"])
def test_garbage_is_unknown(tmp_path: Path, junk: str) -> None:
    supply(tmp_path, power_now=10_000_000)
    b = Battery(tmp_path)
    supply(tmp_path, power_now=junk)
    assert b.read(0.0) == {} and len(b.notes) == 1
