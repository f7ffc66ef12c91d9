from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.energy import calibrate_power, cpus
from joulesmith.energy.cpu_power import (
    DRAM_JOULES_PER_BYTE,
    DRAM_WATTS_PER_GIB,
    CpuPower,
)
from joulesmith.energy.cpus import Cpu, _products, _table, fall_back, identify, look_up
from joulesmith.energy.power_curve import PACKAGE, WALL, Curve, package_ends, wall_class
from joulesmith.errors import JoulesmithError

IDLE_FRACTION, MAX_FRACTION = package_ends("server")


@pytest.fixture(autouse=True)
def _no_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("IDLE", "MAX", "TDP"):
        monkeypatch.delenv(f"JOULESMITH_{name}_WATTS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def guest(cpus: int = 2, threads: int = 1) -> Cpu:
    return Cpu("AuthenticAMD", 26, 2, "AMD EPYC", cpus, 1, cpus // threads, threads, True)


def metal(cores: int = 28, sockets: int = 2) -> Cpu:
    name = "Intel(R) Xeon(R) Processor @ 2.50GHz"
    return Cpu("GenuineIntel", 6, 85, name, cores * sockets * 2, sockets, cores * sockets, 2, False)


def model(exponent: float = 0.69) -> CpuPower:
    return CpuPower("x", 8, 20.0, 100.0, 3.0, exponent, 0.5, 1.5, "test")


seconds = st.floats(1e-3, 1e5)
share = st.floats(0, 1)


@given(seconds, share, share, st.floats(0.1, 1))
def test_never_negative_and_inside_the_interval(t: float, own: float, o: float, a: float) -> None:
    m = model(a)
    for e in (m.cpu(t, own * t * 8, o), m.dram(t, o), m.dram(t, o, own * 1e12)):
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
    assert m.curve == Curve() and m.boundary == "package"


def test_a_guest_that_cannot_tell_threads_from_cores_covers_both() -> None:
    unsure = CpuPower.detect(cpu=guest(threads=1), memory_bytes=0)
    sure = CpuPower.detect(cpu=guest(threads=2), memory_bytes=0)
    assert unsure.high >= 2.0 > sure.high == pytest.approx(1.5)
    assert any("hardware thread" in n for n in unsure.notes) and not sure.notes


def test_bare_metal_counts_sockets_and_smaller_products() -> None:
    full = CpuPower.detect(cpu=metal(28, 2), memory_bytes=0)
    assert full.max_watts == pytest.approx(MAX_FRACTION * 205 * 2)
    assert full.curve == PACKAGE
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


def test_a_maker_that_was_not_fitted_has_a_wider_interval() -> None:
    arm = Cpu("ARM", 0x41, 0xD0C, "Altra", 80, 1, 80, 1, False)
    m = CpuPower.detect(60, 250, cpu=arm)
    assert (m.low, m.high) == pytest.approx((0.75, 1.25)) and m.notes
    assert m.curve == WALL["any"].curve
    assert CpuPower.detect(60, 250, cpu=metal()).high == pytest.approx(1.15)


def test_no_silent_zero() -> None:
    for kw in ({"idle_watts": 0, "max_watts": 0}, {"tdp_watts": 0}, {"tdp_watts": -5}):
        with pytest.raises(JoulesmithError, match="watts"):
            CpuPower.detect(cpu=metal(), **kw)
    with pytest.raises(JoulesmithError, match="TDP"):
        CpuPower.from_tdp(math.nan, boundary="wall")


def test_one_end_given_is_of_the_wall_and_told() -> None:
    m = CpuPower.detect(idle_watts=60, cpu=metal(), memory_bytes=2**40)
    assert m.boundary == "wall" and m.dram_watts == 0 and "idle 60 W as given" in m.source
    assert m.max_watts == pytest.approx(WALL["intel"].max * 410) and m.notes


def test_idle_above_max_is_refused() -> None:
    with pytest.raises(JoulesmithError, match="between 0 and max"):
        CpuPower.detect(50, 10, cpu=guest())


@given(
    st.builds(Curve, st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1)),
    st.floats(-1, 2),
    st.floats(-1, 2),
)
def test_a_curve_runs_from_0_to_1_and_never_falls(c: Curve, a: float, b: float) -> None:
    a, b = sorted((a, b))
    assert 0 <= c(a) <= c(b) + 1e-12 <= 1 + 1e-9
    assert c(0) == 0 and c(1) == pytest.approx(1)


def test_the_curve_at_hand_computed_points() -> None:
    assert Curve(0.5)(0.25) == pytest.approx(0.5)
    assert Curve(1.0, bend=0.5)(0.5) == pytest.approx(0.5 * 0.5 + 0.5 * 0.0625)
    woken = 0.2 * (1 - math.exp(-1))
    assert Curve(1.0, jump=0.2)(0.03) == pytest.approx(woken + 0.8 * 0.03)


@pytest.mark.parametrize("bad", [(0.0, 0.0, 0.0), (1.0, -0.1, 0.0), (1.0, 0.0, 1.1), (2.0, 0, 0)])
def test_a_curve_out_of_range_is_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Curve(*bad)
    with pytest.raises(JoulesmithError, match="out of range"):
        CpuPower("x", 1, 1, 2, 0, bad[0], 0.5, 1.5, "", (), bad[1], bad[2])


def test_classes_at_the_wall() -> None:
    assert wall_class("AuthenticAMD", "server", 8) is WALL["amd"]
    assert wall_class("GenuineIntel", "server", 8) is WALL["small"]
    assert wall_class("Intel", "server", None) is wall_class("Intel", "server", 28) is WALL["intel"]
    assert wall_class("AuthenticAMD", "laptop", 8) is WALL["small"]
    assert wall_class("ARM", "server", 80) is wall_class("Apple", "laptop", 8) is WALL["any"]


# Published SPECpower_ssj2008 watts: idle, 10 % ... 100 % load.
PUBLISHED = [
    ("AuthenticAMD", 64, 2, 225, (92.4, 181, 206, 228, 248, 268, 288, 308, 328, 353, 394)),
    ("GenuineIntel", 28, 2, 205, (49.9, 119, 142, 165, 189, 200, 223, 252, 295, 346, 415)),
    ("GenuineIntel", 8, 1, 95, (21.7, 27.5, 30.5, 33.2, 36.1, 40.1, 44.5, 49.7, 55.9, 66.4, 82.8)),
]


@pytest.mark.parametrize(("vendor", "cores", "chips", "tdp", "watts"), PUBLISHED)
def test_published_servers(
    vendor: str, cores: int, chips: int, tdp: float, watts: tuple[float, ...]
) -> None:
    loads = [k / 10 for k in range(11)]
    ends = CpuPower.from_ends(watts[0], watts[-1], vendor=vendor, cores_per_socket=cores)
    for load, real in zip(loads, watts, strict=True):
        assert ends.watts(load) == pytest.approx(real, rel=0.15)
    wall = CpuPower.from_tdp(
        tdp, sockets=chips, vendor=vendor, cores_per_socket=cores, boundary="wall"
    )
    package = CpuPower.from_tdp(tdp, sockets=chips, boundary="package")
    assert wall.low < sum(watts) / sum(map(wall.watts, loads)) < wall.high
    assert package.idle_watts < wall.idle_watts and package.max_watts < wall.max_watts


def test_a_packages_interval_is_wider_at_light_load() -> None:
    package = CpuPower.from_tdp(100, boundary="package")
    wall = CpuPower.from_tdp(100, boundary="wall")
    assert wall.interval(0) == wall.interval(1) == (wall.low, wall.high)
    assert package.interval(1) == pytest.approx((0.5, 1.5))
    widths = [high / low for low, high in map(package.interval, (0.0, 0.3, 0.7, 1.0, 2.0))]
    assert widths == sorted(widths, reverse=True) and widths[-1] == widths[-2]
    for load in (0.0, 0.4, 1.0):
        e, factors = package.cpu(10, 10 * load), package.interval(load)
        assert (e.low, e.high) == pytest.approx([e.joules * f for f in factors])
    assert "near idle" in package.said_interval and "near" not in wall.said_interval
    with pytest.raises(JoulesmithError, match="interval out of range"):
        dataclasses.replace(package, light=0.5)


def test_boundaries() -> None:
    inside = CpuPower.detect(cpu=metal(), memory_bytes=2**40)
    plug = CpuPower.detect(cpu=metal(), memory_bytes=2**40, boundary="wall")
    assert (inside.boundary, plug.boundary) == ("package", "wall")
    assert inside.dram_watts == pytest.approx(102.4) and plug.dram_watts == 0
    assert "packages only" in inside.source and "at the wall" in plug.source
    assert plug.max_watts == pytest.approx(WALL["intel"].max * 410)
    assert plug.dram(5.0, 0, 1e12).joules == 0  # inside the processor's figure
    package = CpuPower.detect(50, 400, cpu=metal(), memory_bytes=2**30, boundary="package")
    assert package.curve == PACKAGE and package.dram_watts > 0
    assert (package.low, package.high) == pytest.approx((0.7, 1.3))
    assert CpuPower.detect(50, 400, cpu=metal()).curve == WALL["intel"].curve
    assert CpuPower.detect(50, 400, cpu=guest()).curve == WALL["any"].curve


def test_tdp_given(monkeypatch: pytest.MonkeyPatch) -> None:
    # A given TDP is of this very product: it is not scaled by the cores.
    m = CpuPower.detect(tdp_watts=85, cpu=metal(8, 2), memory_bytes=0)
    assert m.max_watts == pytest.approx(MAX_FRACTION * 85 * 2) and "as given" in m.source
    monkeypatch.setenv("JOULESMITH_TDP_WATTS", "100")
    unknown = Cpu("unknown", None, None, "mystery server", 4, 1, 4, 1, False)
    m = CpuPower.detect(cpu=unknown, memory_bytes=0)
    assert m.max_watts == pytest.approx(MAX_FRACTION * 100) and m.low == 0.5
    monkeypatch.setenv("JOULESMITH_TDP_WATTS", "many")
    with pytest.raises(JoulesmithError, match="JOULESMITH_TDP_WATTS"):
        CpuPower.detect(cpu=unknown)


def test_traffic_of_memory_is_marginal() -> None:
    m, still = model(), model().dram(2.0)
    e = m.dram(2.0, 0.0, 1e9)
    assert e.marginal == pytest.approx(1e9 * DRAM_JOULES_PER_BYTE)
    assert e.joules - still.joules == pytest.approx(e.marginal) and still.marginal == 0
    assert m.dram(2.0, 0.0, -5.0) == still


def test_a_stored_calibration_is_used_and_told() -> None:
    calibrate_power.calibrate(42, 118, cpu=metal())
    m = CpuPower.detect(cpu=metal(), memory_bytes=2**40)
    assert (m.idle_watts, m.max_watts, m.dram_watts) == (42, 118, 0)
    assert (m.low, m.high) == pytest.approx((0.85, 1.15))
    assert "calibrated" in m.source and m.boundary == "wall" and not m.notes
    # What is said now beats what was stored, and so does another boundary.
    assert CpuPower.detect(50, 100, cpu=metal()).idle_watts == 50
    assert CpuPower.detect(cpu=metal(), boundary="package").boundary == "package"


def test_a_calibration_of_another_machine_is_noted_and_not_used() -> None:
    calibrate_power.calibrate(42, 118, cpu=metal())
    m = CpuPower.detect(cpu=guest(), memory_bytes=0)
    assert m.max_watts < 42 and any("another machine" in n for n in m.notes)


def test_a_broken_calibration_is_a_note() -> None:
    file = calibrate_power.path()
    file.parent.mkdir(parents=True)
    file.write_text('{"version": 1, "idle')
    m = CpuPower.detect(cpu=metal(), memory_bytes=0)
    assert m.max_watts == pytest.approx(MAX_FRACTION * 410)
    assert any("not a calibration" in n for n in m.notes)


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
    assert row is not None and row.name == "EPYC 7763" and row.exact
    row = look_up(replace(c, name="AMD EPYC Processor"))
    assert row is not None and "Milan" in row.name and not row.exact


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


def test_every_product_is_usable() -> None:
    rows = _products()
    assert len(rows) > 300 and len({r["product"].lower() for r in rows}) == len(rows)
    for r in rows:
        assert r["kind"] in ("server", "desktop") and r["threads_per_core"] in ("1", "2")
        assert 2 < float(r["tdp_w"]) / int(r["cores"]) < 25, r
        cpu = Cpu(r["vendor"], None, None, f"CPU {r['product']} @ 2 GHz", 2, 1, 2, 1, False)
        found = look_up(cpu)
        assert found is not None and found.tdp == float(r["tdp_w"])


@pytest.mark.parametrize(
    ("name", "tdp"),
    [
        ("Intel(R) Xeon(R) CPU E5-2620 v3 @ 2.40GHz", 85),
        ("Intel(R) Xeon(R) CPU E5-2620 0 @ 2.00GHz", 95),
        ("Intel(R) Xeon(R) CPU E3-1240 V2 @ 3.40GHz", 69),
        ("Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz", 125),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", 95),
        ("INTEL(R) XEON(R) PLATINUM 8592+", 350),
    ],
)
def test_products_by_their_names(name: str, tdp: float) -> None:
    row = look_up(Cpu("GenuineIntel", 6, 85, name, 8, 1, 4, 2, False))
    assert row is not None and row.exact and row.tdp == tdp


@pytest.mark.parametrize("name", ["Xeon(R) Gold 6230R CPU", "Xeon E5-2620 v9", "Platinum 8592"])
def test_a_like_name_is_not_the_product(name: str) -> None:
    row = look_up(Cpu("GenuineIntel", 6, 85, name, 8, 1, 4, 2, False))
    assert row is not None and not row.exact


def test_an_exact_product_is_not_scaled_by_its_cores() -> None:
    siena = Cpu("AuthenticAMD", 25, 160, "AMD EPYC 8024P 8-Core Processor", 16, 1, 8, 2, False)
    m = CpuPower.detect(cpu=siena, memory_bytes=0)
    assert m.max_watts == pytest.approx(MAX_FRACTION * 90) and "TDP 90 W" in m.source


def sysctl(text: str, monkeypatch: pytest.MonkeyPatch) -> Cpu:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, stdout=text)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cpus, "_read", lambda _: "")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(cpus.os, "cpu_count", lambda: 12)
    return identify()


