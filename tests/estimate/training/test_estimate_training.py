"""A training run's hours, joules, carbon and money: identities, directions, refusals, and runs that
were published."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulesmith.errors import JoulesmithError
from joulesmith.estimate.devices import find
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.model.work import lora_flops, training_flops
from joulesmith.estimate.training.parallel import Plan
from joulesmith.estimate.training.run import TrainingEstimate, estimate_training

H100, A100 = find("H100 SXM 80GB"), find("A100 SXM 80GB")
SMALL = of_numbers(1.1e9, name="small")
EIGHT = of_numbers(
    8.03e9, layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, context=8192,
    name="8B",
)  # fmt: skip
LARGE = of_numbers(70.6e9, layers=80, hidden=8192, name="70B")
SPARSE = of_numbers(47e9, active=13e9, experts=8, experts_per_token=2, name="sparse")
CHEAP = settings(max_examples=40, deadline=None)


def test_hours_are_flops_over_rate() -> None:
    e = estimate_training(EIGHT, 1e12, H100, 256, utilisation=0.4)
    expected = 6 * EIGHT.active * 1e12 / (0.4 * 989.4e12 * 3600)
    assert e.device_hours.value == pytest.approx(expected, rel=1e-6)
    assert e.hours.value == pytest.approx(expected / 256, rel=1e-6)
    assert e.hours.low == e.hours.high
    assert e.flops == training_flops(EIGHT, 1e12, 4096)


def test_money_carbon_and_joules_hang_together() -> None:
    rented = dataclasses.replace(H100, price_usd_per_hour=2.0)
    e = estimate_training(
        EIGHT, 1e12, rented, 256, utilisation=0.4, power=800, pue=1.25, grid=400, price=0.1
    )
    assert e.joules and e.kwh and e.kg_co2e and e.energy_cost and e.rent_usd and e.parts
    rest = e.parts.storage * 1.25
    assert e.joules.value == pytest.approx(e.device_hours.value * 3600 * 800 * 1.25 + rest)
    assert e.kwh.value == pytest.approx(e.joules.value / 3.6e6)
    assert e.kg_co2e.value == pytest.approx(e.kwh.value * 0.4)
    assert e.energy_cost.value == pytest.approx(e.kwh.value * 0.1)
    assert e.rent_usd.value == pytest.approx(2 * e.device_hours.value)
    assert e.joules_per_token and e.joules_per_token.times(1e12).value == pytest.approx(
        e.joules.value
    )


@pytest.mark.parametrize("devices", [8, 512, 4096, 16384])
def test_a_step_holds_its_products_and_its_waits(devices: int) -> None:
    e = estimate_training(EIGHT, 15e12, H100, devices)
    ideal = 6 * EIGHT.active * e.batch_tokens / (devices * 989.4e12)
    assert 0 < e.utilisation.value <= 0.65
    assert e.step.compute >= ideal / 0.9
    assert e.step.seconds == pytest.approx(ideal / e.utilisation.value, rel=1e-6)


def test_spread_too_thin_a_model_uses_less_of_its_devices() -> None:
    thick, thin = (estimate_training(EIGHT, 15e12, H100, n) for n in (512, 16384))
    assert thin.utilisation.value < 0.6 * thick.utilisation.value
    assert thin.joules and thick.joules and thin.joules.value > 1.4 * thick.joules.value


@CHEAP
@given(
    tokens=st.floats(1e6, 1e14), more=st.floats(1, 100), count=st.integers(1, 4096),
    shape=st.sampled_from([SMALL, SPARSE]), mode=st.sampled_from(["full", "lora", "distil"]),
)  # fmt: skip
def test_more_tokens_never_cost_less(tokens, more, count, shape, mode) -> None:
    try:
        one, two = (
            estimate_training(
                shape, t, H100, count, mode=mode, teacher=SMALL, optimizer="adamw8bit"
            )
            for t in (tokens, tokens * more)
        )
    except JoulesmithError as e:
        assert "does not fit" in str(e)
        return
    for a, b in ((one.joules, two.joules), (one.device_hours, two.device_hours)):
        assert a and b
        assert b.value >= a.value * (1 - 1e-9)
        assert b.low >= a.low * (1 - 1e-9) and b.high >= a.high * (1 - 1e-9)


@CHEAP
@given(params=st.floats(2e7, 2e10), more=st.floats(1.2, 50))
def test_more_weights_never_cost_less(params: float, more: float) -> None:
    small, large = (
        estimate_training(of_numbers(p), 1e11, H100, 4096) for p in (params, params * more)
    )
    assert large.device_hours.value > small.device_hours.value
    assert large.joules and small.joules and large.joules.value > small.joules.value


@CHEAP
@given(
    count=st.integers(1, 2048), shape=st.sampled_from([SMALL, EIGHT, SPARSE]),
    device=st.sampled_from([H100, A100, find("TPU v3"), find("MI300X"), find("RTX 4090")]),
)  # fmt: skip
def test_parts_are_the_whole_and_none_is_negative(count, shape, device) -> None:
    try:
        e = estimate_training(shape, 1e11, device, count)
    except JoulesmithError as error:
        assert "does not fit" in str(error)
        return
    assert e.parts and e.joules
    parts = dataclasses.asdict(e.parts)
    assert all(p >= 0 for p in parts.values()) and parts["compute"] > 0
    assert sum(parts.values()) == pytest.approx(e.joules.value)
    assert e.joules.low < e.joules.value < e.joules.high
    assert e.plan.devices == e.devices == count
    assert e.device_bytes <= 0.9 * (device.memory_bytes or 0)


@CHEAP
@given(k=st.integers(0, 9))
def test_twice_the_machines_are_never_cheaper_in_joules(k: int) -> None:
    one, two = (estimate_training(EIGHT, 1e12, H100, 8 << n) for n in (k, k + 1))
    assert one.joules and two.joules
    assert two.joules.value >= one.joules.value * (1 - 1e-3)  # less of the time for storage
    assert one.hours.value / 2 <= two.hours.value <= one.hours.value


@pytest.mark.parametrize(
    ("shape", "tokens", "device", "devices", "hours"),
    [  # device-hours at published tokens a second, which no table of the fit has
        (EIGHT, 200e9, "H100 SXM 80GB", 128, 200e9 / 6514 / 3600),  # TorchTitan, compiled
        (of_numbers(12.85e9), 300e9, "A100 SXM 40GB", 64, 300e9 / 1976 / 3600),  # LLM Foundry
    ],
)
def test_published_hours_lie_in_the_interval(shape, tokens, device, devices, hours) -> None:
    e = estimate_training(shape, tokens, find(device), devices)
    assert e.device_hours.low < hours < e.device_hours.high


# ---- modes


def test_modes_cost_what_they_compute() -> None:
    full = estimate_training(EIGHT, 1e9, H100, 8)
    tuned = estimate_training(EIGHT, 1e9, H100, 8, mode="finetune")
    lora = estimate_training(EIGHT, 1e9, H100, 8, mode="lora", lora_rank=8)
    distil = estimate_training(EIGHT, 1e9, H100, 8, mode="distil", teacher=SMALL)
    assert tuned.device_hours == full.device_hours
    ratio = lora.device_hours.value / full.device_hours.value
    assert ratio == pytest.approx(
        lora_flops(EIGHT, 1e9, 4096, rank=8) / training_flops(EIGHT, 1e9, 4096)
    )
    assert lora.device_bytes < full.device_bytes
    beside = 2 * SMALL.active / (6 * EIGHT.active)
    assert distil.device_hours.value == pytest.approx(full.device_hours.value * (1 + beside))


def test_recomputation_costs_a_forward_pass_when_asked_for() -> None:
    plain = estimate_training(EIGHT, 1e9, H100, 8)
    full = estimate_training(EIGHT, 1e9, H100, 8, recompute="full")
    assert 1.25 < full.device_hours.value / plain.device_hours.value < 1.34
    assert full.device_bytes < plain.device_bytes and full.recompute == "full"


def test_longer_sequences_cost_their_attention() -> None:
    short, long = (estimate_training(EIGHT, 1e9, H100, 64, sequence=s) for s in (4096, 32768))
    ratio = training_flops(EIGHT, 1e9, 32768) / training_flops(EIGHT, 1e9, 4096)
    assert long.device_hours.value / short.device_hours.value == pytest.approx(ratio)


def test_a_poor_plan_takes_longer() -> None:
    usual = estimate_training(LARGE, 1e12, H100, 512)
    deep = Plan(data=1, tensor=8, pipeline=64, sharding="optimizer", microbatches=64)
    slow = estimate_training(LARGE, 1e12, H100, plan=deep)
    assert slow.devices == 512
    assert slow.device_hours.value > 1.2 * usual.device_hours.value


def test_the_step_is_the_predicted_time() -> None:
    e = estimate_training(LARGE, 1e12, H100, 512)
    assert e.step.seconds * 1e12 / e.batch_tokens == pytest.approx(3600 * e.hours.value, rel=1e-3)


def test_devices_nobody_named_take_about_a_month() -> None:
    e = estimate_training(EIGHT, 1e12, H100)
    assert e.devices % 8 == 0 and 300 < e.hours.value < 1500
    assert estimate_training(of_numbers(1e8), 1e9, H100).devices == 1


def test_devices_nobody_named_hold_the_model() -> None:
    found = estimate_training(EIGHT, 1e9, H100)  # a month's worth is one, which is too small
    assert found.devices == 2
    assert found.device_bytes <= H100.memory_bytes
    assert estimate_training(LARGE, 1e9, H100).devices > 8


def test_unknown_power_is_none_and_said() -> None:
    e = estimate_training(EIGHT, 1e10, find("TPU v5e"), 256)
    assert e.joules is e.kwh is e.kg_co2e is e.energy_cost is e.parts is None
    assert any("no power is known" in n for n in e.notes)
    assert e.rent_usd is not None and e.hours.value > 0
    told = estimate_training(EIGHT, 1e10, find("TPU v5e"), 256, power=250)
    assert told.joules is not None


def test_constants_are_listed_once_and_say_whence() -> None:
    e = estimate_training(EIGHT, 1e10, H100, 8)
    names = [c.name for c in e.constants]
    assert len(set(names)) == len(names) and "host" in names and "usual PUE" in names
    given = estimate_training(EIGHT, 1e10, H100, 8, utilisation=0.4, power=700)
    assert "host" not in {c.name for c in given.constants}


# ---- refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"devices": 0}, "devices are 0"),
        ({"devices": 2.5}, "devices are 2.5"),
        ({"tokens": 0}, "tokens are 0"),
        ({"tokens": float("nan")}, "tokens are nan"),
        ({"mode": "dream"}, "mode 'dream'"),
        ({"mode": "distil"}, "without a teacher"),
        ({"sequence": 0}, "sequence"),
        ({"pue": 0.9}, "PUE is 0.9"),
        ({"utilisation": 1.2}, "utilisation is 1.2"),
        ({"power": -5.0}, "power is -5"),
        ({"precision": "int8"}, "give bf16"),
        ({"plan": Plan(data=4)}, "not 8 devices"),
        ({"batch_tokens": 10.0}, "at least one sequence"),
        ({"batch_tokens": 8192.0, "plan": Plan(data=8)}, "larger batch or fewer devices"),
        ({"grid": "atlantis"}, "unknown grid"),
        ({"optimizer": "luck"}, "optimizer"),
        ({"recompute": "maybe"}, "recompute"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(words: dict, told: str) -> None:
    given = {"tokens": 1e9, "devices": 8, **words}
    with pytest.raises(JoulesmithError, match=told) as e:
        estimate_training(SMALL, given.pop("tokens"), H100, given.pop("devices"), **given)
    assert "\n" not in str(e.value)


def test_a_model_that_does_not_fit_says_what_would_help() -> None:
    with pytest.raises(JoulesmithError, match=r"70B does not fit: .* more devices, a LoRA") as e:
        estimate_training(LARGE, 1e9, H100, 8)
    assert "\n" not in str(e.value)
    whole = Plan(data=64, sharding="none")
    with pytest.raises(JoulesmithError, match='sharding="full"'):
        estimate_training(LARGE, 1e9, H100, plan=whole)
    assert estimate_training(LARGE, 1e9, H100, 8, mode="lora").devices == 8


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys; import joulesmith.estimate.training; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_estimate_is_frozen() -> None:
    e = estimate_training(SMALL, 1e9, H100, 1)
    assert isinstance(e, TrainingEstimate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.devices = 2  # type: ignore[misc]
