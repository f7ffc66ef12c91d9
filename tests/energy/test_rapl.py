from __future__ import annotations

import builtins
import time
from pathlib import Path

import pytest
from fake_counters import MAX_UJ, zone
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.rapl import Rapl, Zone
from joulesmith.energy.source import Tally


def joules(r: Rapl, now: float | None = None) -> dict[str, float]:
    return {name: count.joules for name, count in r.read(now).items()}


def test_nothing_there_is_quiet(tmp_path: Path) -> None:
    r = Rapl(tmp_path / "absent")
    assert r.zones == () and r.notes == [] and r.read() == {}


@pytest.mark.parametrize("nested", [False, True])
def test_two_sockets_dram_added_core_shown_psys_not(tmp_path: Path, nested: bool) -> None:
    base = tmp_path / "intel-rapl" if nested else tmp_path
    files = {}
    for k in (0, 1):
        top = base / f"intel-rapl:{k}"
        files[f"package-{k}"] = zone(top, f"package-{k}", 100)
        inside = top if nested else tmp_path
        files[f"core-{k}"] = zone(inside / f"intel-rapl:{k}:0", "core", 100)
        files[f"uncore-{k}"] = zone(inside / f"intel-rapl:{k}:1", "uncore", 100)
        files[f"dram-{k}"] = zone(inside / f"intel-rapl:{k}:2", "dram", 100)
    zone(base / "intel-rapl:2", "psys", 100)
    r = Rapl(tmp_path)
    assert {z.name: z.within for z in r.zones} == {
        **{f"package-{k}": None for k in (0, 1)},
        **{f"dram-{k}": None for k in (0, 1)},
        **{f"core-{k}": f"package-{k}" for k in (0, 1)},
        **{f"uncore-{k}": f"package-{k}" for k in (0, 1)},
    }
    assert [d.name for d in r.devices if d.cpu] == ["package-0", "package-1"]
    for i, f in enumerate(files.values()):
        f.write_text(str(100 + (i + 1) * 1_000_000))
    got = joules(r)
    assert {n: got[n] for n in files} == pytest.approx(
        {n: float(i + 1) for i, n in enumerate(files)}
    )


def test_psys_alone_is_used(tmp_path: Path) -> None:
    f = zone(tmp_path / "intel-rapl:0", "psys", 0)
    r = Rapl(tmp_path)
    f.write_text("2500000")
    assert joules(r) == pytest.approx({"psys": 2.5})


def test_memory_mapped_view_is_not_counted_twice(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 0)
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 0)
    assert len(Rapl(tmp_path).zones) == 1


def test_memory_mapped_view_alone_is_used(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 0)
    assert [z.name for z in Rapl(tmp_path).zones] == ["package-0"]


def test_wraparound(tmp_path: Path) -> None:
    f = zone(tmp_path / "intel-rapl:0", "package-0", MAX_UJ - 1_000_000)
    r = Rapl(tmp_path)
    f.write_text("500000")
    assert joules(r)["package-0"] == pytest.approx(1.5)
    f.write_text("700000")
    assert joules(r)["package-0"] == pytest.approx(1.7)


@given(st.lists(st.integers(0, MAX_UJ), min_size=1, max_size=20))
def test_cumulative_joules_equal_the_steps_modulo_the_range(values: list[int]) -> None:
    """Against a second way of counting: each step is taken modulo the range."""
    left = iter(values)

    class Scripted(Rapl):
        def _counter(self, zone: Zone) -> int | None:
            return next(left)

    r = Scripted(Path("/nonexistent"))
    r.zones = (Zone("package-0", Path("x"), MAX_UJ),)
    r._tallies = {"package-0": Tally("x", 0.0, 0.0, limit=5000, turn=MAX_UJ * 1e-6, notes=r.notes)}
    # A minute apart, so that any step within the range is a believable one.
    seen = [joules(r, 60.0 * k)["package-0"] for k in range(1, len(values) + 1)]
    steps = [(b - a) % MAX_UJ for a, b in zip([0, *values], values, strict=False)]
    # A full turn and no move look alike modulo the range; both ends are allowed values.
    total = 0.0
    for (a, b), s, got in zip(zip([0, *values], values, strict=False), steps, seen, strict=True):
        total += (MAX_UJ if (a == 0 and b == MAX_UJ) else s) * 1e-6
        assert got == pytest.approx(total, rel=1e-9, abs=1e-6)
    assert seen == sorted(seen) and seen[0] >= 0


