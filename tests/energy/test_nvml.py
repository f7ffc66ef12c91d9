from __future__ import annotations

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
