"""Mixes of devices, devices side by side, days and batteries: against sums done by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import LLAMA_8B, LLAMA_70B, QWEN3_30B

from joulesmith import estimate
from joulesmith.energy.carbon import grid, price
from joulesmith.errors import JoulesmithError
from joulesmith.estimate.asked import answer_compare, answer_serve
from joulesmith.estimate.devices import find
from joulesmith.estimate.model import work
from joulesmith.estimate.model.hub_config import of_config
from joulesmith.estimate.model.plain import of_numbers
from joulesmith.estimate.serving.comparing import compare
from joulesmith.estimate.serving.daily import charge, fleet
from joulesmith.estimate.serving.mixes import JOULES_PER_BYTE_SENT, NETWORK, mix
from joulesmith.estimate.serving.roof import roof
from joulesmith.estimate.serving.roofline import cost
from joulesmith.estimate.serving.serve import best_batch, reading, serve, steady
from joulesmith.estimate.serving.setup import Setup, Traffic, constants_of
from joulesmith.estimate.told import told_compare, told_serve

EIGHT, SEVENTY = of_config(LLAMA_8B, name="8B"), of_config(LLAMA_70B, name="70B")
MIXTURE = of_config(QWEN3_30B, name="30B-A3B")
SHAPES = {"8B": EIGHT, "70B": SEVENTY, "30B-A3B": MIXTURE}
H100, B200, L40S = find("H100"), find("B200"), find("L40S")


# ---- mixes


def test_a_mix_is_a_prompt_and_its_cache_and_an_output() -> None:
    first, second, traffic = Setup(B200, 2, "bf16"), Setup(H100, 4, "bf16"), Traffic(32, 2000, 300)
    found = mix(SEVENTY, first, second, traffic)
    read = cost(reading(SEVENTY, first, 1, 2000), constants_of(first)[0])
    step = cost(steady(SEVENTY, second, traffic, prompts=False), constants_of(second)[0])
    assert found.prompt.value == pytest.approx(float(read.joules))
    assert found.output.value == pytest.approx(float(step.joules) / 32 * 300)
    assert found.sent_bytes == 2000 * 2 * 8 * 128 * 80 * 2  # keys and values of 80 layers
    least = found.sent_bytes * JOULES_PER_BYTE_SENT
    assert least < found.transfer.value < 1.2 * least
    whole = found.prompt.value + found.transfer.value + found.output.value
    assert found.joules_per_request.value == pytest.approx(whole)
    assert found.joules_per_token.value == pytest.approx(whole / 300)
    assert found.ratio == pytest.approx(
        whole / serve(SEVENTY, second, traffic).joules_per_request.value
    )
    # so many that one prompt's time on the first is one answer's share of the second
    read_s, write_s = float(read.seconds), float(step.seconds) / 32 * 300
    assert found.prefill_per_decode == pytest.approx(2 * read_s / (4 * write_s))
    assert found.first_token_s.value == pytest.approx(read_s + found.sent_bytes / NETWORK / 80)


def test_a_slow_link_is_waited_for() -> None:
    given = (SEVENTY, Setup(B200, 2), Setup(H100, 4), Traffic(32, 2000, 300))
    slow, fast = mix(*given, link=1e8), mix(*given, link=1e12)
    assert slow.first_token_s.value == pytest.approx(slow.sent_bytes / 1e8, rel=0.01)
    assert fast.first_token_s.value < slow.first_token_s.value / 10
    assert slow.joules_per_request == fast.joules_per_request


@given(
    st.sampled_from(list(SHAPES)), st.sampled_from(["H100", "A100", "L40S"]), st.integers(1, 32),
    st.integers(1, 4000), st.integers(1, 2000), st.integers(1, 2000), st.floats(1, 2),
)  # fmt: skip
def test_a_mix_grows_with_its_request(
    name: str, device: str, batch: int, prompt: int, output: int, more: int, pue: float
) -> None:
    shape, first, second = SHAPES[name], Setup(B200, 8), Setup(find(device), 8)
    one = mix(shape, first, second, Traffic(batch, prompt, output), pue=pue)
    for t in (Traffic(batch, prompt + more, output), Traffic(batch, prompt, output + more)):
        longer = mix(shape, first, second, t, pue=pue)
        assert longer.joules_per_request.value > one.joules_per_request.value
    f = one.joules_per_request
    assert f.low < f.value < f.high
    assert one.joules_per_request_whole.value > pue * f.value


def test_mixes_that_are_none() -> None:
    a, b, t = Setup(H100, 4), Setup(H100, 4), Traffic(1, 10, 10)
    for call, match in (
        (lambda: mix(SEVENTY, a, b, Traffic(1, 0, 10)), "without a prompt"),
        (lambda: mix(SEVENTY, a, b, t, prompts=0), "0 prompts at once"),
        (lambda: mix(SEVENTY, a, b, t, link=0), "give bytes a second"),
        (lambda: mix(SEVENTY, Setup(L40S), b, t), "L40S have"),
        (lambda: mix(SEVENTY, a, Setup(L40S), t), "L40S have"),
    ):
        with pytest.raises(JoulesmithError, match=match):
            call()


# ---- side by side


def test_each_way_stands_at_its_best() -> None:
    setups = [Setup(H100, weights="bf16"), Setup(B200, weights="bf16"), Setup(find("EPYC 9654"))]
    rows = compare(SEVENTY, setups, Traffic(1, 500, 300), latency_s=0.05)
    first, second, third = rows
    assert first.served is not None and second.served is not None
    assert first.served.setup.devices == 2 and second.served.setup.devices == 1
    for row in (first, second):
        assert row.served is not None
        best = best_batch(SEVENTY, row.served.setup, Traffic(1, 500, 300), 0.05)
        assert best == row.served and best.seconds.value <= 0.05
    assert (first.ratio, first.low, first.high, first.within) == (1.0, 1.0, 1.0, None)
    a, b = first.served.joules_per_token, second.served.joules_per_token
    assert second.ratio == pytest.approx(b.value / a.value)
    apart = math.hypot(math.log(a.high / a.value), math.log(b.high / b.value))
    assert second.high == pytest.approx(second.ratio * math.exp(apart))
    assert second.within == (second.low <= 1 <= second.high)
    assert third.served is None and "no memory in the table" in third.why_not


def test_more_devices_are_tried_for_the_sake_of_latency() -> None:
    fast = compare(SEVENTY, [Setup(H100, weights="bf16")], Traffic(1, 100, 100), latency_s=0.016)[0]
    assert fast.served is not None and fast.served.setup.devices > 2
    with pytest.raises(JoulesmithError, match=r"a step takes .* more than 0\.1 ms"):
        compare(SEVENTY, [Setup(H100)], Traffic(1, 100, 100), latency_s=1e-4)
    with pytest.raises(JoulesmithError, match="give 2 devices"):
        compare(SEVENTY, [Setup(H100)], Traffic(1, 100, 100), devices=1)
    with pytest.raises(JoulesmithError, match="nothing to compare"):
        compare(SEVENTY, [])


def test_ways_are_named_by_what_they_differ_in() -> None:
    setups = [Setup(B200, weights=w) for w in (None, "bf16", 4.5)]
    names = [r.name for r in compare(EIGHT, setups, Traffic(1, 10, 10), devices=1, batch=4)]
    assert names == [f"{B200.name}, as given", f"{B200.name}, bf16", f"{B200.name}, 4.5 bits"]
    alike = compare(EIGHT, [Setup(B200), Setup(B200)], Traffic(1, 10, 10), batch=4)
    assert alike[1].name == B200.name and alike[1].ratio == 1 and alike[1].within


# ---- days and batteries


def test_days_are_tokens_times_joules() -> None:
    served = serve(EIGHT, Setup(H100), Traffic(16, 100, 200), pue=1.3)
    found = fleet(served, 1e6, grid("250"), price("0.2"))
    kwh = served.joules_per_token_whole.value * 200 * 1e6 / 3.6e6
    assert found.kwh_per_day.value == pytest.approx(kwh)
    assert found.kgco2e_per_day.value == pytest.approx(kwh * 0.25)
    assert found.money_per_day is not None
    assert found.money_per_day.value == pytest.approx(kwh * 0.2)
    assert found.setups == pytest.approx(2e8 / served.tokens_per_second.value / 86400)
    assert found.grid == "250 gCO2e/kWh"
    assert fleet(served, 1e6, grid("DE")).money_per_day is None
    for wrong in (0, -1, math.nan):
        with pytest.raises(JoulesmithError, match="requests a day"):
            fleet(served, wrong, grid("250"))


def test_a_battery_is_as_many_tokens_as_it_has_joules_for() -> None:
    served = serve(EIGHT, Setup(find("Jetson AGX Orin"), weights=4.5), Traffic(1, 100, 200))
    found = charge(served, 60)
    assert found.tokens.value == pytest.approx(60 * 3600 / served.joules_per_token_whole.value)
    assert found.requests.value == pytest.approx(found.tokens.value / 200)
    assert found.hours.value == pytest.approx(60 / served.watts.value)
    assert found.tokens.low < found.tokens.value < found.tokens.high
    for wrong in (0, math.inf, math.nan):
        with pytest.raises(JoulesmithError, match="a battery of"):
            charge(served, wrong)


# ---- the roof


def test_no_point_is_above_its_roof() -> None:
    for name, shape in SHAPES.items():
        for device in ("H100", "B200", "L4"):
            setup = Setup(find(device), 4, "fp8")
            found = roof(shape, setup, Traffic(1, 1000, 100), [1, 8, 64, 512])
            assert [p.batch for p in found.points] == [1, 8, 64, 512, 1], name
            for p in found.points:
                limit = min(found.reached_peak, found.reached_bandwidth * p.flops_per_byte)
                assert p.flops_per_second <= limit * (1 + 1e-9)
            assert found.reached_peak < found.peak
            assert found.ridge == pytest.approx(found.peak / found.bandwidth)


# ---- all of it


def test_an_answer_has_what_was_asked() -> None:
    setup, traffic = Setup(H100, weights="bf16"), Traffic(1, 500, 300)
    free = answer_serve(EIGHT, setup, traffic)
    assert free.chosen and free.served.traffic.batch == free.most == free.curve[-1].traffic.batch
    tight = answer_serve(EIGHT, setup, traffic, latency_s=0.02)
    assert tight.served.seconds.value <= 0.02
    assert tight.served.traffic.batch in [s.traffic.batch for s in tight.curve]
    given_ = answer_serve(EIGHT, setup, traffic, batch=7)
    assert not given_.chosen and given_.served == serve(EIGHT, setup, replace(traffic, batch=7))
    assert given_.work.cache_bytes_per_token == 2 * 8 * 128 * 32 * 2
    assert given_.work.prefill_flops == work.prefill_flops(EIGHT, 500) / 500
    with pytest.raises(JoulesmithError, match="with one sequence, more than 1 ms"):
        answer_serve(EIGHT, setup, traffic, latency_s=1e-3)
    # memory unknown, so the curve ends where it always does
    cpu = answer_serve(EIGHT, Setup(find("EPYC 9654"), weights=4.5), traffic)
    assert cpu.most is None and cpu.curve[-1].traffic.batch == 512


def test_json_is_plain_and_its_keys_stay() -> None:
    found = answer_serve(
        EIGHT, Setup(H100, weights="bf16"), Traffic(1, 500, 300), prefill=Setup(B200),
        requests_per_day=10, grid=grid("DE"), price=price("DE"), battery_wh=10,
    )  # fmt: skip
    told = json.loads(json.dumps(told_serve(found), allow_nan=False))
    assert set(told) == {
        "command", "joulesmith", "pedigree", "model", "setup", "traffic",
        "joules_per_output_token", "joules_per_output_token_with_host_and_pue",
        "joules_per_request", "joules_per_token_decode", "joules_per_token_prefill",
        "joules_per_token_and_parameter", "tokens_per_second", "step_s", "watts",
        "host_watts_per_device", "limit", "split_joules_per_token", "memory_bytes",
        "memory_room_bytes", "fits", "device_was_measured", "pue", "batch_is", "latency_limit_s",
        "most_sequences", "curve", "roofline", "mix", "per_day", "battery", "constants", "notes",
    }  # fmt: skip
    assert told["pedigree"] == "modelled" and told["setup"]["engine"] == "vLLM 0.11"
    e = told["joules_per_output_token"]
    assert e["low"] < e["value"] < e["high"]
    assert told["model"]["parameters"] == EIGHT.parameters
    assert {c["basis"] for c in told["constants"]} == {"fitted", "published", "assumed"}
    assert all(c["source"] for c in told["constants"])
    both = answer_compare(EIGHT, [Setup(H100), Setup(B200)], Traffic(1, 500, 300),
                          requests_per_day=5, grid=grid("DE"))  # fmt: skip
    rows = json.loads(json.dumps(told_compare(both), allow_nan=False))["rows"]
    assert [r["name"] for r in rows] == [H100.name, B200.name]
    assert rows[1]["joules_ratio_to_first"]["value"] == pytest.approx(
        rows[1]["answer"]["joules_per_output_token"]["value"]
        / rows[0]["answer"]["joules_per_output_token"]["value"]
    )
    assert rows[0]["per_day"]["requests"] == 5


def test_python_has_the_same_by_name() -> None:
    setup = estimate.Setup(estimate.find("h100"), weights="bf16")
    shape = estimate.of_numbers(8e9)
    assert shape == of_numbers(8e9)
    found = estimate.serve(shape, setup, estimate.Traffic(8))
    assert isinstance(found, estimate.Served)
    for name in estimate.__all__:
        thing = getattr(estimate, name)
        assert callable(thing), name
    assert set(dir(estimate)) == set(estimate.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = estimate.nonsense


def test_docs_tell_the_errors_that_were_found() -> None:
    home = Path(__file__).parents[2]
    found = (home / "benchmarks/results/estimate_serving.md").read_text("utf-8")
    docs = (home / "docs/estimate.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (.+?) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", docs, re.M
    )
    assert len(rows) == 5
    for name, count, family, device, peer in rows:
        cells = next(x for x in found.splitlines() if x.startswith(f"| {name} |")).split(" | ")
        assert [cells[1], cells[3], cells[5], cells[6]] == [
            count,
            f"{family}%",
            f"{device}%",
            f"{peer}%",
        ]
    code = re.search(r"```python\n(.*?)```", docs, re.S)
    assert code is not None
    exec(code[1].replace('estimate.read("config.json")', "estimate.of_numbers(8e9)"), {})
