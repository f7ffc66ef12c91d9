from __future__ import annotations

import threading
import time

import pytest
from fake_counters import FakeBoard, FakeNvml

from joulesmith.energy.nvml import Gpu, Nvml


@pytest.fixture(autouse=True)
def _no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def joules(g: Gpu, now: float) -> float | None:
    count = g.read(now)
    return None if count is None else count.joules


def test_counter_is_in_millijoules() -> None:
    b = FakeBoard(energy=7_000, power=50_000)
    (g,) = Nvml(FakeNvml(b)).gpus
    assert g.counts and g.name == "Fake" and g.device == "gpu0"
    b.energy = 9_500
    assert joules(g, 0.0) == pytest.approx(2.5)


def test_counter_reset_counts_what_is_known_and_says_so() -> None:
    b = FakeBoard(energy=7_000)
    (g,) = Nvml(FakeNvml(b)).gpus
    b.energy = 8_000
    g.read(0.0)
    b.energy = 300
    assert joules(g, 1.0) == pytest.approx(1.3)
    assert "started over" in g.notes[0]


def test_counter_failing_for_a_while_loses_nothing() -> None:
    b = FakeBoard(energy=1_000)
    (g,) = Nvml(FakeNvml(b)).gpus
    b.energy = RuntimeError("GPU is lost")
    assert g.read(0.0) is None and "GPU is lost" in g.notes[0]
    b.energy = 4_000
    assert joules(g, 1.0) == pytest.approx(3.0)


def test_power_only_board_is_integrated_by_the_trapezoid_rule() -> None:
    b = FakeBoard(power=100_000)
    (g,) = Nvml(FakeNvml(b)).gpus
    assert not g.counts
    assert joules(g, 0.0) == 0.0
    b.power = 300_000
    assert joules(g, 2.0) == pytest.approx(400.0)
    assert joules(g, 1.0) == pytest.approx(400.0)  # a clock that stands or goes back adds nothing
    b.power = RuntimeError("gone")
    assert g.read(3.0) is None
    b.power = 300_000
    assert joules(g, 4.0) == pytest.approx(1000.0)


@pytest.mark.parametrize("power", [-5, 1e12, float("nan")])
def test_absurd_power_is_unknown(power: float) -> None:
    (g,) = Nvml(FakeNvml(FakeBoard(power=power))).gpus
    assert g.watts() is None and g.read(0.0) is None


def test_mig_is_noted_and_no_mig_is_not() -> None:
    a, b = Nvml(FakeNvml(FakeBoard(energy=1, mig=[1, 1]), FakeBoard(energy=1, mig=[0, 0]))).gpus
    assert a.mig and "MIG" in a.notes[0]
    assert not b.mig and b.notes == []


def test_no_driver_is_quiet() -> None:
    n = Nvml(FakeNvml(init=RuntimeError("Driver Not Loaded")))
    assert n.gpus == () and n.notes == []


def test_one_bad_board_does_not_hide_the_other() -> None:
    class Half(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, i: int) -> FakeBoard:  # noqa: N802
            if i == 0:
                raise RuntimeError("fallen off the bus")
            return super().nvmlDeviceGetHandleByIndex(i)

    n = Nvml(Half(FakeBoard(), FakeBoard(energy=1)))
    assert [g.index for g in n.gpus] == [1] and "fallen off" in n.notes[0]


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [("1", [1]), ("0,1", [0, 1]), ("", []), ("GPU-0001", [1]), ("MIG-x", [0, 1])],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str, wanted: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    n = Nvml(FakeNvml(FakeBoard(energy=1), FakeBoard(energy=1)))
    assert [g.index for g in n.gpus] == wanted


def test_close_twice_shuts_once() -> None:
    lib = FakeNvml(FakeBoard(energy=1))
    n = Nvml(lib)
    n.close()
    n.close()
    assert lib.shut == 1


def test_a_hung_driver_is_left_behind_and_taken_up_again() -> None:
    gate = threading.Event()
    b = FakeBoard(energy=1_000, power=1_000)
    n = Nvml(FakeNvml(b), patience=0.1)
    b.energy = lambda: gate.wait() and None
    assert n.read(1.0) == {} and "does not answer within 0.1 s" in n.notes[0]
    assert n.read(2.0) == {} and n.memory([1]) is None
    b.energy = 5_000
    gate.set()
    deadline = time.monotonic() + 10
    while not (counts := n.read(3.0)) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert counts["gpu0"].joules == pytest.approx(4.0)
    n.close()


def test_a_driver_that_hangs_when_opened() -> None:
    gate = threading.Event()
    n = Nvml(FakeNvml(FakeBoard(energy=1), init=gate.wait), patience=0.02)
    assert n.gpus == () and n.devices == () and "does not answer" in n.notes[0]
    assert n.read(0.0) == {}
    gate.set()


def test_power_limit_bounds_a_restart() -> None:
    b = FakeBoard(energy=7_000, limit=300_000)
    (g,) = Nvml(FakeNvml(b)).gpus
    start = time.perf_counter()
    b.energy = 7_000 + 10**9
    count = g.read(start + 1)
    assert count is not None and count.joules == 0.0 and "jumped" in g.notes[0]
    assert count.missing == pytest.approx(600, rel=0.05)


def test_unsampled_power_says_so() -> None:
    (g,) = Nvml(FakeNvml(FakeBoard(power=100_000))).gpus
    g.read(0.0)
    count = g.read(30.0)
    assert count is not None and count.joules == pytest.approx(3000)
    assert count.variance**0.5 == pytest.approx(1500) and "not sampled" in g.notes[0]


def test_memory_of_our_processes_or_of_the_board() -> None:
    a = FakeBoard(energy=1, used=900, processes={7: 100, 8: 50, 9: 200})
    n = Nvml(FakeNvml(a, FakeBoard(energy=1, used=700)))
    assert n.memory({7, 9}) == 300 and n.notes == []
    assert n.memory({1}) == 1600 and "how much is ours" in n.notes[0]
    a.processes = {7: None}  # the driver lists it and does not say
    assert n.memory({7}) == 1600
    assert Nvml(FakeNvml(FakeBoard(energy=1))).memory({1}) is None
