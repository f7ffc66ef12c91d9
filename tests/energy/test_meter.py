from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
from fake_counters import MAX_UJ, FakeBoard, FakeNvml, zone
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import EnergyMeter, Reading
from joulesmith.energy import meter as meter_module
from joulesmith.energy.cpu_power import CpuPower
from joulesmith.energy.cpu_time import ProcessTree
from joulesmith.energy.parts import Snapshot, add_up, measured
from joulesmith.energy.reading import Part
from joulesmith.energy.source import Count, Device
from joulesmith.errors import JoulesmithError

MODEL = CpuPower("test CPU", 4, 10.0, 50.0, 2.0, 0.6, 0.5, 1.5, "test CPU")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for k in (
        "CUDA_VISIBLE_DEVICES",
        "JOULESMITH_IDLE_WATTS",
        "JOULESMITH_MAX_WATTS",
        "JOULESMITH_METER",
    ):
        monkeypatch.delenv(k, raising=False)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time, own CPU seconds and the machine's busy CPU seconds, all set by the test."""
    state = [0.0, 0.0, 0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: state[0])
    monkeypatch.setattr(EnergyMeter, "_cpu", lambda self: state[1])
    monkeypatch.setattr(meter_module, "machine_busy", lambda: state[2])
    return state


def modelled(tmp_path: Path, **k: object) -> EnergyMeter:
    return EnergyMeter(rapl_root=tmp_path / "none", nvml=FakeNvml(), cpu_model=MODEL, **k)  # type: ignore[arg-type]


def sound(r: Reading) -> None:
    if r.joules is None:
        assert r.low is None and r.high is None and r.pedigree is None
        return
    assert r.low is not None and r.high is not None
    assert 0 <= r.low <= r.joules <= r.high
    assert r.marginal is None or 0 <= r.marginal <= r.joules


def test_modelled_window_equals_the_formula(tmp_path: Path, now: list[float]) -> None:
    m = modelled(tmp_path)
    with m.window("w") as w:
        now[:] = [10.0, 20.0, 20.0]  # half of 4 CPUs for 10 s, nobody else
    r = w.reading
    cpu = 10 * (10 + 40 * 0.5**0.6)
    assert r.joules == pytest.approx(cpu + 20)
    assert r.marginal == pytest.approx(10 * 40 * 0.5**0.6)
    assert (r.seconds, r.cpu_seconds, r.pedigree) == (10.0, 20.0, "modelled")
    assert [p.device for p in r.parts] == ["cpu", "dram"]
    assert m.readings == {"w": [r]}
    assert (m.idle_watts, m.max_watts) == (12.0, 52.0)
    assert m.total.joules == pytest.approx(r.joules)
    sound(r)


def test_others_are_left_out(tmp_path: Path, now: list[float]) -> None:
    m = modelled(tmp_path)
    with m.window("w") as w:
        now[:] = [10.0, 10.0, 30.0]  # ours a quarter of the machine, others a half
    r = w.reading
    assert r.marginal == pytest.approx(10 * 40 * 0.75**0.6 / 3)
    assert r.joules == pytest.approx((r.marginal or 0) + 10 * 12 * 0.5)
    assert any("50% of the CPU time" in n for n in r.notes)


def test_right_after_other_processes_are_watched_others_are_no_guess(
    tmp_path: Path, now: list[float]
) -> None:
    m = modelled(tmp_path)
    with m.window("before"):
        now[:] = [10.0, 10.0, 10.0]
    m.watch(ProcessTree())
    now[1] = 0.0  # what these have taken so far
    with m.window("w") as w:
        now[:] = [10.5, 0.5, 10.5]
    assert w.reading.marginal and not any("other processes" in n for n in w.reading.notes)


