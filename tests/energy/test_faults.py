"""Whatever befalls the counters, the meter goes on: no negative energy, no interval without its
joules, no joules made up; and it says why."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from fake_counters import FakeBoard, FakeNvml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joulesmith.energy import EnergyMeter, Reading, rapl
from joulesmith.energy import meter as meter_module
from joulesmith.energy.cpu_power import CpuPower
from joulesmith.energy.nvml import Nvml

MODEL = CpuPower("test CPU", 4, 10.0, 50.0, 2.0, 0.6, 0.5, 1.5, "test CPU")
TURN = 65_532_610_987  # µJ, the range of many processors
PACKAGE_WATTS, DRAM_WATTS, GPU_WATTS = 80, 6, 300


class Machine:
    """A machine of one package with memory and two boards, whose true joules are known.

    Counters are read through `rapl._number` and a stand-in of NVML; a fault stands
    until the next one.
    """

    def __init__(self) -> None:
        self.now = self.cpu = 0.0
        self.true = {"package-0": 0.0, "dram-0": 0.0, "gpu0": 0.0, "gpu1": 0.0}
        self.start = {"package-0": TURN - 500_000_000, "dram-0": 7}
        self.fault: dict[str, Any] = {}
        self.meter_hurt = False
        self.gate = threading.Event()
        boards = [
            FakeBoard(energy=lambda: self.board("gpu0"), power=GPU_WATTS * 1000, limit=350_000),
            FakeBoard(power=lambda: self.board("gpu1", GPU_WATTS * 1000)),
        ]
        self.lib = FakeNvml(*boards)

    def run(self, seconds: float) -> None:
        self.now += seconds
        self.cpu += 2 * seconds
        for name, watts in (
            ("package-0", PACKAGE_WATTS),
            ("dram-0", DRAM_WATTS),
            ("gpu0", GPU_WATTS),
            ("gpu1", GPU_WATTS),
        ):
            self.true[name] += watts * seconds

    def board(self, name: str, value: float | None = None) -> float:
        mj = self.true[name] * 1000 + 4_000_000 if value is None else value
        found = self.spoil(name, mj, None)
        return float(found)

    def number(self, path: Path) -> int:
        if path.name == "max_energy_range_uj":
            return TURN
        name = "dram-0" if path.parent.name.count(":") > 1 else "package-0"
        raw = (self.start[name] + int(self.true[name] * 1e6)) % TURN
        return int(self.spoil(name, raw, TURN))

    def spoil(self, name: str, raw: float, turn: int | None) -> float:
        fault = self.fault.get(name)
        if fault is None:
            return raw
        if fault == "vanish":
            raise FileNotFoundError(2, "No such file or directory")
        if fault == "deny":
            raise PermissionError(13, "Permission denied")
        if fault == "garbage":
            raise ValueError("invalid literal")
        if fault == "nan":
            if turn is None:
                return float("nan")
            raise ValueError("invalid literal")
        if fault == "negative":
            if turn is None:
                return -5.0
            raise ValueError("negative counter")
        if fault == "zero":
            return 0
        if fault == "stuck":
            return 12_345.0
        if fault == "back":
            return max(0.0, raw - 3e6) if turn is None else (raw - 3_000_000_000) % turn
        if fault == "ahead":
            return raw + 10**15 if turn is None else (raw + turn // 2) % turn
        raise AssertionError(fault)


FAULTS = ("vanish", "deny", "garbage", "nan", "negative", "zero", "stuck", "back", "ahead")
NAMES = ("package-0", "dram-0", "gpu0", "gpu1")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("powercap")
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram")):
        (root / folder).mkdir()
        (root / folder / "name").write_text(name)
    return root


def patch(m: pytest.MonkeyPatch, machine: Machine) -> None:
    for key in ("CUDA_VISIBLE_DEVICES", "JOULESMITH_METER"):
        m.delenv(key, raising=False)
    m.setattr(rapl, "_number", machine.number)
    m.setattr(meter_module.time, "perf_counter", lambda: machine.now)
    m.setattr(EnergyMeter, "_cpu", lambda self: machine.cpu)
    m.setattr(meter_module, "machine_busy", lambda: machine.cpu)


def make(root: Path, machine: Machine) -> EnergyMeter:
    return EnergyMeter(
        rapl_root=root,
        supply_root=root / "none",
        nvml=machine.lib,
        cpu_model=MODEL,
        synchronize=False,
    )


def sound(r: Reading) -> None:
    for x in (r, *r.parts):
        if x.joules is None:
            assert x.low is None and x.high is None
        else:
            assert x.low is not None and x.high is not None
            assert 0 <= x.low <= x.joules <= x.high < float("inf")
            assert x.pedigree in ("measured", "modelled")
    assert r.marginal is None or (r.joules is not None and 0 <= r.marginal <= r.joules)
    for p in r.parts:
        if p.joules is None:
            assert any(p.device in n for n in r.notes), (p, r.notes)


EVENT = st.one_of(
    st.tuples(st.just("run"), st.sampled_from([0.0, 0.0004, 0.05, 0.3, 2.0, 100.0])),
    st.tuples(st.just("fault"), st.tuples(st.sampled_from(NAMES), st.sampled_from(FAULTS))),
    st.tuples(st.just("heal"), st.sampled_from(NAMES)),
    st.tuples(st.just("open"), st.none()),
    st.tuples(st.just("close"), st.integers(0, 3)),
)


@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(EVENT, min_size=3, max_size=25))
def test_no_sequence_of_faults_breaks_a_reading(tree: Path, events: list[tuple[str, Any]]) -> None:
    machine = Machine()
    with pytest.MonkeyPatch.context() as m:
        patch(m, machine)
        meter = make(tree, machine)
        opened = [meter.window("w").start()]
        for what, value in events:
            if what == "run":
                machine.run(value)
            elif what == "fault":
                machine.fault[value[0]] = value[1]
            elif what == "heal":
                machine.fault.pop(value, None)
            elif what == "open":
                opened.append(meter.window("w").start())
            elif opened:
                sound(opened.pop(value % len(opened)).stop())
        machine.run(1.0)
        for window in opened:
            r = window.stop()
            sound(r)
            # Nothing is made up: no part exceeds what could have been drawn in that time.
            for p in r.parts:
                most = 5000 * r.seconds + 50 * (2 + len(events))
                assert p.joules is None or p.joules <= most
        meter.close()


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["vanish", "deny", "garbage", "nan", "negative"]),
    st.floats(0.5, 50),
    st.floats(0.5, 50),
)
def test_silence_within_a_window_costs_nothing(
    tree: Path, name: str, fault: str, before: float, silent: float
) -> None:
    """A counter that cannot be read for a while and comes back: the interval holds the truth."""
    machine = Machine()
    with pytest.MonkeyPatch.context() as m:
        patch(m, machine)
        meter = make(tree, machine)
        with meter.window("w") as w:
            machine.run(before)
            meter.total  # noqa: B018 - a look at all counters
            machine.fault[name] = fault
            machine.run(silent)
            meter.total  # noqa: B018
            machine.fault.clear()
            machine.run(0.5)
        r = w.reading
        sound(r)
        parts = {p.device: p for p in r.parts}
        assert set(parts) == set(NAMES)
        for device, true in machine.true.items():
            p = parts[device]
            assert p.joules is not None and p.low is not None and p.high is not None
            assert p.low <= true <= p.high
        assert r.notes
        meter.close()


@pytest.mark.parametrize("fault", ["back", "ahead", "stuck", "zero"])
@pytest.mark.parametrize("name", ["package-0", "gpu0"])
def test_a_jump_within_a_window_widens_it_to_hold_the_truth(
    tree: Path, name: str, fault: str
) -> None:
    machine = Machine()
    with pytest.MonkeyPatch.context() as m:
        patch(m, machine)
        meter = make(tree, machine)
        with meter.window("w") as w:
            for k in range(10):
                machine.run(1.0)
                if k == 5:
                    machine.fault[name] = fault
                meter.total  # noqa: B018
        part = next(p for p in w.reading.parts if p.device == name)
        assert part.joules is not None and part.low is not None and part.high is not None
        assert part.joules < machine.true[name]
        assert part.low <= machine.true[name] <= part.high
        assert any("lost" in n for n in w.reading.notes)
        meter.close()


def test_a_package_that_wraps_gives_the_truth(tree: Path) -> None:
    machine = Machine()
    with pytest.MonkeyPatch.context() as m:
        patch(m, machine)
        meter = make(tree, machine)
        with meter.window("w") as w:
            machine.run(10.0)  # 800 J, of which 500 J before the turn
        part = w.reading.parts[0]
        assert part.joules == pytest.approx(800, abs=1e-5) and part.pedigree == "measured"
        meter.close()


def test_all_gone_is_modelled_and_says_why(tree: Path) -> None:
    machine = Machine()
    with pytest.MonkeyPatch.context() as m:
        patch(m, machine)
        meter = make(tree, machine)
        with meter.window("w") as w:
            machine.run(1.0)
            machine.fault = dict.fromkeys(NAMES, "vanish")
        r = w.reading
        assert r.pedigree == "modelled" and r.joules is not None
        assert {p.device for p in r.parts if p.joules is not None} == {"cpu", "dram"}
        assert any("modelled instead" in n for n in r.notes)
        assert any("gpu0: unknown" in n for n in r.notes)
        meter.close()


def test_a_driver_that_hangs_stops_nothing(tree: Path) -> None:
    machine = Machine()
    with pytest.MonkeyPatch.context() as m:
        patch(m, machine)
        m.setattr(meter_module, "Nvml", lambda lib: Nvml(lib, patience=0.05))
        meter = make(tree, machine)
        with meter.window("w") as w:
            machine.run(1.0)
            machine.lib.boards[0].energy = lambda: machine.gate.wait() and None
        r = w.reading
        assert r.joules == pytest.approx(PACKAGE_WATTS + DRAM_WATTS)
        assert [p.joules for p in r.parts[-2:]] == [None, None]
        assert any("does not answer" in n for n in r.notes)
        with meter.window("again") as w:
            machine.run(1.0)
        assert w.reading.joules == pytest.approx(PACKAGE_WATTS + DRAM_WATTS)
        machine.gate.set()
        meter.close()
