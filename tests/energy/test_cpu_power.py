from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy.cpu_power import (
    DRAM_WATTS_PER_GIB,
    EXPONENT,
    IDLE_FRACTION,
    MAX_FRACTION,
    CpuPower,
)
from joulesmith.energy.cpus import Cpu, _table, fall_back, identify, look_up
from joulesmith.errors import JoulesmithError


@pytest.fixture(autouse=True)
def _no_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOULESMITH_IDLE_WATTS", raising=False)
    monkeypatch.delenv("JOULESMITH_MAX_WATTS", raising=False)


def guest(cpus: int = 2, threads: int = 1) -> Cpu:
    return Cpu("AuthenticAMD", 26, 2, "AMD EPYC", cpus, 1, cpus // threads, threads, True)


def metal(cores: int = 28, sockets: int = 2) -> Cpu:
    name = "Intel(R) Xeon(R) Platinum 8180 CPU @ 2.50GHz"
    return Cpu("GenuineIntel", 6, 85, name, cores * sockets * 2, sockets, cores * sockets, 2, False)


def model(exponent: float = EXPONENT) -> CpuPower:
    return CpuPower("x", 8, 20.0, 100.0, 3.0, exponent, 0.5, 1.5, "test")


seconds = st.floats(1e-3, 1e5)
share = st.floats(0, 1)


@given(seconds, share, share, st.floats(0.1, 1))
def test_never_negative_and_inside_the_interval(t: float, own: float, o: float, a: float) -> None:
    m = model(a)
    for e in (m.cpu(t, own * t * 8, o), m.dram(t, o)):
        assert 0 <= e.marginal <= e.joules
        assert e.low <= e.joules <= e.high


@given(seconds, share, share, share)
def test_grows_with_cpu_seconds(t: float, a: float, b: float, others: float) -> None:
    """Within the free part of the machine, more CPU seconds never cost fewer joules."""
    a, b = sorted((a * (1 - others), b * (1 - others)))
    x, y = model().cpu(t, a * t * 8, others), model().cpu(t, b * t * 8, others)
    assert y.marginal >= x.marginal * (1 - 1e-9) and y.joules >= x.joules * (1 - 1e-9)


@given(share, share)
def test_watts_grow_with_load(a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert 20.0 <= model().watts(a) <= model().watts(b) <= 100.0 + 1e-9


@given(seconds, share)
def test_alone_on_the_machine_pays_for_the_machine(t: float, load: float) -> None:
    assert model().cpu(t, load * t * 8).joules == pytest.approx(model().watts(load) * t)


@given(seconds, st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_shares_of_the_draw_above_idle_add_up(t: float, loads: list[float]) -> None:
    loads = [x / sum(loads) * 0.9 for x in loads]
    each = [model().cpu(t, x * t * 8, 0.9 - x).marginal for x in loads]
    assert math.fsum(each) == pytest.approx(t * (model().watts(0.9) - 20.0))


def test_ends_of_the_curve() -> None:
    assert model().watts(0) == 20.0 and model().watts(1) == 100.0
    assert model().watts(-3) == 20.0 and model().watts(9) == 100.0
    assert model().cpu(0.0, 1.0).joules == 0.0


def test_a_guest_holds_its_share_of_the_socket() -> None:
    m = CpuPower.detect(cpu=guest(), memory_bytes=4 * 2**30)
    assert "Turin" in m.name and m.cpus == 2
    assert m.idle_watts == pytest.approx(IDLE_FRACTION * 500 * 2 / 256)
    assert m.max_watts == pytest.approx(MAX_FRACTION * 500 * 2 / 256)
    assert m.dram_watts == pytest.approx(4 * DRAM_WATTS_PER_GIB)
    assert m.exponent == 1.0


def test_a_guest_that_cannot_tell_threads_from_cores_covers_both() -> None:
    unsure = CpuPower.detect(cpu=guest(threads=1), memory_bytes=0)
    sure = CpuPower.detect(cpu=guest(threads=2), memory_bytes=0)
    assert unsure.high >= 2.0 > sure.high == pytest.approx(1.5)
    assert any("hardware thread" in n for n in unsure.notes) and not sure.notes


def test_bare_metal_counts_sockets_and_smaller_products() -> None:
    full = CpuPower.detect(cpu=metal(28, 2), memory_bytes=0)
    assert full.max_watts == pytest.approx(MAX_FRACTION * 205 * 2)
    assert full.exponent == EXPONENT
    small = CpuPower.detect(cpu=metal(8, 2), memory_bytes=0)
    # Xeon Silver 4110: 8 cores, 85 W (Intel ARK); within the interval of the model.
    assert 0.5 * small.max_watts < MAX_FRACTION * 85 * 2 < 1.5 * small.max_watts


def test_given_watts_narrow_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    m = CpuPower.detect(10, 50, cpu=guest(), memory_bytes=2**40)
    assert (m.idle_watts, m.max_watts, m.dram_watts) == (10, 50, 0)
    assert (m.low, m.high) == pytest.approx((0.85, 1.15))
    monkeypatch.setenv("JOULESMITH_IDLE_WATTS", "7")
    monkeypatch.setenv("JOULESMITH_MAX_WATTS", "21.5")
    m = CpuPower.detect(cpu=guest())
    assert (m.idle_watts, m.max_watts) == (7, 21.5)


def test_one_end_given_never_crosses_the_estimated_one() -> None:
    assert CpuPower.detect(idle_watts=400, cpu=guest(), memory_bytes=0).max_watts == 400
    assert CpuPower.detect(max_watts=0.1, cpu=guest(), memory_bytes=0).idle_watts == 0.1


@pytest.mark.parametrize("text", ["ten", "-3", "nan", "inf"])
def test_bad_watts_are_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("JOULESMITH_IDLE_WATTS", text)
    with pytest.raises(JoulesmithError, match="JOULESMITH_IDLE_WATTS"):
        CpuPower.detect(cpu=guest())


def test_idle_above_max_is_refused() -> None:
    with pytest.raises(JoulesmithError, match="between 0 and max"):
        CpuPower.detect(50, 10, cpu=guest())


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
physical id\t: 0
siblings\t: 2
cpu cores\t: 1
flags\t\t: fpu sse2{flag}

processor\t: 1
vendor_id\t: AuthenticAMD
physical id\t: 0
siblings\t: 2
cpu cores\t: 1
flags\t\t: fpu sse2{flag}
"""
ARM = """processor\t: 0
CPU implementer\t: 0x41
CPU part\t: 0xd0c

processor\t: 1
CPU implementer\t: 0x41
CPU part\t: 0xd0c
"""


def test_reads_x86_cpuinfo() -> None:
    c = identify(X86.format(flag=" hypervisor"), "")
    assert (c.vendor, c.family, c.model, c.cpus) == ("AuthenticAMD", 25, 1, 2)
    assert (c.sockets, c.cores, c.threads_per_core, c.virtual) == (1, 1, 2, True)
    assert not identify(X86.format(flag=""), "").virtual
    row = look_up(c)
    assert row is not None and "Milan" in row.name


def test_reads_arm_cpuinfo_and_tells_makers_apart() -> None:
    amazon, other = identify(ARM, "Amazon EC2 c6g.large"), identify(ARM, "Altra server")
    assert amazon.virtual and not other.virtual and amazon.cpus == 2
    rows = look_up(amazon), look_up(other)
    assert [r.name for r in rows if r] == ["AWS Graviton2", "Ampere Altra"]


@pytest.mark.parametrize("text", ["\x00\xff", "processor : x", "processor\t: 0\ncpu family\t: ?\n"])
def test_odd_cpuinfo_still_gives_a_model(text: str) -> None:
    m = CpuPower.detect(cpu=identify(text, ""), memory_bytes=0)
    assert 0 < m.idle_watts < m.max_watts and m.notes


@pytest.mark.parametrize("virtual", [True, False])
@pytest.mark.parametrize("vendor", ["ARM", "unknown"])
def test_unknown_processor_falls_back_by_class(vendor: str, virtual: bool) -> None:
    c = Cpu(vendor, None, None, "mystery", 4, 1, 4, 1, virtual)
    assert look_up(c) is None
    row = fall_back(c)
    assert row.coarse and row.tdp > 0 and "W per core" in row.source
    assert CpuPower.detect(cpu=c, memory_bytes=0).low == pytest.approx(0.3)


def test_every_row_of_the_table_is_usable() -> None:
    rows = _table()
    assert len(rows) > 60
    for r in rows:
        assert r["source"] and r["coarse"] in ("0", "1")
        assert r["kind"] in ("server", "desktop", "laptop", "board")
        watts = float(r["tdp_w"]) / int(r["cores"])
        assert 0.5 < watts < 25, r