def test_nested_and_overlapping_windows(tmp_path: Path, now: list[float]) -> None:
    m = modelled(tmp_path)
    a, b = m.window("a"), m.window("b")
    a.__enter__()
    now[:] = [5.0, 5.0, 5.0]
    b.__enter__()
    with m.window("inner") as c:
        now[:] = [8.0, 8.0, 8.0]
    a.__exit__(None, None, None)
    now[:] = [10.0, 10.0, 10.0]
    b.__exit__(None, None, None)
    assert [x.reading.seconds for x in (a, b, c)] == [8.0, 5.0, 3.0]
    joules = [x.reading.joules or 0.0 for x in (a, b, c)]
    assert joules[0] > joules[1] > joules[2] > 0
    assert list(m.readings) == ["inner", "a", "b"]


def test_unknown_cpu_time_is_unknown_energy(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EnergyMeter, "_cpu", lambda self: None)
    with modelled(tmp_path).window("w") as w:
        now[0] = 1.0
    r = w.reading
    assert r.joules is None and r.marginal is None and r.cpu_seconds is None
    assert any("unknown" in n for n in r.notes)


def rapl(tmp_path: Path) -> dict[str, Path]:
    top = tmp_path / "intel-rapl:0"
    return {
        "package": zone(top, "package-0", MAX_UJ - 4_000_000),
        "dram": zone(tmp_path / "intel-rapl:0:0", "dram", 0),
    }


def test_rapl_beats_the_model(tmp_path: Path, now: list[float]) -> None:
    f = rapl(tmp_path)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL)
    with m.window("w") as w:
        now[:] = [2.0, 4.0, 6.0]
        f["package"].write_text("26000000")
        f["dram"].write_text("5000000")
    r = w.reading
    assert r.joules == pytest.approx(35.0) and r.pedigree == "measured"
    assert {p.device: p.joules for p in r.parts} == pytest.approx({"package-0": 30, "dram-0": 5})
    assert r.marginal is None and m.idle_watts is None and m.max_watts is None
    assert "RAPL" in m.source
    assert any("other processes" in n for n in r.notes)
    sound(r)


def test_measured_idle_gives_the_marginal(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    f = rapl(tmp_path)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL)

    def rest(seconds: float) -> None:
        now[0] += seconds
        f["package"].write_text(str(16_000_000))  # 20 J
        f["dram"].write_text(str(2_000_000))  # 2 J

    monkeypatch.setattr(meter_module.time, "sleep", rest)
    m.measure_idle(2.0)
    assert m.idle_watts == pytest.approx(11.0)
    with m.window("w") as w:
        now[0] += 1.0
        f["package"].write_text(str(46_000_000))
        f["dram"].write_text(str(5_000_000))
    assert w.reading.joules == pytest.approx(33.0)
    assert w.reading.marginal == pytest.approx(22.0)


def test_package_vanishing_mid_window_is_modelled(tmp_path: Path, now: list[float]) -> None:
    f = rapl(tmp_path)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL)
    with m.window("w") as w:
        now[0] = 1.0
        f["dram"].write_text("1000000")
        f["package"].unlink()
    r = w.reading
    assert r.joules == pytest.approx(12.0) and r.pedigree == "modelled"
    assert [p.device for p in r.parts] == ["cpu", "dram"]
    assert "package-0: unknown in this window: modelled instead" in r.notes
    zone(tmp_path / "intel-rapl:0", "package-0", MAX_UJ - 4_000_000)
    with m.window("w") as w:
        now[0] = 2.0
        f["package"].write_text(str(MAX_UJ - 1_000_000))
        f["dram"].unlink()
    r = w.reading
    assert r.joules == pytest.approx(3.0) and r.pedigree == "measured"
    assert {p.device: p.joules for p in r.parts} == {"package-0": r.joules, "dram-0": None}
    assert any(n.startswith("dram-0: unknown") for n in r.notes)