def test_a_mac_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    c = sysctl("machdep.cpu.brand_string: Apple M3 Pro\nhw.physicalcpu: 12\n", monkeypatch)
    assert (c.vendor, c.cpus, c.cores, c.threads_per_core) == ("Apple", 12, 12, 1)
    row = look_up(c)
    assert row is not None and "M3 Pro" in row.name
    row = look_up(replace(c, name="Apple M9"))
    assert row is not None and row.name == "Apple silicon" and row.coarse


def test_an_intel_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz\n"
        "machdep.cpu.vendor: GenuineIntel\nmachdep.cpu.family: 6\nmachdep.cpu.model: 158\n"
        "hw.physicalcpu: 6\nhw.packages: 1\n"
    )
    c = sysctl(text, monkeypatch)
    assert (c.family, c.model, c.cores, c.threads_per_core) == (6, 158, 6, 2)
    row = look_up(c)
    assert row is not None and row.tdp == 45


@pytest.mark.parametrize("text", ["", "garbage", "hw.physicalcpu: many\nhw.packages: 0\n"])
def test_a_mac_that_says_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m = CpuPower.detect(cpu=sysctl(text, monkeypatch), memory_bytes=0)
    assert m.cpus == 12 and m.max_watts > 0


def test_windows_names_family_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    name = "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel"
    monkeypatch.setattr(platform, "processor", lambda: name)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(cpus, "_read", lambda _: "")
    c = identify()
    assert (c.vendor, c.family, c.model) == ("GenuineIntel", 6, 158)
    assert look_up(c) is not None


def test_a_desktop_may_draw_more_than_its_tdp() -> None:
    m = CpuPower.from_tdp(125, boundary="package", kind="desktop")
    # Core i9-12900K: TDP 125 W, turbo limit 241 W without a time (Intel ARK).
    assert m.max_watts * m.low < 125 < 241 < m.max_watts * m.high
