"""The prior of utilisation: bounds, directions, and published throughputs that it must span."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.devices import Device, all_devices, find
from joulesmith.estimate.training import power_model, utilisation
from joulesmith.estimate.training.constants import GENERATION, shipped

H100, A100 = find("H100 SXM 80GB"), find("A100 SXM 80GB")
WITH_RATES = [d for d in all_devices() if d.peak("bf16") is not None]
DEVICES = st.sampled_from(WITH_RATES)
ACTIVE = st.floats(1e6, 1e13)
COUNT = st.floats(1, 1e6)


@given(device=DEVICES, active=ACTIVE, count=COUNT, moe=st.booleans(), steady=st.booleans())
def test_it_is_a_share_with_an_interval(device, active, count, moe, steady) -> None:
    f = utilisation.predict(device, active, count, mixture=moe, steady=steady)
    assert 0 < f.low < f.value <= f.high <= utilisation.MOST


@given(device=DEVICES, active=ACTIVE, count=COUNT, more=st.floats(1, 1000))
def test_directions(device, active, count, more) -> None:
    def median(n: float, d: float, **words: bool) -> float:
        return utilisation.centre(device, n, d, **words)[0]

    base = median(active, count)
    assert median(active * more, count) >= base
    assert median(active, count * more) <= base
    assert median(active, count, steady=True) >= base
    # hours never fall with more weights: MFU grows more slowly than they do
    assert active * more / median(active * more, count) >= active / base * (1 - 1e-9)
    # and device-hours never fall with more devices, nor hours rise
    assert count * more * median(active, count * more) >= count * base * (1 - 1e-9)


def test_a_generation_that_was_not_seen_is_less_certain() -> None:
    seen = utilisation.centre(H100, 8e9, 64)[1]
    unseen = utilisation.centre(find("MI300X"), 8e9, 64)[1]
    assert unseen > seen


def test_fp8_gains_where_there_are_units_for_it() -> None:
    plain, eight = (utilisation.predict(H100, 8e9, 64, precision=p).value for p in ("bf16", "fp8"))
    assert 1 < eight / plain < 2
    assert utilisation.predict(A100, 8e9, 64, precision="fp8") == utilisation.predict(A100, 8e9, 64)
    assert utilisation.peak_of(H100, "fp8") == utilisation.peak_of(H100, "bf16")


@pytest.mark.parametrize(
    ("device", "active", "devices", "mfu"),
    [  # throughput of steady steps that are in no table of the fit
        ("H100 SXM 80GB", 8.03e9, 8, 6 * 8.03e9 * 5762 / 989.4e12),  # TorchTitan, FSDP
        ("H100 SXM 80GB", 8.03e9, 128, 6 * 8.03e9 * 6514 / 989.4e12),  # TorchTitan, compiled
        ("A100 SXM 40GB", 12.85e9, 64, 6 * 12.85e9 * 1976 / 312e12),  # LLM Foundry
    ],
)
def test_published_throughputs_lie_in_the_interval(device, active, devices, mfu) -> None:
    f = utilisation.predict(find(device), active, devices, steady=True)
    assert f.low < mfu < f.high


@pytest.mark.parametrize("precision", ["int8", "int4", "fp4"])
def test_what_nothing_trains_in_is_refused(precision: str) -> None:
    with pytest.raises(JoulesmithError, match="give bf16"):
        utilisation.predict(H100, 8e9, 8, precision=precision)


def test_a_device_without_rates_is_refused() -> None:
    with pytest.raises(JoulesmithError, match="no bf16 rate is known"):
        utilisation.predict(Device("abacus"), 8e9, 8)


@pytest.mark.parametrize("share", [0, -1, 1.01, math.nan])
def test_a_given_share_is_one(share: float) -> None:
    with pytest.raises(JoulesmithError, match="give a share"):
        utilisation.given(share)
    assert utilisation.given(0.4).low == 0.4


def test_every_constant_says_whence() -> None:
    for c in shipped().values():
        assert c.source and c.basis in ("fitted", "published", "assumed") and c.value > 0
    names = {c.name for c in utilisation.constants(H100)}
    assert GENERATION + "Hopper" in names and "half size" in names


# ---- power


@given(device=DEVICES, low=st.floats(0.001, 1), more=st.floats(1, 100))
def test_watts_rise_with_utilisation_and_stay_below_the_limit(device, low, more) -> None:
    if device.tdp_w is None:
        with pytest.raises(JoulesmithError, match="no power is known"):
            power_model.draw(device, low)
        return
    one = power_model.draw(device, low)
    two = power_model.draw(device, min(1, low * more))
    assert 0 < one.idle <= one.device <= two.device <= device.tdp_w * (1 + 1e-9)
    # joules of the same work fall: watts grow more slowly than the rate does
    assert two.device / min(1, low * more) <= one.device / low * (1 + 1e-9)


def test_measured_averages_lie_in_the_interval() -> None:
    """Patterson et al. 2021 (arXiv:2104.10350), table 4: system watts a chip."""
    for device, mfu, watts in (("TPU v3", 0.37, 310), ("TPU v3", 0.39, 288), ("V100", 0.197, 330)):
        total = power_model.draw(find(device), mfu).total
        assert total.low < watts < total.high


def test_given_watts_are_taken() -> None:
    d = power_model.given(500.0, H100)
    assert d.total.value == d.total.high == 500 and d.idle == H100.idle_w
    assert power_model.given(500.0, find("TPU v5e")).idle == 0
    with pytest.raises(JoulesmithError, match="give watts"):
        power_model.given(0, H100)