def test_unreadable_rapl_is_modelled_with_the_reason(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    rapl(tmp_path)
    real = builtins.open

    def refuse(file, *a, **k):  # type: ignore[no-untyped-def]
        if str(file).endswith("/energy_uj"):
            raise PermissionError(13, "Permission denied")
        return real(file, *a, **k)

    monkeypatch.setattr(builtins, "open", refuse)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL)
    with m.window("w") as w:
        now[:] = [1.0, 1.0, 1.0]
    assert w.reading.pedigree == "modelled"
    assert any("sudo chmod a+r" in n for n in w.reading.notes)


@pytest.mark.parametrize("seconds", [0.0005, 10.0])
def test_a_counter_that_has_not_moved_is_not_zero(
    tmp_path: Path, now: list[float], seconds: float
) -> None:
    rapl(tmp_path)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL)
    with m.window("w") as w:
        now[0] = seconds
    assert w.reading.joules == pytest.approx(12 * seconds) and w.reading.pedigree == "modelled"
    assert any("stands still" in n for n in w.reading.notes) == (seconds > 1)


def test_cores_are_shown_within_their_package(tmp_path: Path, now: list[float]) -> None:
    f = rapl(tmp_path)
    core = zone(tmp_path / "intel-rapl:0:1", "core", 0)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL)
    with m.window("w") as w:
        now[0] = 2.0
        f["package"].write_text("26000000")
        f["dram"].write_text("5000000")
        core.write_text("20000000")
    r = w.reading
    assert r.joules == pytest.approx(35.0)
    assert [(p.device, p.within) for p in r.parts] == [
        ("package-0", None),
        ("dram-0", None),
        ("core-0", "package-0"),
    ]
    assert r.parts[-1].joules == pytest.approx(20.0)


def test_gpu_adds_to_the_processor(tmp_path: Path, now: list[float]) -> None:
    b = FakeBoard(energy=1_000, power=200_000, mig=[1, 1])
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(b), cpu_model=MODEL)
    with m.window("w") as w:
        now[:] = [1.0, 0.0, 0.0]
        b.energy = 301_000
    r = w.reading
    assert r.joules == pytest.approx(300 + 12) and r.pedigree == "modelled"
    assert r.parts[-1].device == "gpu0" and r.parts[-1].pedigree == "measured"
    assert r.marginal is None  # the board's idle power is not known
    assert any("MIG" in n for n in r.notes)
    assert "gpu0" in m.source
    sound(r)


def test_gpu_counter_standing_in_a_short_window_gives_way_to_power(
    tmp_path: Path, now: list[float]
) -> None:
    b = FakeBoard(energy=1_000, power=200_000)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(b), cpu_model=MODEL)
    with m.window("w") as w:
        now[0] = 0.02
        b.power = 400_000
    part = w.reading.parts[-1]
    assert part.joules == pytest.approx(6.0)
    assert part.low == 0.0 and (part.high or 0) >= 12.0  # one step of the sensor is more than this


def test_power_only_gpu(tmp_path: Path, now: list[float]) -> None:
    b = FakeBoard(power=100_000)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(b), cpu_model=MODEL)
    with m.window("w") as w:
        now[0] = 2.0
    assert w.reading.parts[-1].joules == pytest.approx(200.0)


def test_gpu_failing_mid_window_does_not_stop_the_program(tmp_path: Path, now: list[float]) -> None:
    b = FakeBoard(energy=1_000)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(b), cpu_model=MODEL)
    with m.window("w") as w:
        now[:] = [1.0, 1.0, 1.0]
        b.energy = RuntimeError("GPU is lost")
    r = w.reading
    assert r.joules is not None and r.parts[-1].joules is None
    assert any("GPU is lost" in n for n in r.notes)


def test_an_error_in_the_block_passes_through_and_is_noted(tmp_path: Path) -> None:
    m = modelled(tmp_path)
    with pytest.raises(KeyError), m.window("w"):
        raise KeyError("x")
    assert "KeyError" in m.readings["w"][0].notes[0]


def test_reading_an_open_window_is_an_error(tmp_path: Path) -> None:
    with modelled(tmp_path).window("w") as w, pytest.raises(RuntimeError, match="not closed"):
        _ = w.reading