def test_without_a_range_a_smaller_value_is_a_fresh_start(tmp_path: Path) -> None:
    f = zone(tmp_path / "intel-rapl:0", "package-0", 9_000_000, range_uj="garbage")
    r = Rapl(tmp_path)
    f.write_text("1000000")
    assert joules(r)["package-0"] == pytest.approx(1.0)


def test_unreadable_counter_says_which_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 5)
    real = builtins.open

    def refuse(file, *a, **k):  # type: ignore[no-untyped-def]
        if str(file).endswith("energy_uj") and "max" not in str(file):
            raise PermissionError(13, "Permission denied")
        return real(file, *a, **k)

    monkeypatch.setattr(builtins, "open", refuse)
    r = Rapl(tmp_path)
    assert r.zones == ()
    assert len(r.notes) == 1 and "sudo chmod a+r" in r.notes[0] and "not readable" in r.notes[0]


@pytest.mark.parametrize("junk", ["", "x", "-5", "1.5", "\x00\xff", str(MAX_UJ * 9)])
def test_garbage_is_a_note_never_a_joule(tmp_path: Path, junk: str) -> None:
    f = zone(tmp_path / "intel-rapl:0", "package-0", 5)
    r = Rapl(tmp_path)
    f.write_text(junk)
    assert r.read() == {} and len(r.notes) == 1
    f.write_text("1000005")  # it comes back: nothing was lost
    assert joules(r)["package-0"] == pytest.approx(1.0)


def test_vanishing_file(tmp_path: Path) -> None:
    f = zone(tmp_path / "intel-rapl:0", "package-0", 5)
    r = Rapl(tmp_path)
    f.unlink()
    assert r.read() == {} and "cannot read" in r.notes[0]


def test_dies_of_a_package_are_counted_once_each(tmp_path: Path) -> None:
    for k, die in enumerate((0, 1)):
        zone(tmp_path / f"intel-rapl:{k}", f"package-0-die-{die}", 0)
        zone(tmp_path / f"intel-rapl:{k}:0", "dram", 0)
    r = Rapl(tmp_path)
    assert [z.name for z in r.zones if z.within is None] == [
        "package-0-die-0",
        "dram-0-die-0",
        "package-0-die-1",
        "dram-0-die-1",
    ]


def test_dies_beside_their_whole_package_are_within_it(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 0)
    zone(tmp_path / "intel-rapl:1", "package-0-die-0", 0)
    assert [(z.name, z.within) for z in Rapl(tmp_path).zones] == [
        ("package-0", None),
        ("package-0-die-0", "package-0"),
    ]


def test_one_counter_seen_twice_is_counted_once(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 123_000_000)
    zone(tmp_path / "intel-rapl:1", "package-0", 123_000_400)
    zone(tmp_path / "intel-rapl:2", "package-0", 999_000_000)
    r = Rapl(tmp_path)
    assert [z.name for z in r.zones] == ["package-0", "package-0-2"]
    assert any("repeats package-0" in n for n in r.notes)


@pytest.mark.parametrize("value", [900_000_000, 90_000_000_000])
def test_a_jump_is_no_energy_and_widens_upwards(tmp_path: Path, value: int) -> None:
    """Back by 100 J, which would be a turn within a second; or ahead by 89 kJ."""
    f = zone(tmp_path / "intel-rapl:0", "package-0", 1_000_000_000)
    r = Rapl(tmp_path)
    start = time.perf_counter()
    f.write_text("1020000000")
    r.read(start + 1)
    f.write_text(str(value))
    count = r.read(start + 2)["package-0"]
    assert count.joules == pytest.approx(20) and count.missing == pytest.approx(40, rel=0.1)
    assert "went back" in r.notes[0] or "jumped" in r.notes[0]
    f.write_text(str(value + 5_000_000))
    assert joules(r, start + 3)["package-0"] == pytest.approx(25)


def test_a_long_silence_may_hide_a_turn(tmp_path: Path) -> None:
    f = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    r = Rapl(tmp_path)
    f.write_text("5000000")
    count = r.read(time.perf_counter() + 3600)["package-0"]
    assert count.joules == pytest.approx(5) and count.missing == pytest.approx(MAX_UJ * 1e-6)
    assert "a turn of the counter may be missing" in r.notes[0]


def test_half_of_the_packages_does_not_pass_for_all(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 1)
    zone(tmp_path / "intel-rapl:1", "package-1", "garbage")
    r = Rapl(tmp_path)
    assert r.zones == () and "package-1 cannot be read" in r.notes[-1]
    zone(tmp_path / "intel-rapl:2", "psys", 1)
    assert [z.name for z in Rapl(tmp_path).zones] == ["psys"]
