"""One pass: against the closed forms of its limits, and what no device can do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.estimate.serving.roofline import MOST, Constants, Pass, cost

PLAIN = Constants(
    static=0.3, per_byte=0.4, per_flop=0.6, bandwidth=0.8, compute=0.7, layer_s=0.0, sync_s=0.0,
    step_s=0.0, sequence_s=0.0,
)  # fmt: skip
ONE = Pass(
    devices=1, tdp_w=700.0, bandwidth=3e12, peak=1e15, peak_16=1e15, link=4e11, narrow=0.0,
    experts=0.0, layers=32, expert_layers=0, sequences=1.0, weight_bytes=16e9, cache_bytes=0.0,
    flops=16e9, exchanged=0.0,
)  # fmt: skip


def test_memory_alone_takes_bytes_over_the_bandwidth_reached() -> None:
    found = cost(replace(ONE, flops=0.0), PLAIN)
    seconds = 16e9 / (0.8 * 3e12)
    assert found.seconds == pytest.approx(seconds, rel=1e-3)
    assert found.joules == pytest.approx(0.3 * 700 * seconds + 0.4 * 700 / 3e12 * 16e9, rel=1e-3)
    assert found.limit == "memory"


def test_compute_alone_takes_flops_over_the_rate_reached() -> None:
    c = replace(PLAIN, static=0.1, per_flop=0.5)
    found = cost(replace(ONE, weight_bytes=0.0, flops=1e15), c)
    seconds = 1 / 0.7
    assert found.seconds == pytest.approx(seconds, rel=1e-3)
    assert found.joules == pytest.approx(0.1 * 700 * seconds + 0.5 * 700, rel=1e-3)
    assert found.limit == "compute"


def test_products_hide_under_the_weights_read_and_caches_do_not() -> None:
    both = cost(replace(ONE, flops=16e9 * 0.7e15 / 0.8 / 3e12), PLAIN)  # as long as the bytes
    assert both.weights_s == pytest.approx(both.compute_s)
    assert both.seconds < 1.25 * both.weights_s
    cached = cost(replace(ONE, flops=0.0, cache_bytes=16e9), PLAIN)
    assert cached.seconds == pytest.approx(
        2 * cost(replace(ONE, flops=0.0), PLAIN).seconds, rel=0.01
    )


def test_overheads_add_up() -> None:
    c = replace(PLAIN, layer_s=1e-3, sync_s=2e-3, step_s=5e-3, sequence_s=1e-4, expert_layer_s=1e-3)
    one = replace(ONE, weight_bytes=0.0, flops=0.0, sequences=10.0, expert_layers=4)
    assert cost(one, c).overhead_s == pytest.approx(32e-3 + 5e-3 + 1e-3 + 4e-3)
    assert cost(replace(one, devices=2), c).overhead_s == pytest.approx(32 * 3e-3 + 10e-3)
    assert cost(one, c).limit == "overhead"
    linked = replace(one, devices=2, exchanged=1e12)
    assert cost(linked, PLAIN).limit == "links"
    assert cost(linked, PLAIN).link_s == pytest.approx(1e12 / 4e11)


def test_power_stretches_a_pass_that_would_draw_too_much() -> None:
    hot = replace(PLAIN, per_byte=3.0)
    found = cost(ONE, hot)
    assert found.limit == "power"
    assert found.joules / found.seconds == pytest.approx(MOST * 700, rel=0.02)


def test_arrays_give_what_floats_give() -> None:
    sizes = np.array([1e9, 16e9, 140e9])
    many = cost(replace(ONE, weight_bytes=sizes), PLAIN)
    for i, size in enumerate(sizes):
        one = cost(replace(ONE, weight_bytes=float(size)), PLAIN)
        assert many.joules[i] == pytest.approx(one.joules)
        assert many.seconds[i] == pytest.approx(one.seconds)


shares = st.floats(0.05, 0.9)
amounts = st.floats(0, 1e15)
passes = st.builds(
    lambda devices, weights, cache, flops, exchanged, narrow, experts: replace(
        ONE, devices=devices, weight_bytes=weights, cache_bytes=cache, flops=flops,
        exchanged=exchanged, narrow=float(narrow), experts=float(experts),
    ),
    st.integers(1, 64), amounts, amounts, st.floats(1e6, 1e18), amounts, st.booleans(),
    st.booleans(),
)  # fmt: skip
constants = st.builds(
    Constants, static=shares, per_byte=st.floats(0, 3), per_flop=st.floats(0, 3), bandwidth=shares,
    compute=shares, layer_s=st.floats(0, 1e-3), sync_s=st.floats(0, 1e-3),
    step_s=st.floats(1e-6, 1e-2), sequence_s=st.floats(0, 1e-3), expert_layer_s=st.floats(0, 1e-3),
    expert_bandwidth=st.floats(0.5, 1.5), expert_compute=st.floats(0.3, 1.0),
    narrow_compute=st.floats(0.5, 1.0), narrow_per_flop=st.floats(0.5, 1.0),
)  # fmt: skip


@given(passes, constants)
def test_no_pass_draws_more_than_its_devices_may(p: Pass, c: Constants) -> None:
    found = cost(p, c)
    assert found.joules <= p.devices * p.tdp_w * found.seconds * (1 + 1e-9)
    assert found.static >= 0 and found.bytes >= 0 and found.flops >= 0


@given(passes, constants, st.sampled_from(["weight_bytes", "cache_bytes", "flops", "exchanged"]))
def test_more_work_takes_no_less(p: Pass, c: Constants, field: str) -> None:
    more = replace(p, **{field: 1.5 * getattr(p, field)})
    a, b = cost(p, c), cost(more, c)
    assert b.joules >= a.joules * (1 - 1e-9)
    assert b.seconds >= a.seconds * (1 - 1e-9)


@given(passes, constants, st.floats(1e-3, 1e3))
def test_units_do_not_matter(p: Pass, c: Constants, unit: float) -> None:
    """Bytes in other units, with rates in the same: the same seconds and joules."""
    names = ("bandwidth", "link", "weight_bytes", "cache_bytes", "exchanged")
    other = replace(p, **{k: getattr(p, k) * unit for k in names})
    other = replace(other, peak=p.peak * unit, peak_16=p.peak_16 * unit, flops=p.flops * unit)
    a, b = cost(p, c), cost(other, c)
    assert b.seconds == pytest.approx(a.seconds, rel=1e-9)
    assert b.joules == pytest.approx(a.joules, rel=1e-9)