def test_threads_keep_every_window(tmp_path: Path) -> None:
    with modelled(tmp_path, interval=0.01) as m:

        def work(i: int) -> None:
            for _ in range(20):
                with m.window(f"t{i % 2}"):
                    sum(range(500))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert {k: len(v) for k, v in m.readings.items()} == {"t0": 40, "t1": 40}
    for rs in m.readings.values():
        for r in rs:
            sound(r)
    total = m.total
    assert total == m.total  # fixed once the block has ended
    sound(total)


def test_sampler_follows_a_wrapping_counter(tmp_path: Path) -> None:
    """Two turns within one window: only a sampler in between can see both."""
    f = zone(tmp_path / "intel-rapl:0", "package-0", 0, range_uj=1_000_000)
    with (
        EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL, interval=0.002) as m,
        m.window("w") as w,
    ):
        expected = 0.0
        for value in (600_000, 200_000, 800_000, 400_000):  # +0.6 each, modulo 1.0
            f.write_text(str(value))
            expected += 0.6
            deadline = time.monotonic() + 5
            while (
                round(m._rapl._tallies["package-0"]._raw * 1e6) != value
                and time.monotonic() < deadline
            ):
                time.sleep(0.001)
    assert w.reading.joules == pytest.approx(expected)


def test_really_metering_this_process() -> None:
    """On whatever machine runs the tests: something is known, and more work costs more CPU time."""
    m = EnergyMeter()
    with m.window("short") as a:
        time.sleep(0.005)
    with m.window("long") as b:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    for r in (a.reading, b.reading):
        sound(r)
    assert b.reading.cpu_seconds is not None and b.reading.cpu_seconds >= 0.05
    assert m.source
    m.close()


def test_bad_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOULESMITH_MAX_WATTS", "lots")
    with pytest.raises(JoulesmithError, match="JOULESMITH_MAX_WATTS"):
        EnergyMeter()


positive = st.floats(0, 1e6)


@given(st.lists(st.tuples(positive, st.floats(0, 1), positive), max_size=6), st.floats(1e-6, 1e4))
def test_sums_stay_sound(devices: list[tuple[float, float, float]], seconds: float) -> None:
    parts = [
        Part(str(i), j, j * lo, j + up, "modelled", "x") for i, (j, lo, up) in enumerate(devices)
    ]
    r = add_up(parts, [p.joules for p in parts], seconds, None, ["same", "same"])
    sound(r)
    assert (r.joules is None) == (not parts)
    assert r.notes == ("same",)
    if parts:
        assert r.joules == pytest.approx(math.fsum(j for j, _, _ in devices))


@given(st.none() | positive, st.floats(0, 1e4), st.floats(1e-3, 0.1))
def test_a_counters_interval_holds_it(joules: float | None, seconds: float, step: float) -> None:
    counts = {} if joules is None else {"d": Count(joules, variance=joules, missing=joules)}
    start, end = Snapshot(0.0, 0.0, 0.0, {"d": Count(0.0)}), Snapshot(seconds, 0.0, 0.0, counts)
    p, _ = measured(Device("d", "s", step, 0.05), start, end, seconds)
    if p.joules is None:
        assert p.low is None and p.high is None and p.pedigree is None
    else:
        assert p.low is not None and p.high is not None
        assert 0 <= p.low <= p.joules <= p.high


def test_given_idle_power_gives_the_marginal(tmp_path: Path, now: list[float]) -> None:
    f = rapl(tmp_path)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(), cpu_model=MODEL, idle_watts=5.0)
    assert m.idle_watts == 5.0
    with m.window("w") as w:
        now[0] = 2.0
        f["package"].write_text("26000000")
        f["dram"].write_text("5000000")
    assert (w.reading.joules, w.reading.marginal) == pytest.approx((35.0, 25.0))
    with m.window("w") as w:
        now[0] = 4.0
        f["package"].write_text("27000000")
        f["dram"].write_text("6000000")
    assert w.reading.marginal == 0.0
    with pytest.raises(JoulesmithError, match="idle watts"):
        modelled(tmp_path, idle_watts=-1.0)


def wall(path: Path, watts: object) -> None:
    path.write_text(f"{watts}\n")


def test_an_external_meter_gives_the_joules(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    f = tmp_path / "watts"
    wall(f, 80)
    monkeypatch.setenv("JOULESMITH_METER", f"file:{f}")
    m = modelled(tmp_path)
    monkeypatch.setattr(meter_module.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    m.measure_idle(2.0)
    assert m.idle_watts == pytest.approx(80, rel=0.01)
    wall(f, 80)
    with m.window("w") as w:
        now[:] = [now[0] + 4.0, 8.0, 8.0]
        wall(f, 120)
    r = w.reading
    assert r.joules == pytest.approx(400, rel=0.01) and r.pedigree == "measured"
    assert r.marginal == pytest.approx(80, rel=0.05)
    assert r.machine is not None and r.machine.joules == r.joules
    assert [p.device for p in r.parts] == ["cpu", "dram"]
    assert any("whole machine's" in n for n in r.notes) and "external meter" in m.source
    # Half of 40 W over 4 s was never seen, so it is inside the interval.
    assert (r.high or 0) - r.joules >= 80
    sound(r)
    with m.window("w") as w:
        now[0] += 60.0
    r = w.reading
    assert r.machine is None and r.pedigree == "modelled"
    assert any("gave nothing" in n for n in r.notes)


def test_a_battery_stays_beside_theadd_up(tmp_path: Path, now: list[float]) -> None:
    b = tmp_path / "supply" / "BAT0"
    b.mkdir(parents=True)
    for name, text in {"type": "Battery", "status": "Discharging", "power_now": "20000000"}.items():
        (b / name).write_text(text)
    f = rapl(tmp_path)
    m = EnergyMeter(
        rapl_root=tmp_path, supply_root=b.parent, nvml=FakeNvml(), cpu_model=MODEL, interval=60
    )
    with m.window("w") as w:
        now[0] = 9.0
        f["package"].write_text("26000000")
        f["dram"].write_text("5000000")
    r = w.reading
    assert r.joules == pytest.approx(35.0)
    assert r.machine is not None and r.machine.device == "battery"
    assert r.machine.joules == pytest.approx(180.0) and r.machine.pedigree == "measured"
    with m.window("w") as w:
        now[0] = 18.0
        (b / "status").write_text("Charging")
        m.total  # noqa: B018 - it is seen on mains
        (b / "status").write_text("Discharging")
        now[0] = 27.0
    assert w.reading.machine is None
    assert any("battery: counting was interrupted" in n for n in w.reading.notes)


def test_device_memory(tmp_path: Path, now: list[float]) -> None:
    b = FakeBoard(energy=1_000, power=200_000, used=3_000)
    m = EnergyMeter(rapl_root=tmp_path, nvml=FakeNvml(b), cpu_model=MODEL)
    with m.window("w") as w:
        b.used = 9_000
        with m.window("inner"):
            pass
        b.used = 4_000
    assert w.reading.device_memory_bytes == 9_000
    assert any("does not say how much is ours" in n for n in w.reading.notes)
    b.used = RuntimeError("no permission")
    with m.window("w") as w:
        pass
    assert w.reading.device_memory_bytes is None
    assert modelled(tmp_path).total.device_memory_bytes is None


def test_the_sampler_slows_down_where_looking_is_dear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Stop:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) > 3

    clock = iter([0.0, 0.0001, 1.0, 1.02, 2.0, 99.0])
    m = modelled(tmp_path)
    monkeypatch.setattr(meter_module.time, "thread_time", lambda: next(clock))
    m._sample(Stop())  # type: ignore[arg-type]
    assert waits == pytest.approx([0.3, 0.3, 0.02 / 0.004, 5.0])
